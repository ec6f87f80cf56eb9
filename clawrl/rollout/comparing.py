"""Groups of attempts at one task: held against one another when all have ended, and turned into samples together.

Pure but for `Comparer`, a loop that the collector runs beside its own. Knows episodes, turns and the journal's calls.
Ignores environments and how attempts were made (`pool`), and how a judge thinks.

    journal.groups_to_compare ─► group: episodes, turns ─► one advantage per attempt, all its turns alike ─► samples ─┐
                                       │                                                                ▲            │
                                       └─► process_weight > 0: votes on each step ─► one per step ──────┘            │
                                                                             journal.append (samples and comparison) ◄┘

A group is compared once. What its attempts (or steps of the same index) have all in common makes no sample: there is
nothing to tell them apart by. Votes are in the journal before they are used, so that nobody asks for them again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from clawrl.algorithms.advantages import RunningBaseline, group_advantages, step_advantages, step_reward
from clawrl.config import LearningSection
from clawrl.observe import metric
from clawrl.rollout.samples import outcome_sample, trains
from clawrl.types import Comparison, Episode, Judgement, NextState, Sample, Scores, Turn

log = logging.getLogger(__name__)

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


def outcome_advantages(episodes: Sequence[Episode], turns: Sequence[Turn]) -> dict[str, float]:
    """Advantage by turn, of those that train: what its attempt is worth."""
    attempts = attempt_advantages(episodes)
    return {turn.id: attempts[turn.session] for turn in turns if turn.session in attempts and trains(turn)}


def step_rewards(
    episodes: Sequence[Episode], steps: Sequence[Turn], judgements: Mapping[str, Judgement], weight: float
) -> list[float]:
    """What each step is worth: its attempt's outcome, which there must be, and the votes on it where there are any."""
    outcomes = {episode.session: episode.outcome for episode in episodes if episode.outcome is not None}
    votes = {turn: judgement.votes for turn, judgement in judgements.items()}
    return [step_reward(outcomes[turn.session], votes.get(turn.id, ()), weight) for turn in steps]


def process_advantages(steps: Sequence[Turn], rewards: Sequence[float], baseline: float) -> dict[str, float]:
    """Advantage by turn, of those that can be told from others at the same step."""
    advantages = step_advantages([(turn.index, reward) for turn, reward in zip(steps, rewards, strict=True)], baseline)
    return {turn.id: each for turn, each in zip(steps, advantages, strict=True) if each is not None}


def compare(
    episodes: Sequence[Episode],
    turns: Sequence[Turn],
    advantages: Mapping[str, float],
    references: Mapping[str, Scores],
    learning: LearningSection,
    at: float,
    reward: float | None = None,
) -> tuple[Comparison, list[Sample]]:
    """The comparison of a group, and the samples of those turns that have an advantage; `references` by turn too.

    `reward` is the mean of the steps', where they have one of their own.
    """
    found = (
        outcome_sample(turn, advantages[turn.id], references.get(turn.id), learning, at)
        for turn in turns
        if advantages.get(turn.id)
    )
    samples = [sample for sample in found if sample is not None]
    outcomes = tuple(episode.outcome for episode in episodes if episode.outcome is not None)
    first = episodes[0]
    return Comparison(first.group, first.source, first.task, outcomes, len(samples), at, reward), samples


class Comparer:
    """Compares groups for ever.

    `refer` scores a turn's reply under the reference, or gives None. `vote` asks the judge about a step; what it gives
    may be an abstention.
    """

    def __init__(
        self,
        journal: Any,
        learning: LearningSection,
        insist: Insist,
        refer: Callable[[Turn], Awaitable[Scores | None]],
        vote: Callable[[Turn, NextState], Awaitable[Judgement]],
    ) -> None:
        self._journal, self._learning, self._insist, self._refer, self._vote = journal, learning, insist, refer, vote
        self._baseline = RunningBaseline(learning.baseline_decay)  # per environment, of the steps' mean rewards
        self.counts: Counter[str] = Counter()

    async def run(self) -> None:
        if self._learning.process_weight > 0:
            await self._rebuild_baseline()
        after = 0
        while True:
            ask = partial(self._journal.groups_to_compare.remote, after, GROUPS, POLL_S)
            for seq, group in await self._insist(ask):
                try:
                    await self._compare(group)
                except Exception:  # a defect: the next collector tries again, the flow goes on
                    log.exception("event=compare_failed group=%s", group)
                after = max(after, seq)

    async def _rebuild_baseline(self) -> None:
        for comparison in await self._insist(self._journal.comparisons.remote):
            if comparison.reward is not None:
                self._baseline.advantage(comparison.source, comparison.reward)

    async def _compare(self, group: str) -> None:
        episodes, turns = await self._insist(partial(self._journal.group.remote, group))
        advantages, reward = await self._advantages(episodes, turns)
        references = {}
        if self._learning.kl_weight > 0:
            asked = [turn for turn in turns if advantages.get(turn.id)]
            scores = await asyncio.gather(*map(self._refer, asked))
            references = {turn.id: each for turn, each in zip(asked, scores, strict=True) if each is not None}
        comparison, samples = compare(episodes, turns, advantages, references, self._learning, time.time(), reward)
        await self._insist(partial(self._journal.append.remote, *samples, comparison))
        if reward is not None:
            self._baseline.advantage(comparison.source, reward)
        self.counts.update(groups=1, episodes=len(episodes), samples=len(samples), alike=not samples)
        if comparison.outcomes:
            metric("pool/outcome_score").set(float(np.mean(comparison.outcomes)))

    async def _advantages(
        self, episodes: Sequence[Episode], turns: Sequence[Turn]
    ) -> tuple[dict[str, float], float | None]:
        """Advantages by turn, and the mean of the steps' rewards where votes count."""
        weight, first = self._learning.process_weight, episodes[0]
        if weight == 0:
            return outcome_advantages(episodes, turns), None
        judged = {episode.session for episode in episodes if episode.outcome is not None}
        steps = [turn for turn in turns if turn.session in judged and trains(turn)]
        rewards = step_rewards(episodes, steps, await self._judged(first.group, steps), weight)
        baseline = self._baseline.value(first.source) if self._learning.baseline == "ema" else 0.0
        return process_advantages(steps, rewards, baseline), float(np.mean(rewards)) if rewards else None

    async def _judged(self, group: str, turns: Sequence[Turn]) -> dict[str, Judgement]:
        """The judgements of steps that something followed; those that the journal does not have are asked for."""
        asked = {turn.id: turn for turn in turns}
        steps = await self._insist(partial(self._journal.steps.remote, group))
        found = await asyncio.gather(
            *(
                self._judge(asked[next_state.turn], next_state, known)
                for next_state, known in steps
                if next_state.turn in asked and next_state.messages
            )
        )
        return {judgement.turn: judgement for judgement in found}

    async def _judge(self, turn: Turn, next_state: NextState, known: Judgement | None) -> Judgement:
        if known is not None:
            return known
        judgement = await self._vote(turn, next_state)
        await self._insist(partial(self._journal.append.remote, judgement))
        self.counts.update(steps=1, steps_abstained=judgement.score is None)
        return judgement
