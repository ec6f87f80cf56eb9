"""Advantages: what each reply token is worth, by a judge's score, a group's outcomes or a teacher's view. Pure numpy.

Knows the arrays of a reply (T tokens, support of k tokens per position, K tokens scored by the teacher). Ignores how
they were captured or judged and which loss uses them. All log-probabilities are natural, full-vocabulary, at
temperature 1. What a teacher did not say is marked invalid, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from clawrl.types import Capture, Distillation, Scores, TeacherTop

SupportRule = Literal["student", "teacher", "overlap"]

GROUP_EPSILON = 1e-6


class RunningBaseline:
    """Running mean of each user's (or environment's) scores: b <- decay·b + (1 - decay)·score, from 0.

    One reply per prompt has no group to be centred by; this stands in for it. decay = 0 is the last score.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = decay
        self._means: dict[str, float] = {}

    def value(self, user: str) -> float:
        return self._means.get(user, 0.0)

    def advantage(self, user: str, score: float) -> float:
        """score - b, with the b from before this score, which is then taken in."""
        before = self.value(user)
        self._means[user] = self._decay * before + (1 - self._decay) * score
        return score - before

    def rebuild(self, user: str, scores: Iterable[float]) -> None:
        """Forget the user's mean and take in `scores`, oldest first, as after a restart."""
        self._means.pop(user, None)
        for score in scores:
            self.advantage(user, score)


def group_advantages(outcomes: Sequence[float]) -> np.ndarray | None:
    """f64[G]: each attempt's z-score among those at its task, with the population's σ (GRPO, arXiv:2402.03300 §4.1.2).

    A_g = (o_g - mean(o)) / (σ(o) + 1e-6). None where all outcomes are equal, also of a single one: nothing is to be
    learnt from the comparison (dynamic sampling of DAPO, arXiv:2503.14476, drops such groups).
    """
    values = np.asarray(outcomes, np.float64)
    if len(values) < 2 or np.ptp(values) == 0:
        return None
    return (values - values.mean()) / (values.std() + GROUP_EPSILON)


def step_reward(outcome: float, votes: Iterable[int | None], weight: float) -> float:
    """o + c·mean(votes): what a step of an attempt is worth (ALGORITHM.md §2). Without a vote that says anything, o."""
    cast = [vote for vote in votes if vote is not None]
    return outcome + weight * sum(cast) / len(cast) if cast else outcome


def step_advantages(steps: Sequence[tuple[int, float]], baseline: float) -> list[float | None]:
    """The advantage of each (step index, reward) of all attempts at one task (ALGORITHM.md §2).

    A z-score among the steps of the same index, as in `group_advantages`; None where they are all worth the same. A
    step that is alone at its index has nobody to be held against: reward - baseline, as in Binary RL.
    """
    buckets: dict[int, list[int]] = {}
    for position, (index, _) in enumerate(steps):
        buckets.setdefault(index, []).append(position)
    advantages: list[float | None] = [None] * len(steps)
    for positions in buckets.values():
        rewards = [steps[position][1] for position in positions]
        scores = [rewards[0] - baseline] if len(rewards) == 1 else group_advantages(rewards)
        for position, score in zip(positions, [] if scores is None else scores, strict=False):
            advantages[position] = float(score)
    return advantages


def score_advantages(advantage: float, num_tokens: int) -> np.ndarray:
    """f32[T]: Binary RL, the same advantage for every reply token (ALGORITHM.md §2)."""
    return np.full(num_tokens, advantage, dtype=np.float32)


def token_distillation(
    completion_ids: np.ndarray, behaviour_logprobs: np.ndarray, teacher: Scores, difference_clip: float
) -> Distillation:
    """On-policy distillation on the sampled tokens alone: A_t = clip(l_T - l_old, -C, C) (ALGORITHM.md §2).

    completion_ids i32[T] and behaviour_logprobs f32[T] as captured. The support is the sampled token, so k = 1.
    """
    _same_tokens(len(completion_ids), teacher)
    difference = teacher.logprobs.astype(np.float32) - behaviour_logprobs
    return _distillation(completion_ids[:, None], behaviour_logprobs[:, None], difference[:, None], difference_clip)


def topk_distillation(
    completion_ids: np.ndarray,
    support: np.ndarray,
    support_logprobs: np.ndarray,
    teacher: Scores,
    difference_clip: float,
) -> Distillation:
    """On-policy distillation over k tokens per position (ALGORITHM.md §2; SDFT 2601.19897, SDPO 2601.20802).

    support i32[T, k] as `distillation_support` chose it, support_logprobs f32[T, k] the student's at sampling, NaN
    where they are not known: such an entry is invalid. With w = softmax of l_old over the support's known entries and
    D = clip(l_T - l_old, -C, C), the advantages are A = D·w.

    The teacher names its K likeliest tokens and the sampled one. Any other token's log-probability is at most the
    K-th's: if even that bound lies C or more below l_old then D = -C exactly; otherwise the entry is invalid.
    """
    _same_tokens(len(completion_ids), teacher)
    known, bound = teacher_logprobs(completion_ids, support, teacher)
    far_below = np.isnan(known) & (bound - support_logprobs <= -difference_clip)
    difference = np.where(far_below, -difference_clip, known - support_logprobs)
    return _distillation(support, support_logprobs, difference, difference_clip, _softmax(support_logprobs))


def distillation_support(rule: SupportRule, k: int, capture: Capture, teacher: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The tokens i32[T, k] that top-k distillation is over, and the student's log-probabilities of them f32[T, k].

    `student`: its k likeliest. `teacher`: the teacher's k likeliest; NaN where the engine told nothing of such a token
    at sampling, which are all but the captured likeliest ones and the sampled one. `overlap`: the student's, NaN
    outside the teacher's k likeliest.
    """
    students, logprobs = capture.top_ids[:, :k], capture.top_logprobs[:, :k]
    teachers = teacher.top_ids[:, :k]
    if rule == "student":
        return students, logprobs
    if rule == "overlap":
        shared = (students[:, :, None] == teachers[:, None, :]).any(-1)
        return students, np.where(shared, logprobs, np.nan).astype(np.float32)
    told = (capture.completion_ids, capture.logprobs, capture.top_ids, capture.top_logprobs)
    return teachers, _told_logprobs(teachers, *told)


def teacher_top(teacher: Scores, weight: float) -> TeacherTop:
    """What the full reverse KL is taken against (`losses.reverse_kl`): all the teacher named, K tokens per position.

    A token without a finite log-probability is left to the bin of the others, which it is one of. A position at which
    there is no other does not count.
    """
    told = np.isfinite(teacher.top_logprobs)
    return TeacherTop(
        ids=teacher.top_ids.astype(np.int32),
        logprobs=np.where(told, teacher.top_logprobs, -np.inf).astype(np.float32),
        weights=np.where(told.any(-1), weight, 0.0).astype(np.float32),
    )


def teacher_logprobs(completion_ids: np.ndarray, support: np.ndarray, teacher: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's log-probabilities of support tokens, f32[T, k], NaN where it did not say, and a bound f32[T, 1].

    The bound is the smallest of the teacher's top K, above which no unnamed token can lie (0 if it named none).
    """
    known = _told_logprobs(support, completion_ids, teacher.logprobs, teacher.top_ids, teacher.top_logprobs)
    bound = teacher.top_logprobs.min(-1, keepdims=True, initial=0.0)
    return known, bound.astype(np.float32)


def _told_logprobs(
    tokens: np.ndarray, sampled: np.ndarray, logprobs: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray
) -> np.ndarray:
    """f32[T, k]: what a model that named its top [T, K] and the sampled token [T] said of `tokens`, NaN of others."""
    matches = tokens[:, :, None] == top_ids[:, None, :]  # bool[T, k, K]
    named = np.where(matches, top_logprobs[:, None, :], -np.inf).max(-1, initial=-np.inf)
    known = np.where(matches.any(-1), named, np.nan)
    return np.where(tokens == sampled[:, None], logprobs[:, None], known).astype(np.float32)


def _softmax(logprobs: np.ndarray) -> np.ndarray:
    """f32[T, k] over the entries of each row that are finite; 0 at the others."""
    known = np.isfinite(logprobs)
    finite = np.where(known, logprobs, 0.0)
    peak = finite.max(-1, keepdims=True, where=known, initial=-np.inf)
    shares = np.exp(finite - peak, where=known, out=np.zeros_like(finite))
    return shares / shares.sum(-1, keepdims=True).clip(min=np.finfo(np.float32).tiny)


def _distillation(
    support: np.ndarray,
    behaviour_logprobs: np.ndarray,
    difference: np.ndarray,
    difference_clip: float,
    weights: np.ndarray | float = 1.0,
) -> Distillation:
    """Clip the differences, weigh them, and mark as invalid what is not a number; arrays [T, k]."""
    valid = ~np.isnan(difference) & np.isfinite(behaviour_logprobs)
    clipped = np.clip(difference, -difference_clip, difference_clip)
    return Distillation(
        support=support.astype(np.int32),
        behaviour_logprobs=np.where(valid, behaviour_logprobs, 0.0).astype(np.float32),
        advantages=np.where(valid, clipped * weights, 0.0).astype(np.float32),
        valid=valid,
    )


def _same_tokens(num_tokens: int, teacher: Scores) -> None:
    if len(teacher.logprobs) != num_tokens:
        raise ValueError(
            f"the teacher scored {len(teacher.logprobs)} tokens of a reply of {num_tokens}; score the sampled ids"
        )
