"""What an operator may do to the running system: acts by name, each a method of some actor.

Knows names, handles and who may call. Ignores HTTP and what the acts do. There are no keys yet: only this machine may.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayTaskError

from clawrl.errors import ClawrlError, GatewayError

log = logging.getLogger(__name__)

Acts = dict[str, tuple[Any, str]]
"""Name of the act -> the actor's handle and its method, which takes keyword arguments and returns what JSON can say."""


_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


def require_local(host: str | None, headers: Mapping[str, str] | None = None) -> None:
    """Raises GatewayError 403 unless a request comes from this machine and was meant for it.

    The peer's address must be a loopback one. With `headers` (names in lower case, or looked up without regard to it)
    no proxy may have sent the request on, and it must name this machine as its `Host`: a page in a browser of this
    machine, whose name somebody has pointed here, names itself.
    """
    if not _loopback(host):
        raise _refused(f"not {host}")
    if headers is None:
        return
    passed_on = next((name for name in _FORWARDED if name in headers), None)
    if passed_on is not None:
        raise _refused(f"not who asks through a proxy ({passed_on})")
    named = headers.get("host", "")
    name = named[1 : named.find("]")] if named.startswith("[") else named.partition(":")[0]
    if name.lower() != "localhost" and not _loopback(name):
        raise _refused(f"by the name localhost or its loopback address, not {named!r}")


def _refused(what: str) -> GatewayError:
    return GatewayError(f"/admin answers this machine only, {what}; ask from where clawrl serves", status=403)


def _loopback(host: str | None) -> bool:
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


async def act(acts: Acts, name: str, arguments: dict[str, Any]) -> Any:
    """The answer of one act. Raises GatewayError: 404 for an unknown name, 400 for wrong arguments or a refusal."""
    if name not in acts:
        known = ", ".join(sorted(acts)) or "none"
        raise GatewayError(f"there is no act {name!r}; known are {known}", status=404)
    handle, method = acts[name]
    try:
        call = getattr(handle, method).remote(**arguments)
    except TypeError as error:  # Ray checks the arguments against the method's signature
        raise GatewayError(f"{name} cannot be called with {sorted(arguments)}: {error}") from error
    log.info("event=act name=%s arguments=%s", name, sorted(arguments))
    try:
        return await call
    except Exception as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, GatewayError):
            raise cause from error
        if isinstance(cause, ClawrlError):
            raise GatewayError(str(cause)) from error
        raise
