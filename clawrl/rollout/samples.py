"""From a judged turn to a sample: whether it trains, and its method's targets laid over prompt and reply. Pure numpy.

Knows records and the learning section; what a turn is trained towards is a method's (`algorithms.methods`). Ignores
Ray, the journal and who judged.

    Turn + Judgement + baseline + teacher Scores per hint ─► method ─► targets of the reply ─┐
    Turn of an environment + its attempt's advantage, whatever the method ─► advantages ─────┼─► Sample
    Turn + reference Scores ──────────────────────────► reference log-probabilities ─────────┘   (beside a target only)

Which turns train. A reply that the model ended itself (`stop`, `tool_calls`) and one that reached its token limit
(`length`): the person saw it cut off, what they said next is about that reply, and teaching it to be shorter is part
of the lesson; leaving such replies out would shield the longest ones from every reward (DAPO's overlong filtering is
for verifiers that cannot read a cut answer; the judge can). A reply cut off by its client (`abort`) or by a failure is
not what the model would have said, and does not train. Neither does a turn whose method has no target for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

import numpy as np

from clawrl.algorithms.advantages import score_advantages
from clawrl.algorithms.methods import Evidence, TokenTargets, distils, is_own, rewards, targets_of
from clawrl.config import LearningSection
from clawrl.errors import JudgeError
from clawrl.types import Distillation, Judgement, Sample, Scores, TeacherTop, Turn

_Target = TypeVar("_Target", Distillation, TeacherTop)

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
    `baseline` is the user's running mean before this turn (0 where there is none). Raises MethodError where the
    method is a user's function and fails.
    """
    if not trains(turn):
        return None
    scores = tuple(each for each in teacher if each is not None)
    targets = targets_of(Evidence(turn, judgement, scores, reference, baseline, learning))
    return None if targets is None else _sample(turn, targets, reference, learning, judgement.at)


def outcome_sample(
    turn: Turn, advantage: float, reference: Scores | None, learning: LearningSection, at: float
) -> Sample | None:
    """The sample of an environment's turn, every reply token worth its attempt's advantage; None if it cannot train."""
    if not trains(turn):
        return None
    advantages = score_advantages(advantage, len(turn.capture.completion_ids))
    return _sample(turn, TokenTargets(advantages), reference, learning, at)


def _sample(
    turn: Turn, targets: TokenTargets, reference: Scores | None, learning: LearningSection, at: float
) -> Sample | None:
    """Targets of the reply's T tokens -> a sample over all P + T, or None if there is no target."""
    if targets.advantages is None and targets.distillation is None and targets.teacher_top is None:
        return None
    capture, num_prompt = turn.capture, len(turn.capture.prompt_ids)
    known = np.isfinite(capture.logprobs)  # a token whose behaviour log-probability is missing has no ratio
    reference = reference if learning.kl_weight > 0 else None
    advantages = targets.advantages
    return Sample(
        id=turn.id,
        user=turn.user,
        source=turn.source,
        token_ids=np.concatenate([capture.prompt_ids, capture.completion_ids]).astype(np.int32),
        loss_mask=_after_prompt(known, num_prompt),
        logprobs=_after_prompt(np.where(known, capture.logprobs, 0).astype(np.float32), num_prompt),
        advantages=None
        if advantages is None
        else _after_prompt(np.where(known, advantages, 0).astype(np.float32), num_prompt),
        distillation=_spread(targets.distillation, num_prompt),
        reference_logprobs=None if reference is None else _after_prompt(reference.logprobs, num_prompt),
        oldest_version=min(span.version for span in capture.versions),
        newest_version=max(span.version for span in capture.versions),
        weight=1.0,
        at=at,
        teacher_top=_spread(targets.teacher_top, num_prompt),
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
    teach = trains(turn) and distils(learning) and bool(judgement.hints)
    rewarded = trains(turn) and rewards(learning) and judgement.score is not None
    if learning.baseline == "none" and judgement.score == 0:
        rewarded = False
    own = trains(turn) and is_own(learning)  # which may learn from any turn
    return teach, learning.kl_weight > 0 and (teach or rewarded or own)


def require_complete(scores: Scores, turn: Turn) -> None:
    """Raise JudgeError unless every reply token has a log-probability."""
    num_tokens = len(turn.capture.completion_ids)
    if len(scores.logprobs) != num_tokens:
        raise JudgeError(f"turn {turn.id}: {len(scores.logprobs)} tokens were scored of a reply of {num_tokens}")
    if not np.isfinite(scores.logprobs).all():
        raise JudgeError(f"turn {turn.id}: a scored log-probability is not a finite number")


def _after_prompt(reply: np.ndarray, num_prompt: int) -> np.ndarray:
    """[T, ...] -> [P + T, ...]: zeros (or false) over the prompt, where nothing is learnt."""
    return np.concatenate([np.zeros((num_prompt, *reply.shape[1:]), reply.dtype), reply])


def _spread(target: _Target | None, num_prompt: int) -> _Target | None:
    """The same target, of which every array is by token, over prompt and reply."""
    if target is None:
        return None
    arrays = {each.name: _after_prompt(getattr(target, each.name), num_prompt) for each in fields(target)}
    return replace(target, **arrays)
