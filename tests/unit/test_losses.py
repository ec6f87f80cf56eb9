"""Losses against hand-computed values, autograd and finite differences."""

import math
from dataclasses import replace

import pytest
import torch

from clawrl.algorithms.losses import (
    TALLIED,
    Targets,
    clipped_policy_loss,
    importance_weights,
    k3_divergence,
    proximal_logprobs,
    tallied_means,
    tally,
    total_loss,
)
from clawrl.config import ClipSection, LearningSection

CLIP = ClipSection(low=0.2, high=0.28)
log = math.log


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_policy_loss_by_hand():
    # (ratio, A): (1.5, 2) is cut to 1.28·2, (0.5, -1) to 0.8·-1; (1.5, -1) and (0.9, 1) are kept.
    logprobs, behaviour = tensor(log(1.5), log(0.5), log(1.5), log(0.9)), tensor(0, 0, 0, 0)
    loss = clipped_policy_loss(logprobs, behaviour, tensor(2, -1, -1, 1), tensor(0.25, 0.25, 0.25, 0.25), clip=CLIP)
    assert loss.value.item() == pytest.approx(-(2.56 - 0.8 - 1.5 + 0.9) / 4)
    assert loss.clipped.tolist() == [True, True, False, False]


def test_cut_tokens_have_no_gradient_and_others_that_of_the_ratio():
    logprobs = tensor(log(1.5), log(0.5), log(1.5), log(0.9)).requires_grad_()
    weights = tensor(0.1, 0.2, 0.3, 0.4)
    clipped_policy_loss(logprobs, tensor(0, 0, 0, 0), tensor(2, -1, -1, 1), weights, clip=CLIP).value.backward()
    # d(-w·A·ratio)/dl = -w·A·ratio
    torch.testing.assert_close(logprobs.grad, tensor(0, 0, 0.3 * 1.5, -0.4 * 0.9))


def test_support_entries_are_summed_as_in_the_paper():
    # max(-A·rho, -A·clip(rho)) summed over the support, invalid entries left out.
    logprobs = torch.log(torch.tensor([[1.5, 0.5], [1.0, 2.0]], dtype=torch.float64))
    advantages = torch.tensor([[0.5, -0.25], [0.1, -0.3]], dtype=torch.float64)
    valid = torch.tensor([[True, True], [True, False]])
    weights = tensor(0.5, 0.5)[:, None] * valid
    loss = clipped_policy_loss(logprobs, torch.zeros_like(logprobs), advantages, weights, clip=CLIP)
    by_hand = 0.5 * (max(-0.75, -0.64) + max(0.125, 0.2)) + 0.5 * (-0.1)
    assert loss.value.item() == pytest.approx(by_hand)


def test_scaling_advantages_scales_the_loss():
    torch.manual_seed(0)
    logprobs, behaviour, advantages = torch.randn(3, 50, dtype=torch.float64)
    weights = torch.full((50,), 1 / 50, dtype=torch.float64)
    one = clipped_policy_loss(logprobs, behaviour, advantages, weights, clip=CLIP).value
    three = clipped_policy_loss(logprobs, behaviour, 3 * advantages, weights, clip=CLIP).value
    assert three.item() == pytest.approx(3 * one.item())


def test_k3_by_hand_and_its_gradient():
    logprobs = tensor(log(0.5), log(0.2)).requires_grad_()
    divergence = k3_divergence(logprobs, tensor(log(0.25), log(0.2)))
    torch.testing.assert_close(divergence.detach(), tensor(0.5 - 1 + log(2), 0.0))
    divergence.sum().backward()
    torch.testing.assert_close(logprobs.grad, tensor(1 - 0.5, 0.0))  # d/dl (r - 1 - log r) = 1 - r


def test_k3_estimates_the_divergence_without_bias():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.3, 0.4]).double()
    expected = (policy * (policy / reference).log()).sum()
    torch.testing.assert_close((policy * k3_divergence(policy.log(), reference.log())).sum(), expected)


def test_importance_is_truncated_and_has_no_gradient():
    behaviour = tensor(log(0.1), log(0.5), log(0.5))
    logprobs = tensor(log(0.9), log(0.45), log(0.45)).requires_grad_()
    proximal = proximal_logprobs(logprobs, behaviour, torch.tensor([True, True, False]))
    importance = importance_weights(proximal, behaviour, cap=2.0)
    torch.testing.assert_close(importance, tensor(2.0, 0.9, 1.0))  # 9 is cut; a lagging token is not corrected twice
    assert not importance.requires_grad


def targets(**changes: torch.Tensor) -> Targets:
    """Three tokens: fresh and referenced; lagging with a support of two; padding."""
    base = Targets(
        behaviour_logprobs=tensor(-1.0, -2.0, 0.0),
        advantages=tensor(1.0, -0.5, 0.0),
        reference_logprobs=tensor(-1.2, 0.0, 0.0),
        has_reference=torch.tensor([True, False, False]),
        fresh=torch.tensor([True, False, False]),
        weights=tensor(0.5, 0.5, 0.0),
        segments=torch.tensor([0, 1, 2]),
        support_behaviour_logprobs=torch.tensor([[0.0, 0.0], [-2.0, -0.3], [0.0, 0.0]], dtype=torch.float64),
        support_advantages=torch.tensor([[0.0, 0.0], [0.2, -0.4], [0.0, 0.0]], dtype=torch.float64),
        support_valid=torch.tensor([[False, False], [True, True], [False, False]]),
    )
    return replace(base, **changes)


LOGPROBS = tensor(-0.9, -2.1, -7.0)
SUPPORT = torch.tensor([[-3.0, -4.0], [-2.1, -0.35], [-9.0, -9.0]], dtype=torch.float64)


def test_total_loss_by_hand():
    learning = LearningSection(kl_weight=0.1)
    loss = total_loss(LOGPROBS, SUPPORT, targets(), learning)
    importance = math.exp(0.1)  # fresh: ratio against itself is 1
    policy = -0.5 * importance * 1.0 - 0.5 * min(-0.5 * math.exp(-0.1), -0.5 * math.exp(-0.1))
    distillation = -0.5 * (0.2 * math.exp(-0.1) - 0.4 * math.exp(-0.05))
    divergence = 0.5 * (math.exp(-0.3) - 1 + 0.3)
    assert loss.policy.value.item() == pytest.approx(policy)
    assert loss.distillation.value.item() == pytest.approx(distillation)
    assert loss.divergence.item() == pytest.approx(divergence)
    assert loss.value.item() == pytest.approx(policy + distillation + 0.1 * divergence)


def test_total_loss_gradient_agrees_with_finite_differences():
    # The fresh token's proximal and importance factors are constants: hold them at the point of differentiation.
    learning = LearningSection(kl_weight=0.1)
    lagging = targets(fresh=torch.tensor([False, False, False]))
    inputs = (LOGPROBS.clone().requires_grad_(), SUPPORT.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: total_loss(a, b, lagging, learning).value, inputs)


def test_fresh_token_gradient_is_importance_times_advantage():
    logprobs = LOGPROBS.clone().requires_grad_()
    total_loss(logprobs, SUPPORT, targets(), LearningSection(kl_weight=0)).value.backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].item() == pytest.approx(-0.5 * math.exp(0.1))
    assert logprobs.grad[2].item() == 0


def test_an_unreferenced_token_feels_no_divergence():
    logprobs = torch.tensor([-200.0, -2.1, -7.0]).double().requires_grad_()
    unreferenced = targets(has_reference=torch.tensor([False, False, False]), advantages=tensor(0.0, 0.0, 0.0))
    loss = total_loss(logprobs, SUPPORT, unreferenced, LearningSection(kl_weight=1))
    loss.divergence.backward()
    assert loss.divergence.item() == 0
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max().item() == 0


def test_statistics_by_hand():
    learning = LearningSection(kl_weight=0.1)
    loss = total_loss(LOGPROBS, SUPPORT, targets(), learning)
    sums = tally(LOGPROBS, tensor(1.0, 3.0, 50.0), loss, targets())
    means = tallied_means(sums)
    assert set(means) == set(TALLIED)
    assert means["entropy"] == pytest.approx(2.0)  # padding does not count
    assert means["mismatch"] == pytest.approx(0.1)  # the fresh token alone
    assert means["approx_kl"] == pytest.approx((math.exp(0.1) - 1.1 + math.exp(-0.1) - 0.9) / 2)
    assert means["kl"] == pytest.approx(math.exp(-0.3) - 1 + 0.3)
    assert means["clip_fraction"] == means["opd_clip_fraction"] == 0
    torch.testing.assert_close(tallied_means(sums + sums), means)


def test_a_statistic_of_nothing_is_absent():
    nothing = targets(
        has_reference=torch.tensor([False] * 3), fresh=torch.tensor([False] * 3), support_valid=torch.zeros(3, 2).bool()
    )
    means = tallied_means(tally(LOGPROBS, LOGPROBS, total_loss(LOGPROBS, SUPPORT, nothing, LearningSection()), nothing))
    assert set(means) == {"clip_fraction", "approx_kl", "entropy"}
