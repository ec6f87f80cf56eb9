"""One vLLM engine inside a replica: started from a section, asked to generate, to score, to follow versions.

Knows vLLM. Ignores HTTP, sessions, judging and training. `Engine` wraps AsyncLLM and is itself the engine client
that vLLM's OpenAI serving classes talk to, so that every reply they stream passes `generate` here and is captured.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from clawrl.config import EngineSection, LoraSection, model_path
from clawrl.errors import PolicyError, boundary
from clawrl.serving.capture import Recorder
from clawrl.types import GROUP, Canary, Message, Scores, ScoringWeights, Tool

log = logging.getLogger(__name__)

CHUNK_RATE = 160.0  # streamed chunks a second, all streams of a CPU engine together: they share its cores
GPU_CHUNK_RATE = 1000.0
ENGINE_CHECK_S = 0.2
BEHIND = 1
"""Priority of what no person waits for, in an engine that also answers people (theirs is 0)."""
UNLOAD_AFTER_S = 5.0
"""An adapter that no request asks for any more may still be in the engine's last steps; it goes when they are over."""
CHUNK_INTERVAL_S = 0.02  # between two chunks of one stream at least; tokens in between share a chunk


@dataclass(slots=True, eq=False)
class Adapter:
    """A version as an adapter in the engine, under a name that no other ever has there."""

    version: int
    request: Any  # vLLM's LoRARequest
    folder: Path
    requests: int = 0  # in work
    current: bool = False  # somebody's new requests are answered with it, or scored by it


class Engine:
    """AsyncLLM with capture, scoring and swaps. Attributes it does not define are AsyncLLM's.

    A version is what the engine's weights are (`take_over`), or an adapter beside them (`add_adapter`, `switch`):
    everyone's, or a user's own, whose requests it answers alone. A request keeps the adapter that it began with; an
    adapter leaves the engine when its last request has ended.
    """

    def __init__(
        self, llm: Any, renderer: Any, settings: EngineSection, support: int, adapters_in_batch: int = 0
    ) -> None:
        self._llm = llm
        self.online_renderer = renderer
        self._settings = settings
        self._support = support
        self._recorders: dict[str, Recorder] = {}
        self._askers: dict[str, str] = {}  # users by the request that is captured
        self._captured: dict[str, tuple[Recorder, bool]] = {}  # and whether the client sees log-probabilities too
        self._chunk_rate = CHUNK_RATE if settings.gpus_per_replica == 0 else GPU_CHUNK_RATE
        self._register = llm.output_processor.add_request
        llm.output_processor.add_request = self._register_captured
        self.max_model_len = settings.max_model_len
        self.streams = 0
        self._salt = f"v0-{uuid.uuid4().hex}"
        self._weights = 0  # the version that the weights alone are
        self._current: dict[str, Adapter] = {}  # of new requests, by scope; none: the weights alone
        self._averages: dict[str, Adapter] = {}  # the moving averages that go with them
        self._adapters = count(1)  # vLLM's numbers for them
        self._in_batch = adapters_in_batch
        self._asked: set[Adapter] = set()  # those that requests hold
        self._let_go = asyncio.Event()
        self._unloading: set[asyncio.Task[None]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    @property
    def version(self) -> int:
        """Of new requests of those who have no policy of their own."""
        adapter = self.adapter(GROUP)
        return self._weights if adapter is None else adapter.version

    def adapter(self, user: str) -> Adapter | None:
        """Of a user's new requests; None: the weights alone."""
        return self._current.get(user) or self._current.get(GROUP)

    def _scoring(self, weights: ScoringWeights, user: str) -> Adapter | None:
        """An average begins with its policy: before there is one, it is the policy itself."""
        if weights == "frozen":
            return None
        average = self._averages.get(user if user in self._current else GROUP)
        return average if weights == "ema" and average is not None else self.adapter(user)

    # -- generating, captured ------------------------------------------------------------------------------------

    def record(self, request_id: str, user: str = GROUP) -> Recorder:
        """Capture the request that will arrive under this id; the caller reads the recorder when it has ended."""
        recorder = Recorder(self._support)
        self._recorders[request_id], self._askers[request_id] = recorder, user
        return recorder

    def forget(self, request_id: str) -> None:
        """The request is over, or never reached the engine."""
        self._recorders.pop(request_id, None)
        self._askers.pop(request_id, None)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """AsyncLLM.generate by the user's version of the moment, with the capture's log-probabilities."""
        from clawrl.serving.scheduler import KEEP_BACK

        recorder = self._recorders.pop(request_id, None)
        first = f"{request_id.rpartition('-')[0]}-0"  # of several prompts, which is the one captured
        adapter = self.adapter(self._askers.get(request_id) or self._askers.get(first, GROUP))
        if recorder is not None:
            recorder.version = adapter and adapter.version
            shown = sampling_params.logprobs is not None
            self._captured[request_id] = recorder, shown
            sampling_params.logprobs = max(sampling_params.logprobs or 0, self._support)
            # A stop string is found outside the engine, which then sends no last message with what was kept.
            kept = not shown and not sampling_params.stop
            sampling_params.extra_args = {**(sampling_params.extra_args or {}), KEEP_BACK: kept}
        prompt["cache_salt"] = f"{self._salt}{prompt.get('cache_salt') or ''}"
        self.streams += 1
        try:
            with self._held(adapter) as adapted:
                generating = self._llm.generate(prompt, sampling_params, request_id, **{**options, **adapted})
                async with aclosing(generating) as outputs:
                    async for output in outputs:
                        if recorder is not None:
                            recorder.add(output)
                        yield output
        finally:
            self.streams -= 1
            self._captured.pop(request_id, None)

    async def generate_initial(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """What the weights without an adapter say; captured requests go first."""
        prompt["cache_salt"] = self._salt
        async with aclosing(self._llm.generate(prompt, sampling_params, request_id, priority=BEHIND)) as outputs:
            async for output in outputs:
                yield output

    def _register_captured(self, request: Any, prompt: Any, parent: Any, index: int, queue: Any) -> None:
        """vLLM's OutputProcessor.add_request: captured requests are paced, their log-probabilities go to the recorder.

        They go as the engine sends them. vLLM would decode k + 1 tokens of each position to text and build objects,
        slice and merge them for each output: more work than all else it does with a token in this process.
        """
        recorder, shown = self._captured.get(request.external_req_id, (None, False))
        if recorder is None or index:  # of several choices the first is captured
            self._register(request, prompt, parent, index, queue)
            return
        self._register(request, prompt, parent, index, ChunkQueue(queue, self._chunk_interval))
        processor = self._llm.output_processor.request_states[request.request_id].logprobs_processor
        show = processor._update_sample_logprobs

        def take(rows: Any) -> None:
            recorder.add_logprobs(rows)
            if shown:
                show(rows)

        processor._update_sample_logprobs = take

    def _chunk_interval(self) -> float:
        return max(CHUNK_INTERVAL_S, self.streams / self._chunk_rate)

    # -- scoring given tokens --------------------------------------------------------------------------------------

    async def render(self, messages: Sequence[Message], tools: Sequence[Tool], template: dict[str, Any]) -> list[int]:
        """Prompt ids of a conversation, ready for the assistant's reply, exactly as the chat API would render it.

        Raises PolicyError if the model's template refuses it.
        """
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

        request = ChatCompletionRequest(
            messages=list(messages),  # type: ignore[arg-type]
            tools=list(tools) or None,  # type: ignore[arg-type]
            tool_choice="none",  # shown to the template, no parser needed
            chat_template_kwargs=template or None,
        )
        with boundary(PolicyError, "cannot render the conversation"):
            rendered = await self.online_renderer.render_chat(request)
        if not isinstance(rendered, tuple):
            raise PolicyError(f"cannot render the conversation: {rendered.error.message}")
        return list(rendered[1][0]["prompt_token_ids"])

    async def score(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        top: int,
        *,
        weights: ScoringWeights = "current",
        user: str = GROUP,
    ) -> Scores:
        """Log-probabilities of `completion_ids` [T] after `prompt_ids`, with the `top` best tokens at each position.

        By the user's version of the moment, by its moving average, or by the weights without any adapter (`frozen`).
        Raises PolicyError if both together leave no room in the context.
        """
        return await self._score_with(self._scoring(weights, user), prompt_ids, completion_ids, top)

    async def _score_with(
        self,
        adapter: Adapter | None,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        top: int,
        priority: int = BEHIND,
    ) -> Scores:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        token_ids = [int(token) for token in (*prompt_ids, *completion_ids)]
        limit = self._settings.max_model_len - 1
        if len(token_ids) > limit or not len(prompt_ids):
            raise PolicyError(f"cannot score {len(token_ids)} tokens; between a prompt of 1 and {limit} in all fit")
        version = self._weights if adapter is None else adapter.version
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=top,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        flat = None
        prompt = {"prompt_token_ids": token_ids, "cache_salt": self._salt}
        with self._held(adapter) as adapted:
            async for output in self._llm.generate(
                prompt, params, f"score-{uuid.uuid4().hex}", priority=priority, **adapted
            ):
                flat = output.prompt_logprobs
        return _scores(flat, len(prompt_ids), len(token_ids), top, version)

    async def canary_logprobs(self, canary: Canary, adapter: Adapter | None) -> tuple[np.ndarray, ...]:
        """Log-probabilities of the canary's tokens after the first of each sequence, by this adapter, or by none.

        It is asked in turn with people's requests: behind them it might wait for ever, where many adapters are in use.
        """
        asked = [self._score_with(adapter, ids[:1].tolist(), ids[1:].tolist(), 0, 0) for ids in canary.token_ids]
        return tuple(scores.logprobs for scores in await asyncio.gather(*asked))

    # -- health ------------------------------------------------------------------------------------------------------

    async def generates(self) -> None:
        """Return once the engine has generated a token; a caller with a deadline learns that it hangs."""
        from vllm import SamplingParams

        async for _ in self._llm.generate(
            {"prompt_token_ids": [1], "cache_salt": self._salt},
            SamplingParams(max_tokens=1),
            f"health-{uuid.uuid4().hex}",
        ):
            pass

    async def end_process_with_engine(self) -> None:
        """End this process when the engine's has ended: a replica that is gone is replaced sooner than a sick one."""
        while not self._llm.errored:  # noqa: ASYNC110 (vLLM sets a flag, no event)
            await asyncio.sleep(ENGINE_CHECK_S)
        log.error("event=engine_dead")
        os._exit(1)

    # -- versions ----------------------------------------------------------------------------------------------------

    async def join_store(self, address: str, namespace: str, store: str) -> None:
        """Let the engine's workers find the weight store, and label the weights it has as version 0."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        place = {"address": address, "namespace": namespace, "store": store}
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=place))

    async def take_over(self, version: int, num_buckets: int) -> float:
        """Swap the weights under the running requests, which stay where they are; returns the pause in ms.

        Requests that arrive from the pause on carry a new cache salt, so no block of older weights is reused.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        started = time.perf_counter()
        await self._llm.pause_generation(mode="keep", clear_cache=False)
        try:
            self._salt = f"v{version}-{uuid.uuid4().hex}"
            await self._llm.start_weight_update()
            await self._llm.update_weights(
                WeightTransferUpdateRequest(update_info={"version": version, "num_buckets": num_buckets})
            )
            await self._llm.finish_weight_update(str(version))
            self._weights = version
        finally:
            await self._llm.resume_generation()
        return 1000 * (time.perf_counter() - started)

    # -- versions as adapters ----------------------------------------------------------------------------------------

    async def add_adapter(self, version: int, folder: Path, *, patient: bool = True) -> Adapter:
        """Load the adapter in `folder` (PEFT's files) beside the weights; nobody is served by it yet.

        `patient`, it waits while long replies hold as many adapters as the engine can serve at once: else the version's
        first requests would. Where each user has one, that is so all the time.
        """
        from vllm.lora.request import LoRARequest

        while patient and len(self._asked) >= self._in_batch:
            self._let_go.clear()
            await self._let_go.wait()
        number = next(self._adapters)
        request = LoRARequest(f"v{version}-{uuid.uuid4().hex}", number, str(folder))
        await self._llm.add_lora(request)
        return Adapter(version, request, folder)

    def switch(self, adapter: Adapter | None, scope: str = GROUP, average: Adapter | None = None) -> None:
        """From now on new requests are answered with this adapter, everyone's or one user's; its average only scores.

        None: the user's with everyone's, everyone's with the weights alone.
        """
        for current, new in ((self._current, adapter), (self._averages, average)):
            before = current.pop(scope, None)
            if new is not None:
                current[scope] = new
                new.current = True
            if before is not None and before is not new:
                before.current = False
                self.unload_if_idle(before)

    @contextmanager
    def _held(self, adapter: Adapter | None) -> Iterator[dict[str, Any]]:
        """An adapter stays in the engine while a request asks for it; yields what to say to vLLM."""
        if adapter is None:
            yield {}
            return
        adapter.requests += 1
        self._asked.add(adapter)
        try:
            yield {"lora_request": adapter.request}
        finally:
            adapter.requests -= 1
            if not adapter.requests:
                self._asked.discard(adapter)
                self._let_go.set()
                self.unload_if_idle(adapter)

    def unload_if_idle(self, adapter: Adapter) -> None:
        """Let an adapter go that nobody is served by, nor will be; soon, and not at once (see UNLOAD_AFTER_S)."""
        if not adapter.requests and not adapter.current:
            task = asyncio.create_task(self._unload(adapter))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)

    async def _unload(self, adapter: Adapter) -> None:
        await asyncio.sleep(UNLOAD_AFTER_S)
        if adapter.requests or adapter.current or not adapter.folder.exists():
            return
        shutil.rmtree(adapter.folder)
        await self._llm.remove_lora(adapter.request.lora_int_id)
        log.info("event=adapter_unloaded version=%d", adapter.version)


class Scorer:
    """What judge and policy replicas share: an engine's life, and scoring the exact tokens of a reply."""

    _engine: Engine

    async def _adopt(self, engine: Engine) -> None:
        """Live with this engine from now on, and end with it."""
        self._engine = engine
        self._watching = asyncio.create_task(engine.end_process_with_engine())

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica whose engine generates nothing any more."""
        await self._engine.generates()

    async def score_ids(
        self,
        prompt_ids: np.ndarray,
        completion_ids: np.ndarray,
        top: int,
        *,
        weights: ScoringWeights = "current",
        user: str = GROUP,
    ) -> Scores:
        return await self._engine.score(prompt_ids.tolist(), completion_ids.tolist(), top, weights=weights, user=user)

    async def score_messages(
        self,
        messages: tuple[Message, ...],
        tools: tuple[Tool, ...],
        template: dict[str, Any],
        completion_ids: np.ndarray,
        top: int,
        *,
        weights: ScoringWeights = "current",
        user: str = GROUP,
    ) -> Scores:
        prompt_ids = await self._engine.render(messages, tools, template)
        return await self._engine.score(prompt_ids, completion_ids.tolist(), top, weights=weights, user=user)


class ChunkQueue:
    """Stands before one request's queue: outputs pass merged, at most one in an interval, the first and last at once.

    Each output on its way to a client passes several processes, so it costs far more than a token.
    """

    def __init__(self, queue: Any, interval: Callable[[], float]) -> None:
        self._queue, self._interval = queue, interval
        self._held: Any = None
        self._due = 0.0  # in the loop's time
        self._timer: asyncio.TimerHandle | None = None

    def put(self, output: Any) -> None:
        """Take an output, or the exception that ends the request."""
        if isinstance(output, Exception):
            self._pass_on()
            self._queue.put(output)
            return
        if self._held is None:
            self._held = output
        else:
            self._held.add(output, aggregate=self._queue.aggregate)
        loop = asyncio.get_running_loop()
        # Of several choices the last to end ends the request: what is held of another then comes too late.
        ended = output.finished or any(each.finish_reason for each in output.outputs)
        if ended or loop.time() >= self._due:
            self._pass_on()
        elif self._timer is None:
            self._timer = loop.call_at(self._due, self._pass_on)

    def _pass_on(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held is not None:
            held, self._held = self._held, None
            self._due = asyncio.get_running_loop().time() + self._interval()
            self._queue.put(held)


async def start_engine(
    settings: EngineSection,
    *,
    support: int = 0,
    weight_transfer: bool = False,
    lora: LoraSection | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> Engine:
    """Bring an engine up and warm, every path that will be used compiled. Takes half a minute on a CPU.

    Raises PolicyError naming the model when vLLM cannot load it.
    """
    arguments = engine_arguments(settings, weight_transfer=weight_transfer, lora=lora)
    from vllm import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM

    from clawrl.serving.scheduler import CapturingScheduler

    arguments.scheduler_cls = CapturingScheduler
    try:
        llm = AsyncLLM.from_engine_args(arguments)
    except Exception as error:
        raise PolicyError(f"vLLM cannot start model {settings.model!r}: {error}") from error
    await llm.update_weight_version("0")  # every sampled token carries a number, version 0 is the model as configured
    in_batch = 0 if lora is None else lora.in_batch
    engine = Engine(llm, _renderer(llm, tool_parser, reasoning_parser), settings, support, in_batch)
    engine.record("warm-up")
    async for _ in engine.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2), "warm-up"):
        pass
    await asyncio.gather(*(engine.score([1, 2], [3, 4], top) for top in (0, support)))
    return engine


def engine_arguments(settings: EngineSection, *, weight_transfer: bool = False, lora: LoraSection | None = None) -> Any:
    """vLLM's `AsyncEngineArgs` of a section; the environment is made as vLLM wants it, before it is imported."""
    _set_environment(settings)
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    from clawrl.serving.weight_transfer import BACKEND

    return AsyncEngineArgs(
        model=model_path(settings.model),
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        tensor_parallel_size=max(1, int(settings.gpus_per_replica)),
        # On a CPU vLLM gives the one worker a process of its own, and both spin while they wait for each other. A class
        # is not overruled so; vLLM's reason, the OpenMP settings, are in the environment already.
        distributed_executor_backend=UniProcExecutor if settings.gpus_per_replica == 0 else None,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_memory_bytes=int(settings.kv_cache_gib * 2**30) if settings.gpus_per_replica == 0 else None,
        enforce_eager=settings.enforce_eager,
        disable_log_stats=True,
        max_logprobs=128,
        # JSON without free white space: a schema allows it without end, and small models then write nothing else.
        structured_outputs_config=StructuredOutputsConfig(backend="xgrammar", disable_any_whitespace=True),
        weight_transfer_config={"backend": BACKEND} if weight_transfer else None,  # type: ignore[arg-type]
        **({} if lora is None else _lora_arguments(lora)),
    )


def _lora_arguments(lora: LoraSection) -> dict[str, Any]:
    return {
        "enable_lora": True,
        "max_lora_rank": max(8, lora.rank),
        "max_loras": lora.in_batch,
        "max_cpu_loras": lora.in_memory,
        "lora_target_modules": list(lora.targets),
        "scheduling_policy": "priority",
    }


def _renderer(llm: Any, tool_parser: str | None, reasoning_parser: str | None) -> Any:
    """vLLM's renderer of chat requests: templates, tools, content parts."""
    from vllm.renderers.online_renderer import OnlineRenderer

    renderer = OnlineRenderer(
        model_config=llm.model_config,
        renderer=llm.renderer,
        request_logger=None,
        chat_template=None,
        chat_template_content_format="auto",
        enable_auto_tools=tool_parser is not None,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )
    renderer.warmup()
    return renderer


def _scores(flat: Any, start: int, end: int, top: int, version: int) -> Scores:
    """Rows [start, end) of vLLM's flat prompt log-probabilities: the token itself first, then the top by rank."""
    first = np.asarray(flat.start_indices[start:end])
    width = np.asarray(flat.end_indices[start:end]) - first
    token_ids, logprobs = np.asarray(flat.token_ids), np.asarray(flat.logprobs, np.float32)
    ranked = np.where(width > top, first + 1, first)[:, None] + np.arange(top)
    return Scores(logprobs[first], token_ids[ranked].astype(np.int32), logprobs[ranked], version)


def _set_environment(settings: EngineSection) -> None:
    """What vLLM reads from the environment, set before it is imported; its processes inherit the niceness."""
    if settings.nice:
        os.nice(settings.nice)
    os.environ.update(
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    )
    if settings.gpus_per_replica == 0:
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(settings.threads))
        os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # else it rounds what weights in 4 bits are multiplied with, too
        if settings.enforce_eager:  # else vLLM compiles its samplers all the same, with g++, for half a minute
            os.environ["TORCHDYNAMO_DISABLE"] = "1"
