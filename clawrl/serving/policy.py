"""The policy replica: vLLM behind its own OpenAI serving classes, capturing every reply, following the versions.

Knows the engine and the weight store's calls (`wait`, `meet`, `bucket`, `report`). Ignores HTTP, sessions and the
journal: the gateway calls `chat` and gets the stream of server-sent events followed by what was captured. Of users it
knows the names, where they have policies of their own: whose name it hears first, it asks the store for.

    store.wait ──► fetch buckets ──► pause · load · resume ──► canary ──► store.report     all weights
                               └───► load beside ──► canary ──► switch ──► store.report    an adapter
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from clawrl.config import LoraSection, PolicySection
from clawrl.errors import PolicyError
from clawrl.observe import metric
from clawrl.serving.capture import Finished, Recorder, Refused
from clawrl.serving.engine import Adapter, Engine, Scorer, start_engine
from clawrl.serving.layers import Layer, layers
from clawrl.types import EMA, GROUP, Publication, Scores, Swap, Withdrawal

log = logging.getLogger(__name__)

WAIT_S = 30.0  # one long poll for the next version
RETRY_S = 1.0
KEPT_USERS = 1000
"""Whose versions a replica follows: those who asked last."""
MEET_S = 2.0
"""A user's first request waits so long for their own version, and is then answered by everyone's."""


@dataclass(frozen=True, slots=True)
class Adapters:
    """Versions are adapters: of which form, and the folder in which a machine keeps those that it serves."""

    lora: LoraSection
    folder: Path


class Policy(Scorer):
    """One replica. `store` is the weight store's handle and name, or None for weights that never change."""

    async def __init__(
        self, settings: PolicySection, store: tuple[Any, str] | None, adapters: Adapters | None = None
    ) -> None:
        context = ray.get_runtime_context()
        self.replica = context.get_actor_id() or "local"
        self._settings, self._adapters = settings, adapters
        engine = await start_engine(
            settings,
            support=settings.support,
            weight_transfer=store is not None and adapters is None,
            lora=None if adapters is None else adapters.lora,
            tool_parser=settings.tool_parser,
            reasoning_parser=settings.reasoning_parser,
        )
        await self._adopt(engine)
        self._layers = layers(self._engine, settings, _openai_chat(self._engine, settings))
        self._failure: Exception | None = None
        self._versions: dict[str, int | None] = {GROUP: 0}  # that are served, by scope; None: everyone's
        self._canaries: dict[str, tuple[np.ndarray, ...]] = {}  # what they last said of the canary
        self._personal = adapters is not None and adapters.lora.policy_scope != "group"
        self._taking_over: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)  # by scope
        self._meeting: dict[str, asyncio.Task[None]] = {}
        self._reporting: set[asyncio.Task[None]] = set()
        if store is not None:
            self._store, name = store
            if adapters is None:
                await self._engine.join_store(context.gcs_address, context.namespace, name)
            await self._follow(timeout_s=1.0)  # a late replica serves the latest version from its first reply
            self._following = asyncio.create_task(self._follow_for_ever())

    # -- what the gateway and the collector call -------------------------------------------------------------------

    async def chat(
        self, body: dict[str, Any], request_id: str, user: str = GROUP
    ) -> AsyncIterator[str | Refused | Finished]:
        """Answer one chat request: pieces of text, then Finished; or a single Refused.

        Streamed, the pieces are server-sent events without the final `[DONE]`; otherwise one piece is the JSON body.
        """
        async for piece in self._serve(self._layers["chat"], body, request_id, user):
            yield piece

    async def complete(
        self, body: dict[str, Any], request_id: str, user: str = GROUP
    ) -> AsyncIterator[str | Refused | Finished]:
        """The same for a text completion; of several prompts or choices the first is captured."""
        async for piece in self._serve(self._layers["complete"], body, request_id, user):
            yield piece

    async def respond(
        self, body: dict[str, Any], request_id: str, user: str = GROUP
    ) -> AsyncIterator[str | Refused | Finished]:
        """The same for a response."""
        async for piece in self._serve(self._layers["respond"], body, request_id, user):
            yield piece

    async def score_messages(self, *given: Any, user: str = GROUP, **named: Any) -> Scores:
        """As every engine's, by the user's own policy where users have any."""
        await self._meet(user)
        return await super().score_messages(*given, user=user, **named)

    async def _serve(
        self, layer: Layer, body: dict[str, Any], request_id: str, user: str
    ) -> AsyncIterator[str | Refused | Finished]:
        from pydantic import ValidationError
        from vllm.exceptions import VLLMClientError

        try:
            request = layer.request.model_validate({**body, "request_id": layer.named.format(request_id)})
        except ValidationError as error:
            yield _refused_validation(error)
            return
        except VLLMClientError as error:
            yield _refused(error)
            return
        await self._meet(user)
        captured = layer.captured.format(request_id)
        recorder = self._engine.record(captured, user)
        try:
            async for piece in self._answer(layer.create, request, recorder):
                yield piece
        finally:
            self._engine.forget(captured)

    async def _answer(
        self, create: Callable[[Any], Awaitable[Any]], request: Any, recorder: Recorder
    ) -> AsyncIterator[str | Refused | Finished]:
        try:
            answer = await create(request)
        except Exception as error:
            if self._engine.errored:  # this process is about to end, and the gateway asks another replica
                await asyncio.Event().wait()
            yield _refused(error)
            return
        if getattr(answer, "error", None) is not None:
            yield _refused(answer)
        elif not request.stream:
            yield answer.model_dump_json()
            yield recorder.finish()
        else:
            async for events in _joined(answer, recorder):
                yield events
            yield recorder.finish()

    async def status(self) -> dict[str, Any]:
        return {"replica": self.replica, "version": self._engine.version, "streams": self._engine.streams}

    async def check_health(self) -> None:
        """Asked by Serve; a replica whose engine hangs or whose weights are uncertain is replaced."""
        if self._failure is not None:
            raise PolicyError(f"replica {self.replica} cannot serve: {self._failure}")
        await super().check_health()

    # -- following the versions ------------------------------------------------------------------------------------

    async def _follow_for_ever(self) -> None:
        while self._failure is None:
            try:
                await self._follow(timeout_s=WAIT_S)
            except Exception as error:
                log.warning("event=follow_waits replica=%s error=%s", self.replica, type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def _follow(self, timeout_s: float) -> None:
        news: Publication | Withdrawal | None = await self._store.wait.remote(
            self.replica, dict(self._versions), timeout_s
        )
        if isinstance(news, Withdrawal):
            self._engine.switch(None, news.scope)
            self._canaries.pop(news.scope, None)
            self._versions[news.scope] = None
        elif news is not None:
            if news.scope != GROUP and news.scope in self._versions:  # the last to be told of, should this one fail
                self._versions[news.scope] = self._versions.pop(news.scope)
            if swap := await self._take_over(news):
                await self._report(swap)

    async def _meet(self, user: str) -> None:
        """A user asks: where users have versions of their own, theirs is served from their first request on."""
        if not self._personal or user == GROUP:
            return
        if user in self._versions:
            self._versions[user] = self._versions.pop(user)  # the last to be forgotten
        elif user not in self._meeting:
            self._meeting[user] = asyncio.create_task(self._get_to_know(user))
        if user in self._meeting:
            await asyncio.wait({self._meeting[user]}, timeout=MEET_S)

    async def _get_to_know(self, user: str) -> None:
        """Nobody is refused for want of their own version; it comes later then."""
        self._versions[user] = None
        try:
            publication = await self._store.meet.remote(self.replica, user)
            if publication is not None and (swap := await self._take_over(publication)):
                task = asyncio.create_task(self._report(swap))
                self._reporting.add(task)
                task.add_done_callback(self._reporting.discard)
        except Exception as error:
            log.warning("event=meet_failed replica=%s error=%s", self.replica, type(error).__name__)
        finally:
            del self._meeting[user]
        while len(self._versions) > KEPT_USERS + 1:
            users = [each for each in self._versions if each != GROUP]
            without = (each for each in users[:-1] if self._versions[each] is None)  # a crowd of names evicts nobody
            self._forget(next(without, users[0]))

    def _forget(self, user: str) -> None:
        self._engine.switch(None, user)
        del self._versions[user]
        self._canaries.pop(user, None)
        self._taking_over.pop(user, None)

    async def _report(self, swap: Swap) -> None:
        """Tell the store until it has taken it: a version that nobody reports never proves itself."""
        while True:
            try:
                return await self._store.report.remote(swap)
            except Exception as error:
                log.warning("event=report_waits replica=%s error=%s", self.replica, type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def _take_over(self, publication: Publication) -> Swap | None:
        """Serve another version; None if it is served already. What fails before the engine is touched is asked for
        again.
        """
        async with self._taking_over[publication.scope]:
            if self._versions.get(publication.scope) == publication.number:
                return None
            swap = await self._served(publication)
            self._versions[publication.scope] = publication.number
            return swap

    async def _served(self, publication: Publication) -> Swap:
        scope = publication.scope
        before = self._canaries.get(scope)
        if before is None:
            before = await self._engine.canary_logprobs(publication.canary, self._engine.adapter(scope))
        near: list[ray.ObjectRef] = []  # on this machine before anything is paused, and until the swap is over
        for index in range(publication.num_buckets):
            near += await self._store.bucket.remote(publication.number, index)
            await asyncio.to_thread(ray.wait, near[-1:], fetch_local=True)
        swap = self._swap_weights if self._adapters is None else self._switch_adapter
        after, stall_ms = await swap(publication, near)
        self._canaries[scope] = after
        near.clear()
        error, moved = _largest_gap(after, publication.canary.logprobs), _largest_gap(after, before)
        metric("policy/stall_s").observe(stall_ms / 1000)
        if scope == GROUP:
            metric("policy/version_num").set(publication.number)
        metric("policy/canary_error_nat").set(error)
        log.info(
            "event=swap version=%d stall_ms=%.1f canary_error=%.2g canary_moved=%.2g",
            publication.number,
            stall_ms,
            error,
            moved,
        )
        return Swap(publication.number, self.replica, stall_ms, error, moved, time.time())

    async def _swap_weights(self, publication: Publication, _: Any) -> tuple[tuple[np.ndarray, ...], float]:
        """Load the version into the engine, and ask it for the canary; returns that and the pause, ms.

        After a failure the weights are uncertain, and the replica is given up.
        """
        try:
            stall_ms = await self._engine.take_over(publication.number, publication.num_buckets)
            return await self._engine.canary_logprobs(publication.canary, None), stall_ms
        except Exception as error:
            log.exception("event=swap_failed replica=%s", self.replica)
            self._failure = error
            raise

    async def _switch_adapter(
        self, publication: Publication, buckets: Sequence[ray.ObjectRef]
    ) -> tuple[tuple[np.ndarray, ...], float]:
        """Load the version's adapter beside the others and ask it for the canary; then new requests get it, at once.

        So does its moving average, if it has one, which no request gets.
        """
        folders: list[Path] = []
        if publication.adapter is not None:
            folders = await asyncio.to_thread(self._write_adapters, publication, buckets)
        added: list[Adapter] = []
        try:
            for each in folders:
                added.append(await self._engine.add_adapter(publication.number, each, patient=not self._personal))
            adapter, average = [*added, None, None][:2]
            after = await self._engine.canary_logprobs(publication.canary, adapter)
        except BaseException:
            for each in added:
                self._engine.unload_if_idle(each)
            for each in folders[len(added) :]:
                shutil.rmtree(each, ignore_errors=True)
            raise
        self._engine.switch(adapter, publication.scope, average)
        return after, 0.0

    def _write_adapters(self, publication: Publication, buckets: Sequence[ray.ObjectRef]) -> list[Path]:
        """PEFT's files of a version and of its average, in new folders, for vLLM to read now and when it pages in."""
        import torch
        from safetensors.torch import save_file

        from clawrl.serving.weight_transfer import tensors

        assert self._adapters is not None
        found = {name: each for ref in buckets for name, each in tensors(ray.get(ref), torch.device("cpu"))}
        average = {name.removeprefix(EMA): found.pop(name) for name in list(found) if name.startswith(EMA)}
        folders: list[Path] = []
        try:
            for weights in (found, average) if average else (found,):
                folders.append(self._adapters.folder / f"{publication.number}-{uuid.uuid4().hex}")
                folders[-1].mkdir(parents=True)
                save_file(weights, folders[-1] / "adapter_model.safetensors")
                (folders[-1] / "adapter_config.json").write_text(json.dumps(publication.adapter), encoding="utf-8")
        except Exception:  # a full disk: it is tried again soon
            for each in folders:
                shutil.rmtree(each, ignore_errors=True)
            raise
        return folders


async def _joined(answer: AsyncIterator[str], recorder: Recorder) -> AsyncIterator[str]:
    """vLLM's server-sent events, those that come at the same time in one piece: role and first token, last and usage.

    Each piece is carried from process to process by itself. The final `[DONE]` is left out.
    """
    held, first = "", True
    async for event in answer:
        if not event.startswith("data: [DONE]"):
            held += event
        if not first and recorder.finish_reason is None and held:
            yield held
            held = ""
        first = False
    if held:
        yield held


def _largest_gap(left: Any, right: Any) -> float:
    return float(max(np.abs(a - b).max() for a, b in zip(left, right, strict=True)))


def _openai_chat(engine: Engine, settings: PolicySection) -> Any:
    """vLLM's own chat-completions handler over our engine: templates, tools, reasoning, deltas, errors."""
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    client: Any = engine
    models = OpenAIServingModels(
        engine_client=client,
        base_model_paths=[BaseModelPath(name=settings.served_name, model_path=settings.model)],
    )
    chat = OpenAIServingChat(
        client,
        models,
        "assistant",
        online_renderer=engine.online_renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=settings.tool_parser is not None,
        tool_parser=settings.tool_parser,
        reasoning_parser=settings.reasoning_parser or "",
        enable_prompt_tokens_details=True,
    )
    chat.default_sampling_params = {
        **chat.default_sampling_params,
        "temperature": settings.temperature,
        "max_tokens": settings.max_reply_tokens,
    }
    return chat


def _refused(error: Any) -> Refused:
    """vLLM's ErrorResponse, or an exception it would turn into one, in OpenAI's shape."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    response = error if hasattr(error, "error") else create_error_response(error)
    status = int(response.error.code)
    kind = "server_error" if status >= 500 else "not_found_error" if status == 404 else "invalid_request_error"
    code = "context_length_exceeded" if "maximum context length" in response.error.message else None
    body = {"message": response.error.message, "type": kind, "param": response.error.param, "code": code}
    return Refused(status, {"error": body})


def _refused_validation(error: Any) -> Refused:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    message = f"{where or 'request'}: {first['msg']}"
    return Refused(400, {"error": {"message": message, "type": "invalid_request_error", "param": where, "code": None}})
