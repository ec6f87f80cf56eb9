"""One request answered, and captured: from the moment it is understood until its turn is durable.

Knows the policy's handle, and through `Placing` the journal. Ignores routes and shapes (`surfaces`).

    held until admitted ─► policy ─► pieces to the client ─► Finished ─► journal ─► the last event
                            └─ meanwhile: where does the turn stand? (`placing`)

The turn is durable before the reply's last byte. What a client leaves behind is recorded as far as it was said, with
finish reason `abort`, and is never trained on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response
from ray.exceptions import RayActorError

from clawrl.config import GatewaySection, PolicySection
from clawrl.errors import ClawrlError, GatewayError
from clawrl.observe import metric
from clawrl.serving.admission import Admission
from clawrl.serving.capture import Finished, Refused, reply_message
from clawrl.serving.listener import while_connected
from clawrl.serving.placing import Place, Placing
from clawrl.serving.sessions import Identity, digest, request_digest
from clawrl.serving.streams import EventStream
from clawrl.serving.surfaces import Surface
from clawrl.types import GROUP, NOT_KEPT, Capture, Message, Turn

log = logging.getLogger(__name__)

ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that was understood."""

    surface: Surface
    body: dict[str, Any]  # as it goes to the engine
    chat: dict[str, Any]  # as a chat request
    identity: Identity
    key: str  # whose bounds it counts for
    arrived: float
    request: str  # becomes the response's id

    @property
    def id(self) -> str:
        return self.surface.id(self.request)

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))


class Answering:
    """One per gateway replica. `policy` is its streaming handle."""

    def __init__(self, settings: GatewaySection, policy: PolicySection, stream: Any, placing: Placing) -> None:
        self._settings, self._policy, self._stream, self._placing = settings, policy, stream, placing
        self._admission = Admission(settings)
        self._recording: set[asyncio.Task[None]] = set()

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    async def answer(self, asked: Asked, http: Any) -> Response:
        """The response of a request whose body has been read. Raises GatewayError, and ClientGone."""
        run = _Run(self, asked)
        try:
            began = asyncio.wait({run.beginning}, timeout=self._settings.keep_alive_s if asked.stream else None)
            await while_connected(http, began)
            if not run.beginning.done():  # a held stream begins, so that nobody gives it up for dead
                return self._streamed(run, {})
            first = run.beginning.result()
            if isinstance(first, Refused):
                await run.close()
                return JSONResponse(first.body, status_code=first.status)
            told = await self._placing.told(asked.identity, run.placing)
            metric("gateway/first_token_s").observe(time.time() - asked.arrived)
            if asked.stream:
                return self._streamed(run, told)
            return await while_connected(http, self._whole(run, first, told))
        except BaseException:
            await run.close()
            raise

    def _streamed(self, run: _Run, told: dict[str, str]) -> Response:
        silence = lambda: run.asked.surface.silence(run.asked.id, self._policy.served_name)  # noqa: E731
        return EventStream(self._events(run), silence, self._settings.keep_alive_s, told)

    async def _whole(self, run: _Run, first: str, told: dict[str, str]) -> Response:
        asked = run.asked
        reply, reason = asked.surface.answered(json.loads(first))
        finished = await anext(run.pieces)
        await self._keep(run, reply, reason, finished.capture)
        await run.close()
        return Response(asked.surface.shown(first), media_type="application/json", headers=told)

    async def _events(self, run: _Run) -> AsyncGenerator[str, None]:
        """The server-sent events of one reply; a failure on the way is an error event, never a silent end."""
        surface, assembler = run.asked.surface, run.asked.surface.assembler()
        try:
            first = await run.beginning
            if isinstance(first, Refused):
                yield surface.failure(first.body)
                return
            assembler.add_events(first)
            yield surface.shown(first)
            async for piece in run.pieces:
                if isinstance(piece, Finished):
                    await self._keep(run, assembler.message(), assembler.finish_reason, piece.capture)
                else:
                    assembler.add_events(piece)
                    yield surface.shown(piece)
            if surface.last_event:
                yield surface.last_event
        except (asyncio.CancelledError, GeneratorExit):
            run.left = assembler.message()
            raise
        except Exception as error:
            metric("gateway/failures_num").inc()
            log.exception("event=stream_failed")
            shown = str(error) if isinstance(error, ClawrlError) else type(error).__name__
            run.left = assembler.message()
            yield surface.failure(GatewayError(f"the reply broke off: {shown}; try again", status=503).body())
        finally:
            await run.close()

    async def _keep(self, run: _Run, reply: Message, reason: str, capture: Capture) -> None:
        asked = run.asked
        place = await run.placing
        self._admission.spend(asked.key, len(capture.prompt_ids) + len(capture.completion_ids))
        turn = turn_of(asked, place, reply, reason, capture)
        run.kept = True
        await self._placing.keep(turn, place, done=asked.identity.done)

    def record_left(self, run: _Run, reply: Message) -> None:
        """A client left: record what was said to it, beside whatever goes on."""

        async def record() -> None:
            try:
                place = await run.placing
                await self._placing.keep(turn_of(run.asked, place, reply, ABORT, NOT_KEPT), place)
            except Exception as error:
                log.warning("event=abort_not_recorded error=%s", type(error).__name__)

        task = asyncio.create_task(record())
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)

    async def begun(self, run: _Run) -> Any:
        """The first piece, once the request is admitted. A replica that dies before it has said anything is not the
        client's concern: the request is held, and asked again of the next one."""
        await self._admission.enter(run.asked.key)
        run.leave = lambda: self._admission.leave(run.asked.key)
        run.place(self._placing)
        deadline = time.monotonic() + self._settings.hold_s
        while True:
            run.pieces = _whole(
                getattr(self._stream, run.asked.surface.method).remote(
                    run.asked.body, run.asked.request, _asker(run.asked.identity)
                )
            )
            try:
                return await anext(run.pieces)
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                log.warning("event=policy_gone remedy='the request is asked again'")
                await asyncio.sleep(0.2)


class _Run:
    """A request under way: what has begun, and must end with it."""

    pieces: AsyncIterator[Any]
    placing: asyncio.Task[Place]

    def __init__(self, answering: Answering, asked: Asked) -> None:
        self.asked, self._answering = asked, answering
        self.kept = False
        self.left: Message | None = None
        self.leave: Any = None
        self.beginning = asyncio.create_task(answering.begun(self))

    def place(self, placing: Placing) -> None:
        """Find out where the turn stands, while the reply is written."""
        self.placing = asyncio.create_task(placing.place(self.asked.chat["messages"], self.asked.identity))

    async def close(self) -> None:
        """End the generation if it has not ended, and give the place on. May be repeated."""
        self.beginning.cancel()
        await asyncio.wait({self.beginning})
        refused = not self.beginning.cancelled() and (
            self.beginning.exception() is not None or isinstance(self.beginning.result(), Refused)
        )
        pieces = getattr(self, "pieces", None)
        if pieces is not None:
            await pieces.aclose()
        if self.leave is not None:
            self.leave()
            self.leave = None
            if not self.kept and not refused:
                self.kept = True
                self._answering.record_left(self, self.left or reply_message(None, None, None))


def _asker(identity: Identity) -> str:
    """Whose policy answers: attempts at an environment's task are nobody's, and everyone's policy learns from them."""
    return GROUP if identity.group is not None else identity.user


async def _whole(pieces: Any) -> AsyncGenerator[Any, None]:
    """The pieces of a reply; whoever stops reading before its end cancels the generation behind it."""
    ended = False
    try:
        async for piece in pieces:
            ended = isinstance(piece, (Finished, Refused))
            yield piece
    finally:
        if not ended:
            pieces.cancel()


def turn_of(asked: Asked, place: Place, reply: Message, finish_reason: str, capture: Capture) -> Turn:
    """The record of a reply."""
    chat, identity = asked.chat, asked.identity
    return Turn(
        id=asked.id,
        user=identity.user,
        session=place.session,
        index=place.index,
        kind=identity.kind,
        source=identity.source,
        group=identity.group,
        messages=tuple(chat["messages"]),
        tools=tuple(chat.get("tools") or ()),
        template=dict(chat.get("chat_template_kwargs") or {}),
        reply=reply,
        finish_reason=finish_reason,
        conversation=digest([*chat["messages"], reply], identity.scope),
        capture=capture,
        started=asked.arrived,
        ended=time.time(),
        request=request_digest(chat, identity.scope),
        key=None if finish_reason == ABORT else identity.key,
        reason=place.reason,
        parent=place.parent,
    )
