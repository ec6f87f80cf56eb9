"""What an operator may do to the running system: acts by name, each a method of some actor.

Knows names, handles and who may call. Ignores HTTP and what the acts do. There are no keys yet: only this machine may.
"""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

from ray.exceptions import RayTaskError

from clawrl.errors import ClawrlError, GatewayError

log = logging.getLogger(__name__)

Acts = dict[str, tuple[Any, str]]
"""Name of the act -> the actor's handle and its method, which takes keyword arguments and returns what JSON can say."""


def require_local(host: str | None) -> None:
    """Raises GatewayError 403 unless the peer's address is a loopback one."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        address = None
    mapped = getattr(address, "ipv4_mapped", None) or address
    if mapped is None or not mapped.is_loopback:
        raise GatewayError(f"/admin answers this machine only, not {host}; ask from where clawrl serves", status=403)


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
