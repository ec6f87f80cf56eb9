"""Losses: differentiable terms over packed tokens, and the statistics that go with them. Pure torch.

Knows tensors of one packed row: S scored tokens, support of k tokens each. Ignores which method made the targets, how
tokens were packed and how many ranks share a batch: `segments` says which tokens are one reply's, `weights` carries the
normalisation (see `training.pack`), so that terms of all rows and ranks are simply summed. Reading order: the terms,
then `total_loss`, then `tally`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clawrl.config import ClipSection, LearningSection


@dataclass(frozen=True, slots=True)
class Targets:
    """What one row is trained towards; torch twins of `training.pack.PackedRow`, all on one device."""

    behaviour_logprobs: Tensor  # f32[S], by the engine at sampling
    advantages: Tensor  # f32[S], 0 where there is no policy-gradient term
    reference_logprobs: Tensor  # f32[S], 0 where has_reference is false
    has_reference: Tensor  # bool[S]
    fresh: Tensor  # bool[S], sampled under the very weights this step starts from
    weights: Tensor  # f32[S], sums to 1 over all rows and ranks (unless by a constant length); 0 in padding
    segments: Tensor  # i64[S], from 0: tokens of one reply share one, and a reply is never spread over rows
    support_behaviour_logprobs: Tensor  # f32[S, k]
    support_advantages: Tensor  # f32[S, k]
    support_valid: Tensor  # bool[S, k]
    teacher_logprobs: Tensor  # f32[S, K], of the tokens it named, -inf beyond them
    teacher_weights: Tensor  # f32[S], 0 where there is no divergence from a teacher


@dataclass(frozen=True, slots=True)
class Loss:
    """A term summed over its tokens (scalar), and where its surrogate was cut (bool, the entries' shape)."""

    value: Tensor
    clipped: Tensor


@dataclass(frozen=True, slots=True)
class TotalLoss:
    """The objective (scalar) and its parts, unweighted."""

    value: Tensor
    policy: Loss
    distillation: Loss  # surrogate over a support, and divergence from a teacher
    divergence: Tensor  # from the reference


def clipped_policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: ClipSection,
    cap: float = math.inf,
    importance: Tensor | None = None,
) -> Loss:
    """PPO clipped surrogate (arXiv:1707.06347, eq. 7) over entries of any one shape, [S] or [S, k].

    weights include the sign-free normalisation 1 / (number of trained tokens of all ranks); importance is the
    truncated correction of `importance_weights`, no part of the gradient. A ratio above `cap`, which the clip bounds
    for positive advantages only, counts as `cap`: truncated importance sampling of what an older policy sampled.
    """
    ratio = (logprobs - behaviour_logprobs).exp()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    surrogate = torch.minimum(ratio * advantages, bounded * advantages) * (cap / ratio.detach()).clamp(max=1)
    if importance is not None:
        surrogate = surrogate * importance
    clipped = (bounded * advantages).detach() < (ratio * advantages).detach()
    return Loss(-(surrogate * weights).sum(), clipped)


def sequence_policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    segments: Tensor,
    *,
    clip: ClipSection,
    cap: float = math.inf,
    importance: Tensor | None = None,
) -> Loss:
    """GSPO (arXiv:2507.18071): PPO's surrogate with one ratio per reply, s = exp(mean_t (l_t - l_old_t)), all [S].

    In the form of its GSPO-token variant, s_t = sg(s) · exp(l_t - sg(l_t)), which has the value and the gradient of
    GSPO where a reply has one advantage, and is defined where its tokens differ. The mean is over the reply's scored
    tokens, whatever shares the row with it.
    """
    log_ratio = (logprobs - behaviour_logprobs).detach()
    nothing = torch.zeros_like(log_ratio)  # there are no more replies than scored tokens
    sums = nothing.index_add(0, segments, log_ratio)
    counts = nothing.index_add(0, segments, torch.ones_like(log_ratio))
    mean = (sums / counts.clamp(min=1))[segments]
    sequence = mean + logprobs - logprobs.detach()
    return clipped_policy_loss(
        sequence, torch.zeros_like(sequence), advantages, weights, clip=clip, cap=cap, importance=importance
    )


def weighted_policy_loss(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    clip: ClipSection,
    importance: Tensor | None = None,
) -> Loss:
    """CISPO (arXiv:2506.13585, eq. 4 and 5): -w · sg(clip(ratio, 1 - low, 1 + high)) · A · l, all [S].

    REINFORCE with a bounded importance weight: every token keeps a gradient. `clipped` says where the weight was cut.
    The paper leaves the weight unbounded below: `clip.low` close to 1.
    """
    ratio = (logprobs - behaviour_logprobs).detach().exp()
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    objective = bounded * advantages * logprobs
    if importance is not None:
        objective = objective * importance
    return Loss(-(objective * weights).sum(), bounded != ratio)


def k3_divergence(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative: r - 1 - log r with r = reference / policy.

    Schulman's k3, as in GRPO (arXiv:2402.03300, eq. 4); same shape as its arguments.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def reverse_kl(logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(policy || teacher) per position, [S], over K tokens that the teacher named, [S, K], and one bin of all others.

    Σ_v p_v (log p_v - log q_v) + p_tail (log p_tail - log q_tail), as published for SDFT (arXiv:2601.19897) and SDPO
    (arXiv:2601.20802); never negative, and at most the divergence over the whole vocabulary. A token that the teacher
    gives -inf is none that it named: its entry is empty on both sides.
    """
    empty, lowest = torch.isneginf(teacher_logprobs), torch.finfo(logprobs.dtype).min
    logprobs, teacher_logprobs = (each.masked_fill(empty, lowest) for each in (logprobs, teacher_logprobs))
    tail, teacher_tail = log_tail(logprobs), log_tail(teacher_logprobs)
    named = (logprobs.exp() * (logprobs - teacher_logprobs)).sum(-1)
    return named + tail.exp() * (tail - teacher_tail)


def log_tail(logprobs: Tensor) -> Tensor:
    """log(1 - Σ_v p_v) over the last axis, at least the log of the type's resolution below 1.

    As log(-expm1(logsumexp)), which keeps the digits of a small tail. Where rounding leaves no tail, or less than
    that, it is held there and has no gradient.
    """
    resolution = torch.finfo(logprobs.dtype).eps
    return (-torch.expm1(logprobs.logsumexp(-1).clamp(max=-resolution))).log()


def proximal_logprobs(logprobs: Tensor, behaviour_logprobs: Tensor, fresh: Tensor) -> Tensor:
    """Log-probabilities of the sampling weights as best known, [S], no part of the gradient.

    A step starts from the weights it is about to change and takes one update per batch. For a token sampled under
    those same weights (lag 0) the trainer's own log-probability *is* l_train_old, exactly. For an older token the
    weights that sampled it are gone; the engine's log-probability is the only witness, and l_train_old = l_rollout.
    """
    return torch.where(fresh, logprobs.detach(), behaviour_logprobs)


def importance_weights(proximal: Tensor, behaviour_logprobs: Tensor, cap: float) -> Tensor:
    """Truncated importance sampling of the train/inference mismatch: min(exp(l_train_old - l_rollout), cap), [S].

    1 wherever `proximal_logprobs` had to fall back on the engine's: there, staleness and mismatch stand together in
    the surrogate's own ratio, clipped and truncated at the same cap, and must not be corrected twice.
    """
    return (proximal - behaviour_logprobs).detach().exp().clamp(max=cap)


def total_loss(logprobs: Tensor, support_logprobs: Tensor, targets: Targets, learning: LearningSection) -> TotalLoss:
    """Sum over tokens of weight x [importance·policy_loss(sampled) + OPD + kl_weight·k3] (ALGORITHM.md §2), where OPD
    is Σ_support PPO + min(rho, importance_cap)·reverse_kl, of which a sample has the one or the other.

    logprobs f32[S] and support_logprobs f32[S, k + K] are the current model's, of the support's k tokens and of the K
    that the teacher named. The weights of the RL and OPD terms are already inside the advantages (every form of the
    surrogate is positively homogeneous in them) and the teacher's weights.
    """
    policy = _policy_term(logprobs, targets, learning)
    support_logprobs, named_logprobs = support_logprobs.tensor_split([targets.support_valid.shape[1]], dim=1)
    surrogate = clipped_policy_loss(
        support_logprobs,
        targets.support_behaviour_logprobs,
        targets.support_advantages,
        targets.weights[:, None] * targets.support_valid,
        clip=learning.clip,
        cap=learning.importance_cap,
    )
    distillation = Loss(surrogate.value + _teacher_term(logprobs, named_logprobs, targets, learning), surrogate.clipped)
    reference_weights = targets.weights * targets.has_reference
    # Unreferenced tokens are compared with themselves: 0 with a zero gradient, whatever their log-probability.
    reference = torch.where(targets.has_reference, targets.reference_logprobs, logprobs.detach())
    divergence = (k3_divergence(logprobs, reference) * reference_weights).sum()
    value = policy.value + distillation.value
    if learning.kl_weight:
        value = value + learning.kl_weight * divergence
    return TotalLoss(value, policy, distillation, divergence)


def _policy_term(logprobs: Tensor, targets: Targets, learning: LearningSection) -> Loss:
    """The form of the policy-gradient term that `policy_loss` names."""
    proximal = proximal_logprobs(logprobs, targets.behaviour_logprobs, targets.fresh)
    importance = importance_weights(proximal, targets.behaviour_logprobs, learning.importance_cap)
    arguments = (logprobs, proximal, targets.advantages, targets.weights)
    if learning.policy_loss == "cispo":  # its clip bounds every ratio
        return weighted_policy_loss(*arguments, clip=learning.clip, importance=importance)
    cap = learning.importance_cap
    if learning.policy_loss == "gspo":
        return sequence_policy_loss(*arguments, targets.segments, clip=learning.clip, cap=cap, importance=importance)
    return clipped_policy_loss(*arguments, clip=learning.clip, cap=cap, importance=importance)


def _teacher_term(logprobs: Tensor, named_logprobs: Tensor, targets: Targets, learning: LearningSection) -> Tensor:
    """The divergence from the teacher, summed. A prefix that another policy sampled counts by its last token's ratio,
    truncated: the one that lag and mismatch are seen by.
    """
    if named_logprobs.shape[1] == 0:
        return named_logprobs.sum()
    importance = importance_weights(logprobs, targets.behaviour_logprobs, learning.importance_cap)
    return (
        reverse_kl(named_logprobs, targets.teacher_logprobs) * importance * targets.weights * targets.teacher_weights
    ).sum()


TALLIED = ("clip_fraction", "opd_clip_fraction", "approx_kl", "entropy", "mismatch", "kl")
"""Statistics of `tally`, means over their own tokens."""


@torch.no_grad()
def tally(logprobs: Tensor, entropy: Tensor, loss: TotalLoss, targets: Targets) -> Tensor:
    """f64[len(TALLIED), 2]: sum and count of each statistic over the row's trained tokens, to be added up.

    clip fractions: share of tokens (support entries) whose gradient the clip cut. approx_kl: k3 of behaviour against
    current, staleness and mismatch together. mismatch: mean |l_train - l_rollout| at lag 0. kl: k3 against reference.
    """
    trained = targets.weights > 0
    drift = logprobs - targets.behaviour_logprobs
    entries = [
        (loss.policy.clipped, trained & (targets.advantages != 0)),
        (loss.distillation.clipped, trained[:, None] & targets.support_valid),
        (drift.exp() - 1 - drift, trained),
        (entropy, trained),
        (drift.abs(), trained & targets.fresh),
        (k3_divergence(logprobs, targets.reference_logprobs), trained & targets.has_reference),
    ]
    return torch.stack([_sum_and_count(values, mask) for values, mask in entries])


def tallied_means(sums: Tensor) -> dict[str, float]:
    """The means of `tally`'s sums; a statistic that nothing counted for is left out."""
    return {name: total / count for name, (total, count) in zip(TALLIED, sums.tolist(), strict=True) if count > 0}


def _sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([torch.where(mask, values, 0).double().sum(), mask.double().sum()])
