"""The socket the gateway answers on, in its own process.

Knows sockets and uvicorn; ignores routes. Ray Serve's proxy would carry every chunk of a stream through one more
process, which costs more than all the gateway does with it (`python -m jobs.bench serving`). The port is opened with
SO_REUSEPORT instead: all replicas of a machine share it, the kernel spreads the connections, a replica that comes back
after a crash binds at once, and one that is gone gets none.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable
from contextlib import contextmanager, suppress
from http import HTTPStatus
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from clawrl.errors import GatewayError

BACKLOG = 2048
HEADER_S, HEADER_BYTES = 20.0, 64 * 1024
"""How long a request's header may take, and about how long it may be."""
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
            http=BoundedHeaders,
            ws="none",
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


class BoundedHeaders(HttpToolsProtocol):
    """HTTP/1.1 of one connection, closed with an error where a header comes too slowly or goes on too long."""

    _late: asyncio.TimerHandle | None = None
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._header_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._late is None:
            self._await_header()

    def on_headers_complete(self) -> None:
        self._header_came()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is not None:
            self._header_bytes += len(data)
            if self._header_bytes > HEADER_BYTES:
                self._refuse(431, "the request's header is too long")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is no HTTP request that can be read")

    def _await_header(self) -> None:
        self._header_bytes = 0
        self._late = self.loop.call_later(HEADER_S, self._refuse, 408, "the request's header did not come in time")

    def _header_came(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _refuse(self, status: int, message: str) -> None:
        self._header_came()
        if self.transport.is_closing():
            return
        body = json.dumps(GatewayError(message, status=status).body()).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()


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
