"""Streamed throughput through the gateway against the same engine called directly, in the same process, side by side.

    through: client ─HTTP─► proxy ─► gateway ─► policy.chat ─► engine        (SSE, capture on, journalled)
    plain:                             policy.generate_directly ─► engine     (AsyncLLM.generate, deltas)
    logprobs:                          the same, with the log-probabilities that the capture asks for

Each round runs the three on the same fresh prompts, one after the other, in an order that turns round; the ratios are
medians over the rounds. A stream asks for its next reply when it has the one before, so that as many are open all the
time (`--in-turn 1`: all begin at once and each ends by itself). A direct call is given token ids and its reader is the
loop itself; the client of the gateway is a process of its own on the same cores, and counts.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from clawrl.config import Config
from clawrl.serving.policy import Policy
from jobs.bench import client, processes
from jobs.bench.figures import Figure, Stream, median_ratio, percentile, spread, throughput
from jobs.bench.stage import Stage, stage

STREAMS = (1, 16)
GOAL = 0.85
KINDS = ("plain", "through", "logprobs")


class DirectPolicy(Policy):
    """The product's policy replica, whose engine can also be called without anything of ours on the way."""

    async def generate_directly(
        self, asked: Sequence[Sequence[client.Conversation]], num_tokens: int, logprobs: bool
    ) -> list[Stream]:
        """Replies of exactly `num_tokens` tokens: to each list of conversations one after the other, to all lists at
        the same time."""
        prompts = [[await self._engine.render(messages, (), {}) for messages in each] for each in asked]
        return await client.side_by_side(prompts, lambda prompt: self._direct(prompt, num_tokens, logprobs))

    async def _direct(self, prompt: list[int], num_tokens: int, logprobs: bool) -> Stream:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=num_tokens,
            ignore_eos=True,
            temperature=1.0,
            output_kind=RequestOutputKind.DELTA,
            logprobs=self._settings.support if logprobs else None,
            flat_logprobs=logprobs,
        )
        request = uuid.uuid4().hex  # also the cache's salt: every prompt is computed
        started, arrivals, num = time.time(), [], 0
        async for output in self._engine._llm.generate(
            {"prompt_token_ids": prompt, "cache_salt": request}, params, request
        ):
            arrivals.append(time.time())
            num += len(output.outputs[0].token_ids)
        return Stream(started, tuple(arrivals), arrivals[0], time.time(), num)


def conversations(round_: int, streams: int, in_turn: int) -> list[list[client.Conversation]]:
    """For each stream fresh first messages, none a prefix of another beyond the template."""
    return [[_question(f"{round_}.{i}.{turn}", i, round_ + turn) for turn in range(in_turn)] for i in range(streams)]


def _question(name: str, red: int, green: int) -> client.Conversation:
    return [{"role": "user", "content": f"{name}: there are {red} red and {green} green apples. How many in all?"}]


def measure(config: Config, *, rounds: int, num_tokens: int, in_turn: int) -> tuple[list[Figure], dict[str, Any]]:
    with stage(config, DirectPolicy) as running:
        return asyncio.run(_measure(running, rounds, num_tokens, in_turn))


async def _measure(running: Stage, rounds: int, num_tokens: int, in_turn: int) -> tuple[list[Figure], dict[str, Any]]:
    figures: list[Figure] = []
    details: dict[str, Any] = {"tokens_per_reply": num_tokens, "replies_in_turn": in_turn, "rounds": rounds}
    async with client.session() as http:
        for streams in STREAMS:
            runs, cores = await _rounds(running, http, streams, rounds, num_tokens, in_turn)
            figures += _figures(streams, runs)
            details[f"tokens_per_s_{streams}"] = {kind: [throughput(run) for run in runs[kind]] for kind in KINDS}
            details[f"cores_{streams}"] = cores
    return figures, details


async def _rounds(
    running: Stage, http: Any, streams: int, rounds: int, num_tokens: int, in_turn: int
) -> tuple[dict[str, list[list[Stream]]], dict[str, dict[str, float]]]:
    """The streams of each kind, round by round, and how many cores each process kept busy meanwhile."""

    async def run(kind: str, asked: list[list[client.Conversation]]) -> list[Stream]:
        if kind == "through":
            return await client.stream_all(http, running.url, asked, num_tokens)
        return await running.policy.generate_directly.remote(asked, num_tokens, kind == "logprobs")

    runs: dict[str, list[list[Stream]]] = defaultdict(list)
    spent: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in KINDS}
    seconds: dict[str, float] = defaultdict(float)
    for round_ in range(rounds + 1):
        asked = conversations(round_, streams, in_turn)
        for kind in KINDS if round_ % 2 else KINDS[::-1]:
            meter, started = processes.Meter(), time.time()
            found = await run(kind, asked)
            took = time.time() - started
            used = meter.stop()
            require_whole(found, num_tokens, kind)
            if round_:  # the first one warms up
                runs[kind].append(found)
                seconds[kind] += took
                for name, busy in used.items():
                    spent[kind][name] += busy
    cores = {
        kind: {
            name: round(busy / seconds[kind], 3) for name, busy in sorted(spent[kind].items(), key=lambda at: -at[1])
        }
        for kind in KINDS
    }
    return runs, cores


def require_whole(found: Sequence[Stream], num_tokens: int, kind: str) -> None:
    """Raises RuntimeError if a reply broke off."""
    broken = [stream for stream in found if stream.error or stream.num_tokens != num_tokens]
    if broken:
        raise RuntimeError(f"{len(broken)} of {len(found)} streams ({kind}) are not whole: {broken[0].error}")


def _figures(streams: int, runs: dict[str, list[list[Stream]]]) -> list[Figure]:
    rates = {kind: [throughput(run) for run in runs[kind]] for kind in KINDS}
    low, high = spread(rates["through"], rates["plain"])
    at = f"at {streams}"
    figures = [
        Figure(f"through / plain {at}", median_ratio(rates["through"], rates["plain"]), at_least=GOAL),
        Figure(f"  lower quartile {at}", low),
        Figure(f"  upper quartile {at}", high),
        Figure(f"through / logprobs {at}", median_ratio(rates["through"], rates["logprobs"])),
        Figure(f"logprobs / plain {at}", median_ratio(rates["logprobs"], rates["plain"])),
    ]
    for kind in KINDS:
        waits = [1000 * (stream.first - stream.started) for run in runs[kind] for stream in run]
        chunks = [stream.num_tokens / len(stream.arrivals) for run in runs[kind] for stream in run]
        figures += [
            Figure(f"{kind} {at}", percentile(rates[kind], 0.5), "tokens/s"),
            Figure(f"{kind} first token {at}, median", percentile(waits, 0.5), "ms"),
            Figure(f"{kind} first token {at}, p95", percentile(waits, 0.95), "ms"),
            Figure(f"{kind} chunk {at}", sum(chunks) / len(chunks), "tokens"),
        ]
    return figures
