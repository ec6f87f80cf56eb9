"""Groups of attempts at one task: held against one another when all have ended, and turned into samples together.

Pure but for `Comparer`, a loop that the collector runs beside its own. Knows episodes, turns and the journal's calls.
Ignores environments and how attempts were made (`pool`).

    journal.groups_to_compare ──► group: episodes, turns ──► one advantage per attempt ──► samples of all its turns
                                                                                 └──► journal.append (all at once)

A group is compared once. One whose attempts all went alike makes no sample: there is nothing to tell them apart by.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from clawrl.algorithms.advantages import group_advantages
from clawrl.config import LearningSection
from clawrl.observe import metric
from clawrl.rollout.samples import outcome_sample, trains
from clawrl.types import Comparison, Episode, Sample, Scores, Turn

GROUPS = 8
POLL_S = 10.0

Insist = Callable[[Callable[[], Awaitable[Any]]], Awaitable[Any]]
"""Repeats a call until it is answered."""


def attempt_advantages(episodes: Sequence[Episode]) -> dict[str, float]:
    """Advantage by session, for the attempts that have an outcome; empty where they cannot be told apart."""
    judged = [(episode.session, episode.outcome) for episode in episodes if episode.outcome is not None]
    advantages = group_advantages([outcome for _, outcome in judged])
    if advantages is None:
        return {}
    return {session: float(each) for (session, _), each in zip(judged, advantages, strict=True)}


def compare(
    episodes: Sequence[Episode],
    turns: Sequence[Turn],
    references: Mapping[str, Scores],
    learning: LearningSection,
    at: float,
) -> tuple[Comparison, list[Sample]]:
    """The comparison of a group, and the samples made of it; `references` by turn, where there are any."""
    advantages = attempt_advantages(episodes)
    found = (
        outcome_sample(turn, advantages[turn.session], references.get(turn.id), learning, at)
        for turn in turns
        if advantages.get(turn.session)
    )
    samples = [sample for sample in found if sample is not None]
    outcomes = tuple(episode.outcome for episode in episodes if episode.outcome is not None)
    first = episodes[0]
    return Comparison(first.group, first.source, first.task, outcomes, len(samples), at), samples


class Comparer:
    """Compares groups for ever. `refer` scores a turn's reply under the reference, or gives None."""

    def __init__(
        self, journal: Any, learning: LearningSection, insist: Insist, refer: Callable[[Turn], Awaitable[Scores | None]]
    ) -> None:
        self._journal, self._learning, self._insist, self._refer = journal, learning, insist, refer
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        after = 0
        while True:
            ask = partial(self._journal.groups_to_compare.remote, after, GROUPS, POLL_S)
            for seq, group in await self._insist(ask):
                await self._compare(group)
                after = max(after, seq)

    async def _compare(self, group: str) -> None:
        episodes, turns = await self._insist(partial(self._journal.group.remote, group))
        telling = attempt_advantages(episodes)
        references = {}
        if self._learning.kl_weight > 0:
            asked = [turn for turn in turns if telling.get(turn.session) and trains(turn)]
            scores = await asyncio.gather(*map(self._refer, asked))
            references = {turn.id: each for turn, each in zip(asked, scores, strict=True) if each is not None}
        comparison, samples = compare(episodes, turns, references, self._learning, time.time())
        await self._insist(partial(self._journal.append.remote, *samples, comparison))
        self.counts.update(groups=1, episodes=len(episodes), samples=len(samples), alike=not samples)
        if comparison.outcomes:
            metric("pool/outcome_score").set(float(np.mean(comparison.outcomes)))
