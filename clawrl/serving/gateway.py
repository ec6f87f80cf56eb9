"""The door: OpenAI's routes, one capture path for people and environments.

Knows HTTP, keys and who asks. Ignores engines and training; how a request is answered and captured is in `answering`,
where its turn stands in `placing`, each route's own shapes in `surfaces`.

    path's session ─► key ─► body ─► identity ─► sent before? replay it : answer it
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from clawrl.config import GatewaySection, PolicySection, PrivacySection
from clawrl.errors import ConfigError, GatewayError
from clawrl.observe import metric
from clawrl.serving import feedback, openapi, replay
from clawrl.serving.admin import Acts, act, require_local
from clawrl.serving.answering import Answering, Asked
from clawrl.serving.bodies import Scales, read_json
from clawrl.serving.keys import LOCAL_USER, Key, KeyRing, admit
from clawrl.serving.listener import ClientGone, InTurn, Listener
from clawrl.serving.local import why_not_local
from clawrl.serving.openapi import described
from clawrl.serving.placing import Placing
from clawrl.serving.prefix import Prefixed
from clawrl.serving.responses import Responses, items_before, items_of, referred
from clawrl.serving.sessions import Identity, identify, request_digest
from clawrl.serving.streams import EVENT_STREAM, NO_CACHE, refusal
from clawrl.serving.surfaces import DONE, Chat, Completions, Surface
from clawrl.types import Turn

log = logging.getLogger(__name__)

RETRY_WINDOW_S = 1800.0
"""How long after a reply the same request, marked as a client's retry, is taken for the same turn."""


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
        keys: KeyRing,
    ) -> None:
        self._settings, self._policy_settings = settings, policy_settings
        self._policy, self._journal = policy, journal
        self._status, self._admin, self._keys = status, admin, keys
        self._placing = Placing(journal, privacy)
        self._answering = Answering(settings, policy_settings, policy.options(stream=True), self._placing)
        self._scales = Scales()
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
        self._placing.following.cancel()
        await self._listener.close()

    # -- routes ------------------------------------------------------------------------------------------------------

    def _routes(self) -> Any:
        api = FastAPI(title="clawrl", docs_url=None, redoc_url=None)
        api.add_exception_handler(HTTPException, _no_route)
        api.get("/healthz", **described())(self.healthz)
        api.get("/status", **described())(self.status)
        api.get("/v1/models", **described(openapi.MODELS))(self.models)
        api.post(Chat.path, **openapi.reply(openapi.CHAT))(self.chat_completions)
        api.post(Completions.path, **openapi.reply(openapi.COMPLETION))(self.completions)
        api.post(Responses.path, **openapi.reply(openapi.RESPONSE))(self.responses)
        api.post("/v1/embeddings", **described())(self.embeddings)
        api.post("/v1/feedback", **described(openapi.STORED, body=openapi.FEEDBACK))(self.feedback)
        api.post("/v1/sessions/{session}/done", **described(openapi.ENDED))(self.end_session)
        api.post("/admin/{name}", **described(body=openapi.ACT))(self.administer)
        return Prefixed(InTurn(api))

    async def healthz(self) -> Response:
        """200 once a policy replica answers."""
        try:
            policy = await self._policy.status.remote()
        except Exception as error:
            return refusal(GatewayError(f"no policy replica answers ({type(error).__name__})", status=503))
        return JSONResponse({"status": "ok", "version": policy["version"]})

    async def status(self, request: Request) -> Response:
        """Policy and judge replicas, versions, buffer and journal counts; for this machine, or with a key."""
        if why_not_local(_peer(request), request.headers) is not None:
            try:
                self._admit(request)
            except GatewayError as error:
                return refusal(error)
        names = list(self._status)
        calls = [getattr(handle, method).remote() for handle, method in self._status.values()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        shown = {
            name: {"error": str(answer)} if isinstance(answer, BaseException) else answer
            for name, answer in zip(names, answers, strict=True)
        }
        return JSONResponse({**shown, "gateway": {"waiting": self._answering.num_waiting}})

    async def models(self, request: Request) -> Response:
        try:
            self._admit(request)
        except GatewayError as error:
            return refusal(error)
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
            require_local(_peer(request), request.headers)
            arguments = await read_json(request, self._settings.max_body_mib)
            return JSONResponse(await act(self._admin, name, arguments))
        except GatewayError as error:
            return refusal(error)
        except Exception as error:
            log.exception("event=act_failed name=%s", name)
            failure = GatewayError(f"{name} failed ({type(error).__name__}); see the log of the run", status=500)
            return refusal(failure)

    async def chat_completions(self, request: Request) -> Response:
        return await self._guarded(request, lambda: self._serve(request, Chat()))

    async def completions(self, request: Request) -> Response:
        return await self._guarded(request, lambda: self._serve(request, Completions()))

    async def responses(self, request: Request) -> Response:
        return await self._guarded(request, lambda: self._serve(request, Responses()))

    async def embeddings(self, request: Request) -> Response:
        message = "embeddings are not served here; point the client's embedding model at a server that has one"
        return await self._guarded(request, lambda: _raise(GatewayError(message, status=404, code="not_served")))

    async def feedback(self, request: Request) -> Response:
        """What a user says of a turn: `turn` or `response_id`, or `session` for its last; `score`, `text` or both."""
        return await self._guarded(request, lambda: self._take_feedback(request))

    async def _take_feedback(self, request: Request) -> Response:
        key = self._admit(request)
        body = await read_json(request, self._settings.max_body_mib)
        identity = identify({}, {"user": body.get("user")}, None if key is None else key.user)
        opinion = feedback.read_opinion(body)
        return JSONResponse(await feedback.take(self._journal, self._placing.redactor, opinion, identity.user))

    async def end_session(self, session: str, request: Request) -> Response:
        """Nothing will follow the session's last turn; what clients may say too with `X-Session-Done`."""
        return await self._guarded(request, lambda: self._end(session, request))

    async def _end(self, session: str, request: Request) -> Response:
        key = self._admit(request)
        identity = identify({**request.headers, "x-session-id": session}, {}, None if key is None else key.user)
        turn = await self._placing.end(identity)
        return JSONResponse({"session": session, "turn": turn, "done": True})

    def _admit(self, request: Request) -> Key | None:
        """The key that a request carries, None where none are in use. Raises GatewayError."""
        try:
            return admit(self._keys, self._settings.anyone, _peer(request), request.headers)
        except ConfigError as error:
            log.error("event=keys_unreadable error=%s", error)
            raise GatewayError("the API keys cannot be read; tell whoever runs clawrl", status=503) from error

    async def _guarded(self, request: Request, serve: Callable[[], Awaitable[Response]]) -> Response:
        """What a route answers, every failure in OpenAI's shape."""
        metric("gateway/requests_num").inc()
        try:
            return await serve()
        except GatewayError as error:
            return refusal(error)
        except ClientGone:
            return Response(status_code=499)
        except Exception as error:
            metric("gateway/failures_num").inc()
            log.exception("event=request_failed path=%s", request.url.path)
            failure = GatewayError(f"the policy cannot answer now ({type(error).__name__}); try again", status=503)
            return refusal(failure)

    async def _serve(self, request: Request, surface: Surface) -> Response:
        arrived = time.time()
        key = self._admit(request)
        async with self._scales.weigh() as weight:
            body = await read_json(request, self._settings.max_body_mib, weight)
            return await self._serve_body(request, surface, body, key, arrived)

    async def _serve_body(
        self, request: Request, surface: Surface, body: dict[str, Any], key: Key | None, arrived: float
    ) -> Response:
        user = None if key is None else key.user
        if surface.path == Responses.path:
            await self._resolve(body, user)
        chat = surface.read(body, self._policy_settings)
        identity = identify(request.headers, chat, user)
        if surface.path == Completions.path:
            identity = replace(identity, kind="side", reason="a text goes on: nobody was asked")
        await self._placing.require_own(identity)
        earlier = await self._earlier(chat, identity)
        if earlier is not None and surface.path == Chat.path:
            return self._replayed(earlier, bool(body.get("stream")), body.get("stream_options") or {})
        if earlier is not None:
            identity = replace(identity, kind="side", key=None, reason=f"sent again: {earlier.id} answered it")
        who = identity.user if key is None else key.id
        asked = Asked(surface, body, chat, identity, who, arrived, uuid.uuid4().hex)
        return await self._answering.answer(asked, request)

    async def _resolve(self, body: dict[str, Any], user: str | None) -> None:
        """Put what `previous_response_id` and references to items stand for into the input. Raises GatewayError 404."""
        whose = user or str(body.get("user") or LOCAL_USER)
        given = body.get("input")
        if isinstance(given, list) and any(_is_reference(item) for item in given):
            body["input"] = [each for item in given for each in await self._items(item, whose)]
        id = body.pop("previous_response_id", None)
        if id is not None:
            turn = await self._answered(id, whose, "previous_response_id")
            given = body.get("input")
            items = given if isinstance(given, list) else [{"type": "message", "role": "user", "content": given}]
            body["input"] = [*items_before(turn), *items]

    async def _items(self, item: Any, whose: str) -> list[Any]:
        """An item of the input, or what it refers to."""
        if not _is_reference(item):
            return [item]
        found = referred(item)
        turn = await self._answered(found[0] if found else item.get("id"), whose, "input")
        return items_of(turn, *found[1:]) if found else []

    async def _answered(self, id: Any, whose: str, param: str) -> Turn:
        """The turn behind a response of this user's. Raises GatewayError 404."""
        turn = await self._journal.turn.remote(id) if isinstance(id, str) and "\x00" not in id else None
        if turn is None or turn.user != whose or not len(turn.capture.prompt_ids):
            message = f"there is no response or item {id!r} of yours; send the whole conversation as input"
            raise GatewayError(message, status=404, param=param)
        return turn

    # -- a request sent twice ------------------------------------------------------------------------------------------

    async def _earlier(self, chat: dict[str, Any], identity: Identity) -> Turn | None:
        """The recorded turn that this request repeats: by its key, or else, where it is a retry, by its content.

        One with secrets taken out is answered anew: its words are not what was said. So is who opted out since. Raises
        GatewayError if the key was used for another request.
        """
        opt_outs = self._placing.opt_outs
        if identity.opts_out or opt_outs.cover(identity.user, identity.session):
            return None
        found = await self._repeated(chat, identity)
        if found is None or opt_outs.cover(found.user, found.session) or not len(found.capture.prompt_ids):
            return None
        return found

    async def _repeated(self, chat: dict[str, Any], identity: Identity) -> Turn | None:
        if identity.key is not None:
            found = await self._journal.keyed_turn.remote(identity.key)
            if found is not None and found.request != request_digest(chat, identity.scope):
                raise GatewayError("Idempotency-Key was used for another request; send a new key", status=422)
            return found
        if not identity.retried:
            return None
        request, since = request_digest(chat, identity.scope), time.time() - RETRY_WINDOW_S
        return await self._journal.repeated_turn.remote(
            identity.user, request, since, identity.kind, identity.source, identity.group, identity.session
        )

    def _replayed(self, turn: Turn, stream: bool, options: dict[str, Any]) -> Response:
        model = self._policy_settings.served_name
        if not stream:
            return JSONResponse(replay.completion(turn, model))
        events = [*replay.events(turn, model, usage=bool(options.get("include_usage"))), DONE]
        return StreamingResponse(iter(events), media_type=EVENT_STREAM, headers=NO_CACHE)


def _is_reference(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "item_reference"


async def _raise(error: GatewayError) -> Response:
    raise error


def _peer(request: Request) -> str | None:
    return request.client.host if request.client else None


async def _no_route(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    status = getattr(error, "status_code", 500)
    message = f"{request.method} {request.url.path} is not served here"
    if status == 405:
        message = f"{message}; use another method"
    response = refusal(GatewayError(message, status=status))
    for name, value in (getattr(error, "headers", None) or {}).items():
        response.headers[name] = value
    return response
