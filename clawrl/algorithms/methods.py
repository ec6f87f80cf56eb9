"""Methods: from the evidence of one judged turn to the targets of its T reply tokens. Pure numpy.

Knows what is known of a turn and what a method may ask for. Ignores prompts, who is trained on, and the loss. Absence
stays absence: no score, no advantage; no hint or no teacher, no distillation.

    judgement + baseline ──────► advantages                     (rl, hybrid)    rl_weight folded in
    teacher Scores per hint ───► distillation, or teacher_top   (opd, hybrid)   opd_weight folded in

    all of it ─────────────────► a function of the user's own   (package.module:function)

Folding is exact: the clipped surrogate is positively homogeneous in the advantage, w·f(A) = f(w·A) for w >= 0.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
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
from clawrl.config import LearningSection, load_function
from clawrl.errors import ConfigError, MethodError, boundary
from clawrl.types import Capture, Distillation, Judgement, Scores, TeacherTop, Turn


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


Method = Callable[[Evidence], TokenTargets | None]
"""Pure: the same evidence gives the same targets, whenever it is asked. None: nothing is to be learnt from the turn."""


def load_method(learning: LearningSection) -> Method:
    """The method that the section names. Raises ConfigError if it is a function that cannot be found or called."""
    if not is_own(learning):
        return hybrid
    function = load_function("learning.method", learning.method)
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"learning.method={learning.method!r} cannot be called with the evidence of a turn alone ({error}); "
            "define it as function(evidence)"
        ) from None
    return function


def targets_of(evidence: Evidence) -> TokenTargets | None:
    """What the section's method makes of a turn. Raises MethodError where a user's function fails, or its targets do
    not fit the reply.
    """
    learning = evidence.learning
    if not is_own(learning):
        return hybrid(evidence)
    with boundary(MethodError, f"learning.method={learning.method!r} failed on turn {evidence.turn.id}"):
        targets = load_method(learning)(evidence)
        if targets is not None:
            _require_fit(targets, evidence.turn.capture)
    return targets


def is_own(learning: LearningSection) -> bool:
    """Whether the method is a user's function."""
    return ":" in learning.method


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


def _require_fit(targets: TokenTargets, capture: Capture) -> None:
    if not isinstance(targets, TokenTargets):
        raise TypeError(f"it returned {type(targets).__name__}; return TokenTargets, or None to leave the turn out")
    num_tokens, known = len(capture.completion_ids), np.isfinite(capture.logprobs)
    rows = {
        "advantages": targets.advantages,
        "distillation": targets.distillation and targets.distillation.support,
        "teacher_top": targets.teacher_top and targets.teacher_top.ids,
    }
    for name, array in rows.items():
        if array is not None and (len(array) != num_tokens or (name == "advantages" and np.ndim(array) != 1)):
            raise ValueError(f"{name} of shape {np.shape(array)} do not fit a reply of {num_tokens} tokens")
    if targets.advantages is not None and not np.isfinite(targets.advantages[known]).all():
        raise ValueError("an advantage is not a finite number; where a token has none, 0 leaves it alone")


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
