"""What an operator may do to the running system: acts by name, each a method of some actor.

Knows names, handles and who may call. Ignores HTTP and what the acts do. Only this machine may, with or without keys.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayTaskError

from clawrl.errors import ClawrlError, GatewayError
from clawrl.serving.local import why_not_local

log = logging.getLogger(__name__)

Acts = dict[str, tuple[Any, str]]
"""Name of the act -> the actor's handle and its method, which takes keyword arguments and returns what JSON can say."""


def require_local(host: str | None, headers: Mapping[str, str] | None = None) -> None:
    """Raises GatewayError 403 unless a request comes from this machine and was meant for it, see `why_not_local`."""
    why = why_not_local(host, headers)
    if why is not None:
        raise GatewayError(f"/admin answers this machine only, {why}; ask from where clawrl serves", status=403)


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
