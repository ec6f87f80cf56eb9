"""Experience distillation: what a whole session teaches, learnt by every one of its turns when it has ended.

Knows the journal's calls. Ignores how the judge reads a session and how a sample is built (`collector`).

    turn ─► judged ─► deferred ─┐                          ┌─► a sample of each deferred turn ─┐
                                ├─► the session has ended ─┤                                   ├─► journal.append
    turn ─► judged ─► deferred ─┘   (or is silent)         └─► its lesson, one per turn ───────┘   (all at once)

A turn is deferred in the transaction that stores its judgement, and no longer in the one that stores its lesson and its
sample: once, whoever is killed between them. A session that goes on after its end teaches its new turns anew, from all
that was said in it; those that have learnt have learnt.

A session without its last turn: nothing followed that one, so it is judged, and learns, only where the client said that
the session is over, or something was said of it (`POST /v1/feedback`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from clawrl.types import Judgement, Lesson, NextState, Sample, Turn

log = logging.getLogger(__name__)

SESSIONS, POLL_S = 8, 1.0
"""Distilled side by side, and the pause before it is asked for more."""

Exchange = tuple[Turn, NextState | None, Judgement | None, bool]
"""A turn, what followed it, how it was judged, and whether its sample waits."""


class Distiller:
    """Distils sessions for ever.

    `write` has the judge read a session; it raises if there is no answer. `teach` makes a turn's sample from its
    judgement and what its session taught (None: nothing), or none.
    """

    def __init__(
        self,
        journal: Any,
        idle_s: float,
        insist: Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]],
        write: Callable[[Sequence[Exchange]], Awaitable[str | None]],
        teach: Callable[[Turn, Judgement, str | None], Awaitable[Sample | None]],
    ) -> None:
        self._journal, self._idle_s, self._insist, self._write, self._teach = journal, idle_s, insist, write, teach
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        while True:
            ask = partial(self._journal.sessions_to_distil.remote, time.time() - self._idle_s, SESSIONS)
            found = await self._insist(ask)
            await asyncio.gather(*(self._distil(user, session) for user, session in found))
            if len(found) < SESSIONS:
                await asyncio.sleep(POLL_S)

    async def _distil(self, user: str, session: str) -> None:
        exchanges: list[Exchange] = await self._insist(partial(self._journal.exchanges.remote, user, session))
        text, failure = None, None
        try:
            text = _storable(await self._write(exchanges))
        except Exception as error:
            log.warning("event=lesson_failed session=%s error=%s", session, type(error).__name__)
            failure = _storable(str(error))
        waiting = [(turn, judgement) for turn, _, judgement, waits in exchanges if waits and judgement is not None]
        samples = await asyncio.gather(*(self._teach(turn, judgement, text) for turn, judgement in waiting))
        lessons = [Lesson(turn.id, text, failure, time.time()) for turn, _ in waiting]
        made = [sample for sample in samples if sample is not None]
        await self._insist(partial(self._journal.append.remote, *lessons, *made))
        self.counts.update(sessions=1, lessons=text is not None, failures=failure is not None, samples=len(made))


def _storable(text: str | None) -> str | None:
    """Without a NUL and half surrogate pairs, which models write and databases refuse."""
    return text and text.replace("\x00", " ").encode("utf-8", "replace").decode()
