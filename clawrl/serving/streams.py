"""How an answer leaves: errors in OpenAI's shape, and server-sent events that keep a waiting client's connection.

Knows ASGI. Ignores what the events say.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response

from clawrl.errors import GatewayError

EVENT_STREAM, NO_CACHE = "text/event-stream", {"cache-control": "no-cache"}


def refusal(error: GatewayError) -> JSONResponse:
    """The error as a response."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status in (408, 413):
        headers["connection"] = "close"  # the rest of the body is not read
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


class EventStream(Response):
    """Server-sent events, sent as they come; `silence()` is sent whenever nothing was for `keep_alive_s`.

    A client that leaves ends the generator, within the moment.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        silence: Callable[[], str],
        keep_alive_s: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers={**NO_CACHE, **headers}, media_type=EVENT_STREAM)
        del self.headers["content-length"]
        self._events, self._silence, self._keep_alive_s = events, silence, keep_alive_s
        self._sent = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self._sent = loop.time()
        writing = loop.create_task(self._write(send))
        waiting = loop.create_task(_left(receive))
        idling = loop.create_task(self._keep_alive(send))
        try:
            await asyncio.wait({writing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, waiting, idling):
                task.cancel()
            ended = await asyncio.gather(writing, waiting, idling, return_exceptions=True)
            await self._events.aclose()
        failure = ended[0]
        if isinstance(failure, Exception) and not isinstance(failure, OSError):
            raise failure

    async def _write(self, send: Any) -> None:
        loop = asyncio.get_running_loop()
        async for event in self._events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
            self._sent = loop.time()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Any) -> None:
        loop = asyncio.get_running_loop()
        while True:
            left_s = self._sent + self._keep_alive_s - loop.time()
            if left_s <= 0:
                await send({"type": "http.response.body", "body": self._silence().encode(), "more_body": True})
                self._sent = loop.time()
            else:
                await asyncio.sleep(left_s)


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
