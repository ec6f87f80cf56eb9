"""The door: OpenAI's routes, one capture path for people and environments.

Knows HTTP, sessions and the journal's calls. Ignores engines and training. One request:

    validate ─► pair (the earlier turn gets its next state) ─► policy.chat ─► stream deltas to the client
                                                                   └► Finished ─► journal.append(Turn) ─► [DONE]

The turn is durable before the reply's last byte. Secrets are taken out before anything goes to the journal, and of who
opted out nothing goes there; the digests by which conversations are known are those of the words as they were.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.exceptions import RayActorError

from clawrl.config import GatewaySection, PolicySection, PrivacySection
from clawrl.errors import ClawrlError, GatewayError
from clawrl.observe import metric
from clawrl.serving import replay
from clawrl.serving.admin import Acts, act, require_local
from clawrl.serving.capture import Finished, Refused, ReplyAssembler, reply_message
from clawrl.serving.consent import HEADER, OptOuts
from clawrl.serving.listener import ClientGone, InTurn, Listener, Slots, while_connected
from clawrl.serving.redaction import Redactor
from clawrl.serving.sessions import Continuation, Identity, continuation, digest, identify, request_digest
from clawrl.types import Consent, Message, NextState, Turn

log = logging.getLogger(__name__)

ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT = "/v1/chat/completions"
DONE = "data: [DONE]\n\n"
HELD_S = 300.0
"""How long a request is held while no policy replica lives to answer it."""
EVENT_STREAM, NO_CACHE = "text/event-stream", {"cache-control": "no-cache"}
RETRY_WINDOW_S = 1800.0
"""How long after a reply the same request, marked as a client's retry, is taken for the same turn."""

UNRECORDED = ""
"""The journal's id for a turn that it knows of and does not have."""
NO_SESSION = ""
"""A session that no request can name, and no turn is in."""
CONSENTS, FOLLOW_S, FOLLOW_RETRY_S = 1000, 30.0, 0.5
"""Words read at once from the journal, one long poll of it, and the pause after a failed one."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn stands: its session and its position in it."""

    session: str
    index: int
    recorded: bool = True


class Gateway:
    """One replica; `serving/app.py` makes it a Serve ingress.

    `policy` and `journal` are handles; `status` maps a name to the handle and method that answer under it, and so
    does `admin` for what an operator may do.
    """

    async def __init__(
        self,
        settings: GatewaySection,
        policy_settings: PolicySection,
        policy: Any,
        journal: Any,
        status: dict[str, tuple[Any, str]],
        admin: Acts,
        privacy: PrivacySection,
    ) -> None:
        self._settings = settings
        self._policy_settings = policy_settings
        self._policy = policy
        self._stream = policy.options(stream=True)
        self._journal = journal
        self._status = status
        self._admin = admin
        self._redactor = Redactor(privacy)
        self._opt_outs = OptOuts(privacy.opt_out_users)
        self._following = asyncio.create_task(self._follow_consents())
        self._app = self._routes()
        self._listener = Listener(self._app, settings.host, settings.port)

    def __serve_build_asgi_app__(self) -> Any:
        """The same routes for Serve's own proxy, where a cluster runs one."""
        return self._app

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that fails."""
        if not self._listener.alive:
            raise GatewayError(f"the listener on port {self._settings.port} has ended", status=503)

    async def __del__(self) -> None:
        self._following.cancel()
        await self._listener.close()

    # -- routes ------------------------------------------------------------------------------------------------------

    def _routes(self) -> Any:
        api = FastAPI(title="clawrl", docs_url=None, redoc_url=None)
        api.get("/healthz")(self.healthz)
        api.get("/status")(self.status)
        api.get("/v1/models")(self.models)
        api.post(CHAT)(self.chat_completions)
        api.post("/admin/{name}")(self.administer)
        return InTurn(Slots(api, frozenset([CHAT]), self._settings.max_concurrent_requests))

    async def healthz(self) -> Response:
        """200 once a policy replica answers."""
        policy = await self._policy.status.remote()
        return JSONResponse({"status": "ok", "version": policy["version"]})

    async def status(self) -> Response:
        """Policy and judge replicas, versions, buffer and journal counts."""
        names = list(self._status)
        calls = [getattr(handle, method).remote() for handle, method in self._status.values()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        shown = {
            name: {"error": str(answer)} if isinstance(answer, BaseException) else answer
            for name, answer in zip(names, answers, strict=True)
        }
        return JSONResponse(shown)

    async def models(self) -> Response:
        settings = self._policy_settings
        card = {
            "id": settings.served_name,
            "object": "model",
            "created": 0,
            "owned_by": "clawrl",
            "root": settings.model,
            "max_model_len": settings.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [card]})

    async def administer(self, name: str, request: Request) -> Response:
        """An operator's act, its keyword arguments in the body."""
        try:
            require_local(request.client.host if request.client else None, request.headers)
            arguments = await read_json(request, self._settings.max_body_mib)
            return JSONResponse(await act(self._admin, name, arguments))
        except GatewayError as error:
            return JSONResponse(error.body(), status_code=error.status)
        except Exception as error:
            log.exception("event=act_failed name=%s", name)
            failure = GatewayError(f"{name} failed ({type(error).__name__}); see the log of the run", status=500)
            return JSONResponse(failure.body(), status_code=500)

    async def chat_completions(self, request: Request) -> Response:
        arrived = time.time()
        metric("gateway/requests_num").inc()
        try:
            body = await read_json(request, self._settings.max_body_mib)
            validate_chat(body, self._policy_settings)
            identity = identify(request.headers, body)
            earlier = await self._earlier(body, identity)
            if earlier is not None:
                return self._replayed(earlier, bool(body.get("stream")), body.get("stream_options") or {})
            return await while_connected(request, self._answer(body, identity, arrived))
        except GatewayError as error:
            return JSONResponse(error.body(), status_code=error.status)
        except ClientGone:
            return Response(status_code=499)
        except Exception as error:
            metric("gateway/failures_num").inc()
            log.exception("event=request_failed")
            failure = GatewayError(f"the policy cannot answer now ({type(error).__name__}); try again", status=503)
            return JSONResponse(failure.body(), status_code=503)

    # -- a request sent twice ------------------------------------------------------------------------------------------

    async def _earlier(self, body: dict[str, Any], identity: Identity) -> Turn | None:
        """The recorded turn that this request repeats: by its key, or else, where it is a retry, by its content.

        One with secrets taken out is answered anew: its words are not what was said. So is who opted out since. Raises
        GatewayError if the key was used for another request.
        """
        if identity.opts_out or self._opt_outs.cover(identity.user, identity.session):
            return None
        found = await self._repeated(body, identity)
        if found is None or self._opt_outs.cover(found.user, found.session) or not len(found.capture.prompt_ids):
            return None
        return found

    async def _repeated(self, body: dict[str, Any], identity: Identity) -> Turn | None:
        if identity.key is not None:
            found = await self._journal.keyed_turn.remote(identity.key)
            if found is not None and found.request != request_digest(body):
                raise GatewayError("Idempotency-Key was used for another request; send a new key", status=422)
            return found
        if not identity.retried:
            return None
        request, since = request_digest(body), time.time() - RETRY_WINDOW_S
        return await self._journal.repeated_turn.remote(
            identity.user, request, since, identity.kind, identity.source, identity.group, identity.session
        )

    def _replayed(self, turn: Turn, stream: bool, options: dict[str, Any]) -> Response:
        model = self._policy_settings.served_name
        if not stream:
            return JSONResponse(replay.completion(turn, model))
        events = [*replay.events(turn, model, usage=bool(options.get("include_usage"))), DONE]
        return StreamingResponse(iter(events), media_type=EVENT_STREAM, headers=NO_CACHE)

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _answer(self, body: dict[str, Any], identity: Identity, arrived: float) -> Response:
        pieces, first = await self._begun(body)
        if isinstance(first, Refused):
            return JSONResponse(first.body, status_code=first.status)
        placing = asyncio.create_task(self._place(body["messages"], identity))  # while the reply is written
        told = await self._told(identity, placing)
        metric("gateway/first_token_s").observe(time.time() - arrived)
        if body.get("stream"):
            events = self._events(body, identity, placing, first, pieces, arrived)
            return StreamingResponse(events, media_type=EVENT_STREAM, headers={**NO_CACHE, **told})
        answer = json.loads(first)
        choice = answer["choices"][0]
        message = choice["message"]
        reply = reply_message(message.get("content"), message.get("reasoning"), message.get("tool_calls"))
        finished = await anext(pieces)
        place = await placing
        await self._keep(
            _turn(body, identity, place, answer["id"], reply, choice["finish_reason"], finished, arrived), place
        )
        return Response(first, media_type="application/json", headers=told)

    async def _begun(self, body: dict[str, Any]) -> tuple[AsyncIterator[Any], Any]:
        """(pieces, the first of them). A replica that dies before it has said anything is not the client's concern:
        the request is held, and asked again of the next one."""
        deadline = time.monotonic() + HELD_S
        while True:
            pieces = _whole(self._stream.chat.remote(body, uuid.uuid4().hex))
            try:
                return pieces, await anext(pieces)
            except RayActorError:
                if time.monotonic() > deadline:
                    raise
                log.warning("event=policy_gone remedy='the request is asked again'")
                await asyncio.sleep(0.2)

    async def _events(
        self,
        body: dict[str, Any],
        identity: Identity,
        placing: asyncio.Task[Place],
        first: str,
        pieces: AsyncIterator[Any],
        arrived: float,
    ) -> AsyncIterator[str]:
        """The server-sent events of one reply; a failure on the way is an error event, never a silent end."""
        assembler = ReplyAssembler()
        try:
            assembler.add_events(first)
            yield first
            async for piece in pieces:
                if isinstance(piece, Finished):
                    reply, reason = assembler.message(), assembler.finish_reason
                    place = await placing
                    await self._keep(_turn(body, identity, place, assembler.id, reply, reason, piece, arrived), place)
                else:
                    assembler.add_events(piece)
                    yield piece
            yield DONE
        except Exception as error:
            metric("gateway/failures_num").inc()
            log.exception("event=stream_failed")
            shown = str(error) if isinstance(error, ClawrlError) else type(error).__name__
            yield f"data: {json.dumps(GatewayError(f'the reply broke off: {shown}; try again', status=503).body())}\n\n"

    async def _place(self, messages: list[Message], identity: Identity) -> Place:
        """Find the turn this request continues and give it its next state; side calls stand alone.

        Where the request, its session or its user opted out, or the conversation was served unrecorded so far, nothing
        is recorded.
        """
        user, session = identity.user, identity.session or f"session-{uuid.uuid4().hex}"
        if identity.kind == "side":
            return Place(session, 0, not (identity.opts_out or self._opt_outs.cover(user, session)))
        turn, session, index, seen = await self._found(messages, identity, session)
        if identity.opts_out and turn in (None, UNRECORDED) and identity.session is None:
            await self._remember(user)
            return Place(session, 0, recorded=False)
        if identity.opts_out and not self._opt_outs.cover(user, session):
            word = await self._journal.consent.remote(user=user, train=False, session=session)
            self._opt_outs.take(Consent(**word))
        if turn == UNRECORDED or self._opt_outs.cover(user, session):
            return Place(session, 0, recorded=False)
        if turn is not None and seen.history is not None and seen.fresh:
            next_state = NextState(turn, seen.role, seen.fresh, False, time.time())
            await self._journal.append.remote(self._redactor.record(next_state))
        return Place(session, index)

    async def _remember(self, user: str) -> None:
        """A conversation without a session opts out: its own mark says so, and one word, for all of the user's, that
        every replica should ask for such marks."""
        if not self._opt_outs.concern(user):
            word = await self._journal.consent.remote(user=user, train=False, session=NO_SESSION)
            self._opt_outs.take(Consent(**word))

    async def _found(
        self, messages: list[Message], identity: Identity, fresh_session: str
    ) -> tuple[str | None, str, int, Continuation]:
        """The turn that a request continues (None: none), the request's session and index there, and how it reads."""
        seen = continuation(messages)
        found = None
        if seen.history is not None:
            found = await self._journal.open_turn.remote(identity.user, seen.history)
            if found is not None and found[0] == UNRECORDED:
                return UNRECORDED, identity.session or found[1], 0, seen
            if found is not None and identity.session not in (None, found[1]):
                found = None
        if found is None and identity.session is not None:
            last = await self._journal.last_turn.remote(identity.user, identity.session)
            found = last[:3] if last is not None else None
        if found is None:
            return None, fresh_session, 0, seen
        turn, session, index = found
        return turn, session, index + 1, seen

    # -- consent -------------------------------------------------------------------------------------------------------

    async def _told(self, identity: Identity, placing: asyncio.Task[Place]) -> dict[str, str]:
        """The headers that say whether this reply is recorded; only who ever opted out waits for the journal here."""
        certain = identity.opts_out or self._opt_outs.cover(identity.user, identity.session)
        if certain or (self._opt_outs.concern(identity.user) and not (await placing).recorded):
            return HEADER
        return {}

    async def _keep(self, turn: Turn, place: Place) -> None:
        """Record the turn without its secrets; of one that is not recorded, only that its conversation is not."""
        if place.recorded:
            await self._journal.append.remote(self._redactor.record(turn))
        elif turn.kind == "main":
            await self._journal.append.remote(Consent(turn.user, turn.session, False, turn.ended, turn.conversation))

    async def _follow_consents(self) -> None:
        """Take in what users say, to whichever replica, for ever."""
        after = 0
        while True:
            try:
                words = await self._journal.consents.remote(after, CONSENTS, FOLLOW_S)
            except Exception as error:
                log.warning("event=journal_unreachable error=%s retry_s=%g", type(error).__name__, FOLLOW_RETRY_S)
                await asyncio.sleep(FOLLOW_RETRY_S)
                continue
            for seq, word in words:
                self._opt_outs.take(word)
                after = seq


async def _whole(pieces: Any) -> AsyncIterator[Any]:
    """The pieces of a reply; whoever stops reading before its end cancels the generation behind it."""
    ended = False
    try:
        async for piece in pieces:
            ended = isinstance(piece, (Finished, Refused))
            yield piece
    finally:
        if not ended:
            pieces.cancel()


async def read_json(request: Request, max_mib: int) -> dict[str, Any]:
    """The request's JSON object. Raises GatewayError for a wrong content type, size, or anything but an object."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise GatewayError(f"content type {kind or '(none)'!r} is not served; send application/json", status=415)
    limit, raw = max_mib * 2**20, bytearray()
    too_large = GatewayError(f"the body is larger than {max_mib} MiB; send less history", status=413)
    if int(request.headers.get("content-length") or 0) > limit:
        raise too_large
    async for part in request.stream():  # a chunked one does not say its length
        raw += part
        if len(raw) > limit:
            raise too_large
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise GatewayError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise GatewayError("the body must be a JSON object")
    return body


def validate_chat(body: dict[str, Any], settings: PolicySection) -> None:
    """What must hold before anything is journalled or generated. Raises GatewayError naming the value and remedy.

    Everything else about a chat request is checked by the engine's own OpenAI layer.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise GatewayError("messages must be a list with at least one message", param="messages")
    for position, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise GatewayError(
                f"messages[{position}].role is {role!r}; use one of {', '.join(ROLES)}",
                param=f"messages[{position}].role",
            )
    model = body.setdefault("model", settings.served_name)
    if model != settings.served_name:
        raise GatewayError(
            f"model {model!r} is not served here; use {settings.served_name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    for key in ("max_tokens", "max_completion_tokens"):
        limit = body.get(key)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0):
            raise GatewayError(f"{key}={limit!r} is not a positive whole number", param=key)
    temperature = body.get("temperature")
    if temperature is not None and not (_is_number(temperature) and 0 <= temperature <= 2):
        raise GatewayError(f"temperature={temperature!r} is outside 0 to 2", param="temperature")
    if body.get("n") not in (None, 1):
        raise GatewayError(f"n={body['n']!r} is not served; send n requests of n=1", param="n")
    if body.get("stream") not in (None, True, False):
        raise GatewayError(f"stream={body['stream']!r} is neither true nor false", param="stream")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _turn(
    body: dict[str, Any],
    identity: Identity,
    place: Place,
    response_id: str,
    reply: Message,
    finish_reason: str,
    finished: Finished,
    arrived: float,
) -> Turn:
    messages = body["messages"]
    return Turn(
        id=response_id,
        user=identity.user,
        session=place.session,
        index=place.index,
        kind=identity.kind,
        source=identity.source,
        group=identity.group,
        messages=tuple(messages),
        tools=tuple(body.get("tools") or ()),
        template=dict(body.get("chat_template_kwargs") or {}),
        reply=reply,
        finish_reason=finish_reason,
        conversation=digest([*messages, reply]),
        capture=finished.capture,
        started=arrived,
        ended=time.time(),
        request=request_digest(body),
        key=identity.key,
    )
