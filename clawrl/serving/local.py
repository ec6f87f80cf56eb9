"""Who is on this machine: told from a connection's peer and from what a request says of its way here.

Pure. Ignores what is allowed to whom (`keys`, `admin`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


def why_not_local(host: str | None, headers: Mapping[str, str] | None = None) -> str | None:
    """What speaks against a request having come from this machine, and being meant for it; None if nothing does.

    The peer's address must be a loopback one. With `headers` (names in lower case, or looked up without regard to it)
    no proxy may have sent the request on, and it must name this machine as its `Host`: a page in a browser of this
    machine, whose name somebody has pointed here, names itself.
    """
    if not is_loopback(host):
        return f"not {host}"
    if headers is None:
        return None
    passed_on = next((name for name in _FORWARDED if name in headers), None)
    if passed_on is not None:
        return f"not who asks through a proxy ({passed_on})"
    named = headers.get("host", "")
    name = named[1 : named.find("]")] if named.startswith("[") else named.partition(":")[0]
    if name.lower() != "localhost" and not is_loopback(name):
        return f"by the name localhost or its loopback address, not {named!r}"
    return None


def is_loopback(host: str | None) -> bool:
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
