"""From a correction to a better reply: how long until somebody hears from a version that learnt from what they said.

    question ─► reply ─► correction (the clock starts) ─► judged ─► sampled ─► trained ─► gated ─► swapped ─► a reply

One person talks to the whole system, as `clawrl serve` starts it; nobody else. Batches are as small as they may be
(`buffer.min_batch`, set to 1 here where the config says nothing), and no session is held out, since such never train.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from clawrl.config import Config
from clawrl.errors import ClawrlError
from clawrl.journal.store import JournalReader
from clawrl.main import System, journal_url
from jobs.bench import client
from jobs.bench.figures import Figure, percentile

CORRECTION = "That is too formal for me. Please say it more casually."
PATIENCE_S = 120.0
REPLY_TOKENS = 96
EVERY_S = 0.05
Found = TypeVar("Found")


def measure(config: Config, *, corrections: int) -> tuple[list[Figure], dict[str, Any]]:
    """Raises ClawrlError if no version learns from a correction in time."""
    least = {"min_batch": 1, "max_wait_s": 0.0} if config.buffer.min_batch is None else {}
    config = config.model_copy(
        update={
            "run": "new",
            "buffer": config.buffer.model_copy(update=least),
            "gate": config.gate.model_copy(update={"held_out_share": 0.0}),
        }
    )
    system = System.start(config, lambda line: print(f"bench: {line}", flush=True))
    try:
        journal = JournalReader(journal_url(config, system.run_directory))
        served, answered = asyncio.run(_corrections(system.url, journal, corrections))
    finally:
        system.stop()
    figures = [
        Figure("correction to the swap, median", percentile(served, 0.5), "s"),
        Figure(
            "correction to the first reply by a version that learnt from it, median", percentile(answered, 0.5), "s"
        ),
        Figure("the same, p95", percentile(answered, 0.95), "s"),
    ]
    return figures, {"served_s": served, "answered_s": answered, "buffer": config.buffer.model_dump()}


async def _corrections(url: str, journal: JournalReader, number: int) -> tuple[list[float], list[float]]:
    """Seconds to the swap and to the reply, of each correction but the first, which warms up."""
    served, answered = [], []
    async with client.session() as http:
        for at in range(number + 1):
            messages = [{"role": "user", "content": f"I have {at + 2} apples and buy 3 more. How many do I have?"}]
            turn, reply = await client.reply(http, url, messages, max_tokens=REPLY_TOKENS)
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": CORRECTION}]
            began = time.time()
            await client.reply(http, url, messages, max_tokens=REPLY_TOKENS)
            version = await _until(lambda turn=turn: _learnt(journal, turn))
            swapped = await _until(lambda version=version: _swapped(journal, version))
            by = -1
            while by < version:
                id, _ = await client.reply(http, url, messages[:1], {"X-Turn-Type": "side"}, max_tokens=REPLY_TOKENS)
                said = journal.turn(id)
                by = -1 if said is None else said.capture.versions[0].version
            if at:
                served.append(swapped - began)
                answered.append(time.time() - began)
    return served, answered


def _learnt(journal: JournalReader, turn: str) -> int | None:
    """The version that learnt from a turn."""
    return next((version.number for version in journal.versions() if turn in version.samples), None)


def _swapped(journal: JournalReader, version: int) -> float | None:
    """When it, or one after it, was taken up."""
    return min((swap.at for swap in journal.swaps() if swap.version >= version), default=None)


async def _until(found: Callable[[], Found | None]) -> Found:
    deadline = time.monotonic() + PATIENCE_S
    while (what := found()) is None:
        if time.monotonic() > deadline:
            raise ClawrlError(f"no version learnt from a correction within {PATIENCE_S:g} s")
        await asyncio.sleep(EVERY_S)
    return what
