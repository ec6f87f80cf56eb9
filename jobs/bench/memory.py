"""Memory of the whole system while it does all of its work: serves, judges, trains and swaps.

Users converse with the product as `clawrl serve` starts it, until the time is over and a version has been trained.
Every process that descends from this one counts, this one too (it plays `clawrl serve` and the users). Proportional
memory divides shared pages among those who share them, so its sum is what the machine really gives; resident memory
counts them once for each.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import aiohttp

from clawrl.config import Config
from clawrl.main import System
from jobs.bench import client, processes
from jobs.bench.figures import Figure

GOAL_GB = 8.0
Reading = tuple[dict[str, int], dict[str, int]]
"""Bytes by part, proportional and resident."""

USERS = 16
EVERY_S = 3.0
FOLLOW_UPS = ("That is too formal for me. Please say it more casually.", "Better, thank you! And 3 more than that?")


def measure(config: Config, *, seconds: float) -> tuple[list[Figure], dict[str, Any]]:
    config = config.model_copy(update={"run": "new"})
    system = System.start(config, lambda line: print(f"bench: {line}", flush=True))
    try:
        readings, status = asyncio.run(_watch(system.url, seconds))
    finally:
        system.stop()
    proportional, resident = max(readings, key=lambda reading: sum(reading[0].values()))
    largest = sorted(proportional.items(), key=lambda part: -part[1])
    counts = status["journal"]
    figures = [
        Figure("proportional memory, highest sum", sum(proportional.values()) / 1e9, "GB", at_most=GOAL_GB),
        Figure("resident memory, highest sum", max(sum(r.values()) for _, r in readings) / 1e9, "GB"),
        *(Figure(f"  {part}", size / 1e9, "GB") for part, size in largest if size > 5e7),
        Figure("readings", len(readings)),
        *(Figure(f"{name} meanwhile", counts[name]) for name in ("turns", "judgements", "versions", "swaps")),
    ]
    return figures, {"proportional": proportional, "resident": resident}


async def _watch(url: str, seconds: float) -> tuple[list[Reading], dict[str, Any]]:
    """Readings of the memory while users converse, and the system's last word on itself."""
    readings: list[Reading] = []
    started = time.monotonic()
    async with client.session() as http:
        users = [asyncio.create_task(_converse(http, url, user)) for user in range(USERS)]
        try:
            while True:
                readings.append(await asyncio.to_thread(processes.memory))
                async with http.get(url.removesuffix("/v1") + "/status") as response:
                    status = await response.json()
                passed = time.monotonic() - started
                if passed > 5 * seconds or (passed > seconds and status["journal"]["swaps"] > 0):
                    return readings, status
                await asyncio.sleep(EVERY_S)
        finally:
            for user in users:
                user.cancel()
            await asyncio.gather(*users, return_exceptions=True)


async def _converse(http: aiohttp.ClientSession, url: str, user: int) -> None:
    """One conversation after the other, each with a follow-up for every reply, so that it is judged and trained."""
    number = 0
    while True:
        number += 1
        messages: list[dict[str, str]] = []
        for said in (f"I have {number} apples and buy {user} more. How many do I have?", *FOLLOW_UPS):
            messages.append({"role": "user", "content": said})
            _, reply = await client.reply(http, url, messages, max_tokens=96)
            messages.append({"role": "assistant", "content": reply})
