"""Whose turn is it? How long a request takes to find its conversation, by its content alone, among many open ones.

The time includes that the journal stores what followed the reply it found.

Knows `Placing` and a journal of its own, as the gateway has them. Ignores HTTP and engines: replies are made up.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from clawrl import main
from clawrl.config import PrivacySection
from clawrl.journal.actor import Journal
from clawrl.serving.placing import Placing
from clawrl.serving.sessions import digest, identify
from clawrl.testing import ScriptedPolicy
from jobs.bench.figures import Figure, percentile

SESSIONS, TURNS = 1000, 10
AT_MOST = 1.3


def measure(sessions: int = SESSIONS, turns: int = TURNS) -> tuple[list[Figure], dict[str, Any]]:
    """Every session has its turns, all in the same order, so that all are open. A first message looks nothing up, so
    the second turns are the first look-ups."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        main.join_ray()
        try:
            journal: Any = ray.remote(Journal).options(num_cpus=0, max_concurrency=1000)
            journal = journal.remote(f"sqlite:///{Path(folder) / 'journal.sqlite'}")
            spent = asyncio.run(_measure(journal, sessions, turns))
        finally:
            ray.shutdown()
    middles = [1000 * percentile(each, 0.5) for each in spent]
    name = f"look-up of {sessions} sessions"
    figures = [
        Figure(f"{name}, turn 2: median", middles[1], "ms"),
        Figure(f"{name}, turn {turns}: median", middles[-1], "ms"),
        Figure(f"{name}, turn {turns} to turn 2", middles[-1] / middles[1], at_most=AT_MOST),
    ]
    return figures, {"lookup_ms": middles}


async def _measure(journal: Any, sessions: int, turns: int) -> list[list[float]]:
    """Seconds of each look-up, turn by turn."""
    placing = Placing(journal, PrivacySection())
    try:
        made = ScriptedPolicy().turn([{"role": "user", "content": "?"}])
        talks: list[list[dict[str, str]]] = [[] for _ in range(sessions)]
        spent = []
        for number in range(turns):
            spent.append([])
            for at, talk in enumerate(talks):
                talk.append({"role": "user", "content": f"{at}.{number}: how many apples are left?"})
                identity = identify({}, {"messages": talk})
                started = time.perf_counter()
                place = await placing.place(list(talk), identity)
                spent[-1].append(time.perf_counter() - started)
                assert (place.index, place.parent is None) == (number, number == 0), place
                talk.append({"role": "assistant", "content": f"{at + number} are left."})
                turn = replace(
                    made, id=f"{at}-{number}", user=identity.user, session=place.session, index=place.index,
                    parent=place.parent, messages=tuple(talk[:-1]), reply=talk[-1], conversation=digest(talk),
                )  # fmt: skip
                await placing.keep(turn, place)
        return spent
    finally:
        placing.following.cancel()
