"""What the trainer measures of a candidate for the gate: its own weights before, beside and after a step.

Knows the learner and held-out turns. Ignores what the figures prove (`gate`) and where the turns come from. Every
method is a collective. A version's scores are kept while it is the parent: each scores a turn once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from clawrl.config import GateSection
from clawrl.training.gate import Evidence, HeldOutTurn
from clawrl.training.learner import Learner, ReplyScores
from clawrl.training.pack import scored_positions, trainable
from clawrl.training.versions import lag
from clawrl.types import Sample


class Inspection:
    """`begin` with the parent's weights, `aside` with those of the batch alone, `end` with the candidate's.

    Each may take a third of `max_seconds`.
    """

    def __init__(self, learner: Learner, settings: GateSection, stop_id: int | None) -> None:
        self._learner, self._settings, self._stop_id = learner, settings, stop_id
        self._version: int | None = None  # whose scores are kept
        self._scores: dict[str, ReplyScores] = {}
        self._alone: dict[str, ReplyScores] = {}
        self._held_out: list[tuple[Sample, int | None]] = []
        self._norm = 0.0
        self.seconds = 0.0

    def begin(self, parent: int, held_out: Sequence[tuple[Sample, int | None]]) -> None:
        """Score the turns, newest first, under the parent, as far as the time goes."""
        started = time.perf_counter()
        self._alone = {}
        if parent != self._version:
            self._scores = {}
        self._held_out = [(sample, score) for sample, score in held_out if trainable(sample)]
        if self._settings.enabled:
            self._norm = self._learner.weight_norm()
            self._extend(self._scores)
            self._held_out = [(sample, score) for sample, score in self._held_out if sample.id in self._scores]
        self.seconds = time.perf_counter() - started

    def aside(self) -> None:
        """What the weights as they are, those that the batch alone would make, say of the turns."""
        started = time.perf_counter()
        self._extend(self._alone)
        self.seconds += time.perf_counter() - started

    def end(self, line: Sequence[int], update_norm: float) -> Evidence:
        """What the weights as they are, those of version line[0], say of the turns that their parent scored."""
        started = time.perf_counter()
        finite, before, after = self._learner.finite(), self._scores, {}
        if finite:
            self._extend(after)
        self._version, self._scores = line[0], after
        self.seconds += time.perf_counter() - started
        turns = (
            self._turn(sample, score, lag(line, sample.newest_version), before[sample.id], after[sample.id])
            for sample, score in self._held_out
            if sample.id in after
        )
        return Evidence(finite, update_norm / self._norm if self._norm else 0.0, tuple(turns))

    def _extend(self, scores: dict[str, ReplyScores]) -> None:
        missing = [sample for sample, _ in self._held_out if sample.id not in scores]
        found = self._learner.score(missing, self._stop_id, self._settings.max_seconds / 3)
        scores |= {sample.id: each for sample, each in zip(missing, found, strict=False)}

    def _turn(
        self, sample: Sample, score: int | None, steps: int, parent: ReplyScores, candidate: ReplyScores
    ) -> HeldOutTurn:
        at = scored_positions(sample) + 1
        reference, alone = sample.reference_logprobs, self._alone.get(sample.id)
        return HeldOutTurn(
            score=score,
            lag=steps,
            behaviour=sample.logprobs[at],
            parent=parent.logprobs,
            candidate=candidate.logprobs,
            alone=None if alone is None else alone.logprobs,
            reference=None if reference is None else reference[at],
            stops=candidate.stops,
            ended=self._stop_id is not None and bool(np.equal(sample.token_ids[-1], self._stop_id)),
        )
