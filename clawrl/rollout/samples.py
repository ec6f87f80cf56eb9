"""From a judged turn to a sample: which terms it has, and their targets at every reply position. Pure numpy.

Knows records and the learning section; the mathematics is in `algorithms`. Ignores Ray, the journal and who judged.

    Turn + Judgement + baseline ──────────► advantages       (rl, hybrid)    rl_weight folded in
    Turn + teacher Scores per hint ───────► distillation     (opd, hybrid)   opd_weight folded in
    Turn + reference Scores ──────────────► reference log-probabilities      (beside one of the above only)
    Turn of an environment + its attempt's advantage ─────────────► advantages, whatever the method

Folding is exact: the clipped surrogate is positively homogeneous in the advantage, w·f(A) = f(w·A) for w >= 0.

Which turns train. A reply that the model ended itself (`stop`, `tool_calls`) and one that reached its token limit
(`length`): the person saw it cut off, what they said next is about that reply, and teaching it to be shorter is part
of the lesson; leaving such replies out would shield the longest ones from every reward (DAPO's overlong filtering is
for verifiers that cannot read a cut answer; the judge can). A reply cut off by its client (`abort`) or by a failure is
not what the model would have said, and does not train. An absent term stays absent: no score, no advantage; no hint or
no teacher, no distillation; neither, no sample.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from clawrl.algorithms.advantages import (
    distillation_support,
    score_advantages,
    token_distillation,
    topk_distillation,
)
from clawrl.algorithms.hints import select_hint
from clawrl.config import LearningSection
from clawrl.errors import JudgeError
from clawrl.types import Distillation, Judgement, Sample, Scores, Turn

TRAINED_ENDINGS = frozenset({"stop", "length", "tool_calls", "function_call"})


def build_sample(
    turn: Turn,
    judgement: Judgement,
    teacher: Sequence[Scores | None],
    reference: Scores | None,
    baseline: float,
    learning: LearningSection,
) -> Sample | None:
    """The turn's sample over P + T tokens, or None if no term is left to learn from.

    `teacher` holds the reply's scores under each hint used, in the judgement's order (None: that one failed);
    `baseline` is the user's running mean before this turn (0 where there is none).
    """
    capture = turn.capture
    if not trains(turn):
        return None
    known = np.isfinite(capture.logprobs)  # a token whose behaviour log-probability is missing has no ratio
    advantages = _advantages(judgement, baseline, known, learning)
    distillation = _distillation(turn, [scores for scores in teacher if scores is not None], known, learning)
    if advantages is None and distillation is None:
        return None
    return _sample(turn, advantages, distillation, reference, learning, judgement.at)


def outcome_sample(
    turn: Turn, advantage: float, reference: Scores | None, learning: LearningSection, at: float
) -> Sample | None:
    """The sample of an environment's turn, every reply token worth its attempt's advantage; None if it cannot train."""
    if not trains(turn):
        return None
    known = np.isfinite(turn.capture.logprobs)
    advantages = np.where(known, score_advantages(advantage, len(known)), 0).astype(np.float32)
    return _sample(turn, advantages, None, reference, learning, at)


def _sample(
    turn: Turn,
    advantages: np.ndarray | None,
    distillation: Distillation | None,
    reference: Scores | None,
    learning: LearningSection,
    at: float,
) -> Sample:
    """Targets of the reply's T tokens -> a sample over all P + T."""
    capture = turn.capture
    known = np.isfinite(capture.logprobs)
    num_prompt = len(capture.prompt_ids)
    reference = reference if learning.kl_weight > 0 else None
    return Sample(
        id=turn.id,
        user=turn.user,
        source=turn.source,
        token_ids=np.concatenate([capture.prompt_ids, capture.completion_ids]).astype(np.int32),
        loss_mask=_after_prompt(known, num_prompt),
        logprobs=_after_prompt(np.where(known, capture.logprobs, 0).astype(np.float32), num_prompt),
        advantages=None if advantages is None else _after_prompt(advantages, num_prompt),
        distillation=None if distillation is None else _spread(distillation, num_prompt),
        reference_logprobs=_after_prompt(reference.logprobs, num_prompt) if reference is not None else None,
        oldest_version=min(span.version for span in capture.versions),
        newest_version=max(span.version for span in capture.versions),
        weight=1.0,
        at=at,
    )


def is_held_out(session: str, share: float) -> bool:
    """Whether a session's turns only measure candidates: a fixed `share` of all session ids, the same for ever."""
    return int.from_bytes(hashlib.sha256(session.encode()).digest()[:8]) < share * 2**64


def trains(turn: Turn) -> bool:
    """Whether the reply is one that the model would give: main line, not empty, not cut off from outside."""
    return (
        turn.kind == "main" and turn.finish_reason in TRAINED_ENDINGS and bool(np.isfinite(turn.capture.logprobs).any())
    )


def needs_scores(turn: Turn, judgement: Judgement, learning: LearningSection) -> tuple[bool, bool]:
    """Whether the turn's sample can use a teacher's scores (one per hint), and the reference's."""
    teach = trains(turn) and _distils(learning) and bool(judgement.hints)
    rewarded = trains(turn) and _rewards(learning) and judgement.score is not None
    if learning.baseline == "none" and judgement.score == 0:
        rewarded = False
    return teach, learning.kl_weight > 0 and (teach or rewarded)


def require_complete(scores: Scores, turn: Turn) -> None:
    """Raise JudgeError unless every reply token has a log-probability."""
    num_tokens = len(turn.capture.completion_ids)
    if len(scores.logprobs) != num_tokens:
        raise JudgeError(f"turn {turn.id}: {len(scores.logprobs)} tokens were scored of a reply of {num_tokens}")
    if not np.isfinite(scores.logprobs).all():
        raise JudgeError(f"turn {turn.id}: a scored log-probability is not a finite number")


def _rewards(learning: LearningSection) -> bool:
    return learning.method != "opd" and learning.rl_weight > 0


def _distils(learning: LearningSection) -> bool:
    return learning.method != "rl" and learning.opd_weight > 0


def _advantages(
    judgement: Judgement, baseline: float, known: np.ndarray, learning: LearningSection
) -> np.ndarray | None:
    """f32[T], or None without a score or where it says nothing (a neutral turn without a baseline)."""
    if not _rewards(learning) or judgement.score is None:
        return None
    advantage = judgement.score - (baseline if learning.baseline == "ema" else 0.0)
    if advantage == 0:
        return None
    return np.where(known, score_advantages(learning.rl_weight * advantage, len(known)), 0).astype(np.float32)


def _distillation(
    turn: Turn, teacher: list[Scores], known: np.ndarray, learning: LearningSection
) -> Distillation | None:
    """Targets [T, k] under the hints selected, or None without a teacher or where it agrees with the reply."""
    if not _distils(learning) or not teacher:
        return None
    capture = turn.capture
    scores = _selected(turn, teacher, learning)
    if learning.distillation == "token":
        target = token_distillation(capture.completion_ids, capture.logprobs, scores, learning.difference_clip)
    else:
        support, logprobs = distillation_support(learning.distillation_support, learning.support, capture, scores)
        target = topk_distillation(capture.completion_ids, support, logprobs, scores, learning.difference_clip)
    valid = target.valid & known[:, None]
    advantages = np.where(valid, learning.opd_weight * target.advantages, 0).astype(np.float32)
    if not advantages.any():
        return None
    return replace(target, advantages=advantages, valid=valid)


def _selected(turn: Turn, teacher: list[Scores], learning: LearningSection) -> Scores:
    """The teacher's scores, position by position, under the hint that the rule selects there."""
    rng = np.random.default_rng(zlib.crc32(turn.id.encode()))  # the same turn chooses alike after a restart
    students = turn.capture.top_ids[:, : learning.support]
    chosen = select_hint(students, [scores.top_ids for scores in teacher], learning.hint_rule, rng)
    positions = np.arange(len(chosen))
    return Scores(
        logprobs=np.stack([scores.logprobs for scores in teacher])[chosen, positions],
        top_ids=np.stack([scores.top_ids for scores in teacher])[chosen, positions],
        top_logprobs=np.stack([scores.top_logprobs for scores in teacher])[chosen, positions],
        version=max(scores.version for scores in teacher),
    )


def _after_prompt(reply: np.ndarray, num_prompt: int) -> np.ndarray:
    """[T, ...] -> [P + T, ...]: zeros (or false) over the prompt, where nothing is learnt."""
    return np.concatenate([np.zeros((num_prompt, *reply.shape[1:]), reply.dtype), reply])


def _spread(target: Distillation, num_prompt: int) -> Distillation:
    return Distillation(
        support=_after_prompt(target.support, num_prompt),
        behaviour_logprobs=_after_prompt(target.behaviour_logprobs, num_prompt),
        advantages=_after_prompt(target.advantages, num_prompt),
        valid=_after_prompt(target.valid, num_prompt),
    )
