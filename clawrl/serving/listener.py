"""The socket the gateway answers on, in its own process.

Knows sockets and uvicorn; ignores routes. Ray Serve's proxy would carry every chunk of a stream through one more
process, which costs more than all the gateway does with it (`python -m jobs.bench serving`). The port is opened with
SO_REUSEPORT instead: all replicas of a machine share it, the kernel spreads the connections, a replica that comes back
after a crash binds at once, and one that is gone gets none.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import uvicorn

BACKLOG = 2048
STOP_S = 4.0
KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none sends its next request into one that is being closed."""
Result = TypeVar("Result")


class Listener:
    """Serves an ASGI app on the running loop until `close`."""

    def __init__(self, app: Any, host: str, port: int) -> None:
        """Raises OSError if the port cannot be bound."""
        self._socket = _bind(host, port)
        config = uvicorn.Config(
            app,
            loop="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level="warning",
            timeout_graceful_shutdown=int(STOP_S),
            timeout_keep_alive=KEEP_ALIVE_S,
            server_header=False,
            proxy_headers=False,  # the peer is who is connected, whoever else a header names
        )
        self._server = _Server(config)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    @property
    def alive(self) -> bool:
        return not self._serving.done()

    async def close(self) -> None:
        """Take no new connection, let running replies end for some seconds, then cut them."""
        await self._server.ready.wait()
        self._server.should_exit = True
        with suppress(asyncio.CancelledError, TimeoutError):
            await asyncio.wait_for(self._serving, STOP_S + 1)


class _Server(uvicorn.Server):
    """uvicorn inside somebody else's process: signals are not its business."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextmanager
    def capture_signals(self):
        yield


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
    try:
        bound.bind((host, port))
        bound.listen(BACKLOG)
    except OSError:
        bound.close()
        raise
    bound.setblocking(False)
    return bound


class InTurn:
    """ASGI middleware: requests with the same `Idempotency-Key` are answered one after the other, whole streams."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._locks: WeakValueDictionary[bytes, asyncio.Lock] = WeakValueDictionary()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        key = dict(scope.get("headers") or ()).get(b"idempotency-key")
        if key is None:
            await self._app(scope, receive, send)
            return
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            await self._app(scope, receive, send)


async def while_connected(request: Any, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled when the client goes away first. The body must have been read before.

    Raises ClientGone in that case.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientGone
        return doing.result()
    finally:
        leaving.cancel()
        if not doing.done():
            doing.cancel()


class ClientGone(Exception):
    """The client closed the connection before its answer was there."""


async def _left(request: Any) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
