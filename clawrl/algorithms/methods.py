"""Methods: from the evidence of one judged turn to the targets of its T reply tokens. Pure numpy.

Knows what is known of a turn and what a method may ask for. Ignores prompts, who is trained on, and the loss. Absence
stays absence: no score, no advantage; no hint or no teacher, no distillation.

    judgement + baseline ──────► advantages                     (rl, hybrid)    rl_weight folded in
    teacher Scores per hint ───► distillation, or teacher_top   (opd, hybrid)   opd_weight folded in

Folding is exact: the clipped surrogate is positively homogeneous in the advantage, w·f(A) = f(w·A) for w >= 0.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from clawrl.algorithms.advantages import (
    distillation_support,
    score_advantages,
    teacher_top,
    token_distillation,
    topk_distillation,
)
from clawrl.algorithms.hints import select_hint
from clawrl.config import LearningSection
from clawrl.types import Distillation, Judgement, Scores, TeacherTop, Turn


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """All that is known of a turn when its targets are made."""

    turn: Turn  # request, reply and its capture: T tokens, their behaviour log-probabilities (NaN: unknown), the top k
    judgement: Judgement
    teacher: tuple[Scores, ...]  # of the reply under each hint used, in the judgement's order, without failed ones
    reference: Scores | None
    baseline: float  # the user's running mean of scores before this turn; 0 where there is none
    learning: LearningSection


@dataclass(frozen=True, slots=True, eq=False)
class TokenTargets:
    """What the T reply tokens are trained towards, the terms' weights folded in; None: no such term."""

    advantages: np.ndarray | None = None  # f32[T], of the sampled tokens
    distillation: Distillation | None = None  # rows T
    teacher_top: TeacherTop | None = None  # rows T


def rewards(learning: LearningSection) -> bool:
    """Whether the method learns from scores."""
    return learning.method != "opd" and learning.rl_weight > 0


def distils(learning: LearningSection) -> bool:
    """Whether the method learns from a teacher."""
    return learning.method != "rl" and learning.opd_weight > 0


def hybrid(evidence: Evidence) -> TokenTargets:
    """The methods rl, opd and hybrid, which differ in the terms they have (ALGORITHM.md §2)."""
    advantages = _advantages(evidence)
    if not distils(evidence.learning) or not evidence.teacher:
        return TokenTargets(advantages)
    scores = selected_scores(evidence)
    if evidence.learning.distillation == "kl":
        return TokenTargets(advantages, teacher_top=teacher_top(scores, evidence.learning.opd_weight))
    return TokenTargets(advantages, _distillation(evidence, scores))


def selected_scores(evidence: Evidence) -> Scores:
    """The teacher's scores, position by position, under the hint that `hint_rule` selects there."""
    capture, teacher, learning = evidence.turn.capture, evidence.teacher, evidence.learning
    rng = np.random.default_rng(zlib.crc32(evidence.turn.id.encode()))  # the same turn chooses alike after a restart
    students = capture.top_ids[:, : learning.support]
    chosen = select_hint(students, [scores.top_ids for scores in teacher], learning.hint_rule, rng)
    positions = np.arange(len(chosen))
    return Scores(
        logprobs=np.stack([scores.logprobs for scores in teacher])[chosen, positions],
        top_ids=np.stack([scores.top_ids for scores in teacher])[chosen, positions],
        top_logprobs=np.stack([scores.top_logprobs for scores in teacher])[chosen, positions],
        version=max(scores.version for scores in teacher),
    )


def _advantages(evidence: Evidence) -> np.ndarray | None:
    """f32[T], or None without a score or where it says nothing (a neutral turn without a baseline)."""
    score, learning = evidence.judgement.score, evidence.learning
    if not rewards(learning) or score is None:
        return None
    advantage = score - (evidence.baseline if learning.baseline == "ema" else 0.0)
    if advantage == 0:
        return None
    return score_advantages(learning.rl_weight * advantage, len(evidence.turn.capture.completion_ids))


def _distillation(evidence: Evidence, scores: Scores) -> Distillation | None:
    """Targets [T, k], or None where the teacher agrees with the reply."""
    capture, learning = evidence.turn.capture, evidence.learning
    if learning.distillation == "token":
        target = token_distillation(capture.completion_ids, capture.logprobs, scores, learning.difference_clip)
    else:
        support, logprobs = distillation_support(learning.distillation_support, learning.support, capture, scores)
        target = topk_distillation(capture.completion_ids, support, logprobs, scores, learning.difference_clip)
    valid = target.valid & np.isfinite(capture.logprobs)[:, None]
    advantages = np.where(valid, learning.opd_weight * target.advantages, 0).astype(np.float32)
    return replace(target, advantages=advantages, valid=valid) if advantages.any() else None
