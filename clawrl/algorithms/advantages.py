"""Advantages: what each reply token is worth, by a judge's score, a group's outcomes or a teacher's view. Pure numpy.

Knows the arrays of a reply (T tokens, support of k tokens per position, K tokens scored by the teacher). Ignores how
they were captured or judged and which loss uses them. All log-probabilities are natural, full-vocabulary, at
temperature 1. What a teacher did not say is marked invalid, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from clawrl.types import Distillation, Scores

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
    """On-policy distillation over the student's top-k tokens (ALGORITHM.md §2; SDFT 2601.19897, SDPO 2601.20802).

    support i32[T, k] and support_logprobs f32[T, k] are the student's at sampling. With w = softmax over the support
    of l_old and D = clip(l_T - l_old, -C, C), the advantages are A = D·w.

    The teacher names its K likeliest tokens and the sampled one. Any other token's log-probability is at most the
    K-th's: if even that bound lies C or more below l_old then D = -C exactly; otherwise the entry is invalid.
    """
    _same_tokens(len(completion_ids), teacher)
    known, bound = teacher_logprobs(completion_ids, support, teacher)
    far_below = np.isnan(known) & (bound - support_logprobs <= -difference_clip)
    difference = np.where(far_below, -difference_clip, known - support_logprobs)
    shifted = np.exp(support_logprobs - support_logprobs.max(-1, keepdims=True))
    weights = shifted / shifted.sum(-1, keepdims=True)
    return _distillation(support, support_logprobs, difference, difference_clip, weights)


def teacher_logprobs(completion_ids: np.ndarray, support: np.ndarray, teacher: Scores) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's log-probabilities of support tokens, f32[T, k], NaN where it did not say, and a bound f32[T, 1].

    The bound is the smallest of the teacher's top K, above which no unnamed token can lie (0 if it named none).
    """
    matches = support[:, :, None] == teacher.top_ids[:, None, :]  # bool[T, k, K]
    named = np.where(matches, teacher.top_logprobs[:, None, :], -np.inf).max(-1, initial=-np.inf)
    known = np.where(matches.any(-1), named, np.nan)
    known = np.where(support == completion_ids[:, None], teacher.logprobs[:, None], known)
    bound = teacher.top_logprobs.min(-1, keepdims=True, initial=0.0)
    return known.astype(np.float32), bound.astype(np.float32)


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
