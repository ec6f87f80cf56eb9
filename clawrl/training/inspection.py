"""What the trainer measures of a candidate for the gate: its own weights before and after a step, on held-out turns.

Knows the learner and samples. Ignores what the figures prove (`gate`) and where the turns come from. Every method is
a collective. A version's scores are kept while it is the parent, so that a turn is scored once under each version.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from clawrl.config import GateSection
from clawrl.training.agreement import ValuedReply
from clawrl.training.gate import Evidence, HeldOutTurn
from clawrl.training.learner import Learner, ReplyScores
from clawrl.training.pack import scored_positions, trainable
from clawrl.training.versions import lag
from clawrl.types import Sample


class Inspection:
    """`begin` with the parent's weights, then the step, then `end` with the candidate's."""

    def __init__(self, learner: Learner, settings: GateSection, stop_id: int | None) -> None:
        self._learner, self._settings, self._stop_id = learner, settings, stop_id
        self._version: int | None = None  # whose scores are kept
        self._scores: dict[str, ReplyScores] = {}
        self._held_out: list[tuple[Sample, int | None]] = []
        self._norm = 0.0
        self.seconds = 0.0

    def begin(self, parent: int, held_out: Sequence[tuple[Sample, int | None]]) -> None:
        """Score the turns, newest first, under the parent, as far as half of `max_seconds` goes."""
        started = time.perf_counter()
        if parent != self._version:
            self._scores = {}
        self._held_out = [(sample, score) for sample, score in held_out if trainable(sample)]
        if self._settings.enabled:
            self._norm = self._learner.weight_norm()
            self._extend(self._scores)
        self.seconds = time.perf_counter() - started

    def end(self, line: Sequence[int], update_norm: float, batch: Sequence[Sample]) -> Evidence:
        """What the weights as they are, those of version line[0], say of the turns that their parent scored."""
        started = time.perf_counter()
        finite, before, after = self._learner.finite(), self._scores, {}
        self._held_out = [(sample, score) for sample, score in self._held_out if sample.id in before]
        if finite:
            self._extend(after)
        self._version, self._scores = line[0], after
        self.seconds += time.perf_counter() - started
        turns = (
            self._turn(sample, score, lag(line, sample.newest_version), before[sample.id], after[sample.id])
            for sample, score in self._held_out
            if sample.id in after
        )
        learnt = (_valued(sample) for sample in batch if trainable(sample) and sample.advantages is not None)
        return Evidence(finite, update_norm / self._norm if self._norm else 0.0, tuple(turns), tuple(learnt))

    def _extend(self, scores: dict[str, ReplyScores]) -> None:
        missing = [sample for sample, _ in self._held_out if sample.id not in scores]
        found = self._learner.score(missing, self._stop_id, self._settings.max_seconds / 2)
        scores |= {sample.id: each for sample, each in zip(missing, found, strict=False)}

    def _turn(
        self, sample: Sample, score: int | None, steps: int, parent: ReplyScores, candidate: ReplyScores
    ) -> HeldOutTurn:
        at = scored_positions(sample) + 1
        reference = sample.reference_logprobs
        return HeldOutTurn(
            token_ids=sample.token_ids[at],
            score=score,
            lag=steps,
            behaviour=sample.logprobs[at],
            parent=parent.logprobs,
            candidate=candidate.logprobs,
            reference=None if reference is None else reference[at],
            stops=candidate.stops,
            ended=self._stop_id is not None and bool(np.equal(sample.token_ids[-1], self._stop_id)),
        )


def _valued(sample: Sample) -> ValuedReply:
    at = scored_positions(sample) + 1
    assert sample.advantages is not None
    return ValuedReply(sample.token_ids[at], float(sample.advantages[at].mean()))
