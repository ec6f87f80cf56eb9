"""What the gateway costs a client: against the same engine behind vLLM's own OpenAI server, and LiteLLM's proxy there.

    clawrl:   client ─HTTP─► gateway ─► policy ─► engine          (sessions, capture, journal)
    vllm:     client ─HTTP─► vLLM's own server ─► engine
    litellm:  client ─HTTP─► LiteLLM's proxy ─HTTP─► vLLM's own server ─► engine

Then, apart from these, how a request finds its session among many (`sessions`).

All stand on this machine at once, and are asked one after the other, round by round, in an order that turns round; who
is not asked has nothing to do. Added times and ratios are medians of pairs of a round. LiteLLM lives in a virtual
environment of its own under the run root, made once.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from clawrl.config import Config
from clawrl.errors import ClawrlError
from jobs import free_port
from jobs.bench import client, sessions
from jobs.bench.figures import Figure, Stream, median_ratio, percentile, spread, throughput
from jobs.bench.programs import program
from jobs.bench.serving import conversations, require_whole
from jobs.bench.stage import stage

LITELLM = "litellm[proxy]==1.106.12"
STREAMS = (1, 16, 64)
ADDED_MS = 6.0
SHARE = 0.9


def measure(
    config: Config, options: Sequence[str], *, rounds: int, num_tokens: int, in_turn: int, litellm: bool
) -> tuple[list[Figure], dict[str, Any]]:
    """`options` are the command line's words for the config. Raises ClawrlError if a server does not come up."""
    with ExitStack() as servers:
        bare = servers.enter_context(_vllm(options))
        urls = {"clawrl": "", "vllm": bare}
        if litellm:
            urls["litellm"] = servers.enter_context(_litellm(Path(config.run_root).resolve(), bare))
        urls["clawrl"] = servers.enter_context(stage(config)).url
        figures, details = asyncio.run(_measure(urls, rounds, num_tokens, in_turn))
    found, spent = sessions.measure()
    return [*figures, *found], {**details, **spent}


@contextmanager
def _vllm(options: Sequence[str]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "jobs.bench.bare", str(port), *options]
    patient = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}  # else LiteLLM asks over connections that were just closed
    with program(command, f"http://127.0.0.1:{port}/health", {**os.environ, **patient}):
        yield f"http://127.0.0.1:{port}/v1"


@contextmanager
def _litellm(root: Path, behind: str) -> Iterator[str]:
    folder, port = root / "bench-litellm", free_port()
    python, settings = folder / "bin" / "python", folder / "proxy.json"
    if not settings.exists():
        print(f"bench: installing {LITELLM} into {folder.name}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        asked = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITELLM]
        if subprocess.run(asked).returncode:
            raise ClawrlError(f"{LITELLM} cannot be installed; leave it out with --no-litellm")
    there = {"model": "hosted_vllm/clawrl", "api_base": behind, "api_key": "none"}
    settings.write_text(json.dumps({"model_list": [{"model_name": "clawrl", "litellm_params": there}]}))
    command = [str(folder / "bin" / "litellm"), "--config", str(settings), "--host", "127.0.0.1", "--port", str(port)]
    alone = {  # it listens to this machine only
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "PYTHONPATH": "",
    }
    with program(command, f"http://127.0.0.1:{port}/health/liveliness", {**os.environ, **alone}):
        yield f"http://127.0.0.1:{port}/v1"


async def _measure(
    urls: dict[str, str], rounds: int, num_tokens: int, in_turn: int
) -> tuple[list[Figure], dict[str, Any]]:
    figures: list[Figure] = []
    details: dict[str, Any] = {"tokens_per_reply": num_tokens, "replies_in_turn": in_turn, "rounds": rounds}
    async with client.session() as http:
        for streams in STREAMS:
            runs: dict[str, list[list[Stream]]] = defaultdict(list)
            for round_ in range(rounds + 1):
                asked = conversations(round_, streams, in_turn)
                for kind in list(urls) if round_ % 2 else reversed(urls):
                    found = await client.stream_all(http, urls[kind], asked, num_tokens)
                    require_whole(found, num_tokens, kind)
                    if round_:  # the first one warms up
                        runs[kind].append(found)
            figures += _figures(streams, runs)
            details[f"tokens_per_s_{streams}"] = {kind: [throughput(run) for run in runs[kind]] for kind in urls}
            details[f"first_token_ms_{streams}"] = {kind: [_waits(run) for run in runs[kind]] for kind in urls}
    return figures, details


def _waits(run: Sequence[Stream]) -> list[float]:
    """Milliseconds to the first token, of each reply."""
    return [round(1000 * (stream.first - stream.started), 2) for stream in run]


def _figures(streams: int, runs: dict[str, list[list[Stream]]]) -> list[Figure]:
    at = f"at {streams}"
    waits = {kind: [wait for run in found for wait in _waits(run)] for kind, found in runs.items()}
    rates = {kind: [throughput(run) for run in found] for kind, found in runs.items()}
    figures = []
    for kind in (each for each in runs if each != "vllm"):
        ours = kind == "clawrl"
        added = {share: percentile(waits[kind], share) - percentile(waits["vllm"], share) for share in (0.5, 0.95)}
        low, high = spread(rates[kind], rates["vllm"])
        figures += [
            Figure(
                f"{kind} {at}: added to the first token, median",
                added[0.5],
                "ms",
                at_most=ADDED_MS if ours and streams == 1 else None,
            ),
            Figure(f"{kind} {at}: added to the first token, p95", added[0.95], "ms"),
            Figure(
                f"{kind} {at}: tokens/s of vLLM's own server",
                median_ratio(rates[kind], rates["vllm"]),
                at_least=SHARE if ours and streams > 1 else None,
            ),
            Figure(f"  lower quartile, {kind} {at}", low),
            Figure(f"  upper quartile, {kind} {at}", high),
        ]
    if "litellm" in runs:
        less = percentile(waits["clawrl"], 0.5) - percentile(waits["litellm"], 0.5)
        figures.append(Figure(f"clawrl {at}: first token after LiteLLM's, median", less, "ms", at_most=0.0))
        figures.append(
            Figure(f"clawrl {at}: tokens/s of LiteLLM's", median_ratio(rates["clawrl"], rates["litellm"]), at_least=1.0)
        )
    for kind in runs:
        figures += [
            Figure(f"{kind} {at}: first token, median", percentile(waits[kind], 0.5), "ms"),
            Figure(f"{kind} {at}: first token, p95", percentile(waits[kind], 0.95), "ms"),
            Figure(f"{kind} {at}: streamed", percentile(rates[kind], 0.5), "tokens/s"),
        ]
    return figures
