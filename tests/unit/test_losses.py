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
    log_tail,
    proximal_logprobs,
    reverse_kl,
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


def test_a_ratio_above_the_cap_counts_as_the_cap():
    """What the clip leaves unbounded: a token of an older policy that has become likelier, and was bad."""
    logprobs = tensor(log(8), log(8), log(1.5), log(0.5)).requires_grad_()
    weights = tensor(0.25, 0.25, 0.25, 0.25)
    loss = clipped_policy_loss(logprobs, tensor(0, 0, 0, 0), tensor(-1, 2, -1, -1), weights, clip=CLIP, cap=2.0)
    # The second is cut at 1.28 by the clip, and its share of 2 / 8 has no gradient all the same.
    assert loss.value.item() == pytest.approx(-(-2 + 2 * 1.28 / 4 - 1.5 - 0.8) / 4)
    loss.value.backward()
    torch.testing.assert_close(logprobs.grad, tensor(2 / 4, 0, 1.5 / 4, 0))


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


def test_reverse_kl_by_hand():
    # p = .5, .3 and .2 left; q = .25, .25 and .5 left.
    divergence = reverse_kl(torch.log(tensor(0.5, 0.3))[None], torch.log(tensor(0.25, 0.25))[None])
    assert divergence.item() == pytest.approx(0.5 * log(2) + 0.3 * log(1.2) + 0.2 * log(0.4))
    assert log_tail(torch.log(tensor(0.5, 0.3))).exp().item() == pytest.approx(0.2)


def test_reverse_kl_is_the_whole_divergence_where_one_token_is_left_and_less_where_more_are():
    torch.manual_seed(0)
    policy, teacher = torch.randn(2, 20, 6, dtype=torch.float64).log_softmax(-1)
    whole = torch.nn.functional.kl_div(teacher, policy, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(reverse_kl(policy[:, :5], teacher[:, :5]), whole)
    binned = reverse_kl(policy[:, :2], teacher[:, :2])
    assert (binned > 0).all()
    assert (binned < whole).all()


def test_reverse_kl_gradient_agrees_with_finite_differences_and_is_none_where_they_agree():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2, 4, 9, dtype=torch.float64)
    named = teacher.log_softmax(-1)[:, :3]
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reverse_kl(x.log_softmax(-1)[:, :3], named), (logits,))
    reverse_kl(logits.log_softmax(-1)[:, :3], logits.detach().log_softmax(-1)[:, :3]).sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().max().item() < 1e-12


@pytest.mark.parametrize("sure", [0.0, 5.0, 15.0, 17.0, 30.0, 200.0])
@pytest.mark.parametrize("teacher_sure", [0.0, 17.0, 200.0])
def test_a_sure_policy_or_teacher_gives_finite_numbers(sure, teacher_sure):
    """In float32, the other tokens' share from 3/4 to below the smallest number; against float64 where that has one."""
    logits = torch.tensor([[sure, 0.0, 0.5, -0.5]]).requires_grad_()
    teacher = torch.tensor([[teacher_sure, 0.0, -0.5, 0.5]]).log_softmax(-1)
    divergence = reverse_kl(logits.log_softmax(-1)[:, :2], teacher[:, :2])
    divergence.sum().backward()
    assert logits.grad is not None
    assert divergence.isfinite().all()
    assert logits.grad.isfinite().all()
    if max(sure, teacher_sure) <= 5:
        double = logits.detach().double().requires_grad_()
        exact = reverse_kl(double.log_softmax(-1)[:, :2], teacher.double()[:, :2])
        exact.sum().backward()
        assert divergence.item() == pytest.approx(exact.item(), abs=1e-6)
        torch.testing.assert_close(logits.grad.double(), double.grad, atol=1e-5, rtol=1e-4)


def test_an_entry_that_names_no_token_is_empty():
    policy, teacher = torch.log(tensor(0.5, 0.3, 0.1))[None].requires_grad_(), torch.log(tensor(0.25, 0.25, 0.0))[None]
    divergence = reverse_kl(policy, teacher)
    torch.testing.assert_close(divergence, reverse_kl(policy[:, :2], teacher[:, :2]))
    reverse_kl(policy, torch.full((1, 3), -math.inf).double()).sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().max().item() == 0


def test_the_teachers_term_of_the_loss_by_hand():
    """Weighted, and by the ratio of the sampled token, which is truncated and no part of the gradient."""
    named = torch.log(torch.tensor([[0.5, 0.3], [0.6, 0.2], [0.5, 0.5]], dtype=torch.float64)).requires_grad_()
    taught = targets(
        advantages=tensor(0, 0, 0),
        support_valid=torch.zeros(3, 2).bool(),
        behaviour_logprobs=tensor(-1.0, -5.1, 0.0),
        teacher_logprobs=torch.log(torch.tensor([[0.25, 0.25], [0.2, 0.2], [0.5, 0.5]], dtype=torch.float64)),
        teacher_weights=tensor(2.0, 0.5, 1.0),
    )
    logprobs = LOGPROBS.clone().requires_grad_()
    loss = total_loss(logprobs, torch.cat([SUPPORT, named], dim=1), taught, LearningSection(kl_weight=0))
    first = 0.5 * log(2) + 0.3 * log(1.2) + 0.2 * log(0.4)
    second = 0.6 * log(3) + 0.2 * log(1) + 0.2 * log(1 / 3)
    # Ratios exp(.1), and exp(3) cut to 2; the third token is padding.
    assert loss.value.item() == pytest.approx(0.5 * 2.0 * math.exp(0.1) * first + 0.5 * 0.5 * 2 * second)
    assert loss.distillation.value.item() == pytest.approx(loss.value.item())
    loss.value.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max().item() == 0
    assert named.grad is not None
    # d/dl_v = p_v (log p_v/q_v - log p_tail/q_tail)
    expected = 0.5 * 2.0 * math.exp(0.1) * 0.5 * (log(2) - log(0.4))
    assert named.grad[0, 0].item() == pytest.approx(expected)
    assert named.grad[2].abs().max().item() == 0


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
        teacher_logprobs=torch.zeros(3, 0, dtype=torch.float64),
        teacher_weights=tensor(0.0, 0.0, 0.0),
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
