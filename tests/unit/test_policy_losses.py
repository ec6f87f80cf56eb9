"""GSPO, CISPO and normalisations, from samples to loss, against the papers' equations as plain loops, and autograd."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from clawrl.algorithms.losses import (
    Loss,
    Targets,
    clipped_policy_loss,
    sequence_policy_loss,
    total_loss,
    weighted_policy_loss,
)
from clawrl.config import ClipSection, LearningSection
from clawrl.training.pack import pack
from clawrl.types import Sample

CLIP = ClipSection(low=0.2, high=0.28)
LENGTHS = (3, 1, 5, 2, 8)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_gspo_by_hand():
    # Two replies, interleaved nowhere: ratios (2, .5, 1) have the geometric mean 1; (1.5, 1.5) are cut to 1.28.
    logprobs = torch.log(tensor(2, 0.5, 1, 1.5, 1.5)).requires_grad_()
    segments, weights = torch.tensor([0, 0, 0, 1, 1]), tensor(1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4)
    advantages = tensor(-1, -1, -1, 2, 2)
    loss = sequence_policy_loss(logprobs, torch.zeros(5).double(), advantages, weights, segments, clip=CLIP)
    assert loss.value.item() == pytest.approx(-(0.5 * -1.0 + 0.5 * 2 * 1.28))
    assert loss.clipped.tolist() == [False] * 3 + [True] * 2
    loss.value.backward()
    # d/dl_t of -(1/2)·s·A is -(1/2)·A·s/3; a cut reply has no gradient.
    torch.testing.assert_close(logprobs.grad, tensor(1 / 6, 1 / 6, 1 / 6, 0, 0))


def test_cispo_by_hand():
    logprobs = torch.log(tensor(1.5, 0.5, 0.9)).requires_grad_()
    behaviour, advantages, weights = torch.log(tensor(1, 1, 1)), tensor(2, -1, 1), tensor(0.5, 0.3, 0.2)
    loss = weighted_policy_loss(logprobs, behaviour, advantages, weights, clip=CLIP)
    by_hand = 0.5 * 1.28 * 2 * math.log(1.5) - 0.3 * 0.8 * math.log(0.5) + 0.2 * 0.9 * math.log(0.9)
    assert loss.value.item() == pytest.approx(-by_hand)
    assert loss.clipped.tolist() == [True, True, False]
    loss.value.backward()
    torch.testing.assert_close(logprobs.grad, -tensor(0.5 * 1.28 * 2, 0.3 * 0.8 * -1, 0.2 * 0.9))  # none is lost


def test_at_ratio_one_all_forms_have_the_gradient_of_reinforce():
    torch.manual_seed(0)
    start, advantages = torch.randn(2, 6, dtype=torch.float64)
    segments, weights = torch.tensor([0, 0, 1, 1, 1, 2]), torch.rand(6, dtype=torch.float64)
    forms: list[Callable[..., Loss]] = [
        clipped_policy_loss,
        weighted_policy_loss,
        lambda *arguments, **named: sequence_policy_loss(*arguments, segments=segments, **named),
    ]
    for form in forms:
        logprobs = start.clone().requires_grad_()
        form(logprobs, start, advantages, weights, clip=CLIP).value.backward()
        torch.testing.assert_close(logprobs.grad, -weights * advantages)


def batch(rng: np.random.Generator) -> list[Sample]:
    """Replies of several lengths, one advantage each, all sampled by an older version."""
    made = []
    for number, length in enumerate(LENGTHS):
        total = 4 + length
        mask = np.arange(total) >= 4
        made.append(
            Sample(
                id=f"turn-{number}",
                user="ada",
                source="chat",
                token_ids=rng.integers(0, 50, total).astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, rng.normal(-2, 0.3, total), 0).astype(np.float32),
                advantages=np.where(mask, rng.normal(), 0).astype(np.float32),
                distillation=None,
                reference_logprobs=None,
                oldest_version=1,
                newest_version=1,
                weight=float(rng.uniform(0.5, 2)),
                at=0.0,
            )
        )
    return made


def reference(form: str, normalise: str, samples: Sequence[Sample], now: Sequence[list[torch.Tensor]], constant: int):
    """The objective to maximise, reply by reply and token by token, as the papers write it."""
    low, high = 1 - CLIP.low, 1 + CLIP.high
    of_samples = sum(sample.weight for sample in samples)
    of_tokens = sum(sample.weight * len(current) for sample, current in zip(samples, now, strict=True))
    objective = torch.zeros((), dtype=torch.float64)
    for sample, current in zip(samples, now, strict=True):
        old = [float(value) for value in sample.logprobs[sample.loss_mask]]
        assert sample.advantages is not None
        advantage = float(sample.advantages[sample.loss_mask][0])
        scale = {
            "sample": sample.weight / of_samples / len(old),
            "token": sample.weight / of_tokens,
            "constant": sample.weight / of_samples / constant,
        }[normalise]
        log_ratios = [logprob - before for logprob, before in zip(current, old, strict=True)]
        whole = torch.exp(torch.stack(log_ratios).mean())
        for logprob, log_ratio in zip(current, log_ratios, strict=True):
            ratio = whole if form == "gspo" else torch.exp(log_ratio)
            cut = torch.clamp(ratio, low, high)
            term = (
                cut.detach() * advantage * logprob if form == "cispo" else torch.min(ratio * advantage, cut * advantage)
            )
            objective = objective + scale * term
    return -objective


@pytest.mark.parametrize("normalise", ["sample", "token", "constant"])
@pytest.mark.parametrize("form", ["ppo", "gspo", "cispo"])
def test_packed_loss_and_gradient_equal_the_equations(form, normalise):
    """Through pack: replies share rows and are spread over two ranks, the sum is what the papers say of the batch."""
    rng = np.random.default_rng(7)
    samples = batch(rng)
    shifts = [rng.normal(0, 0.25, length) for length in LENGTHS]
    now = [
        [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in sample.logprobs[4:] + shift]
        for sample, shift in zip(samples, shifts, strict=True)
    ]
    expected = reference(form, normalise, samples, now, constant=12)
    expected.backward()
    gradients = {(i, t): leaf.grad for i, row in enumerate(now) for t, leaf in enumerate(row)}

    learning = LearningSection.model_validate(
        {"policy_loss": form, "normalise": normalise, "normalise_length": 12, "kl_weight": 0, "clip": CLIP}
    )
    ranks = pack(samples, world=2, pack_tokens=40, normalise=learning.normalise, normalise_length=12, version=2)
    total, found = 0.0, 0
    for row in (row for rank in ranks for row in rank):
        targets = Targets(**{name: torch.from_numpy(getattr(row, name)) for name in Targets.__slots__})
        owner = [place(samples, row.token_ids[a:b]) for a, b in pairwise(row.bounds)]
        at = [(owner[s], int(p) - row.bounds[s] - 3) for s, p in zip(row.segments, row.positions, strict=True)]
        logprobs = torch.stack([now[i][t].detach() for i, t in at]).requires_grad_()
        loss = total_loss(logprobs, torch.zeros(len(at), 0).double(), targets, learning)
        loss.value.backward()
        total += loss.value.item()
        assert logprobs.grad is not None
        for place_, gradient in zip(at, logprobs.grad, strict=True):
            wanted = gradients[place_]
            assert wanted is not None
            assert gradient.item() == pytest.approx(wanted.item(), rel=1e-5, abs=1e-9)
            found += 1
    assert total == pytest.approx(expected.item(), rel=1e-5)
    assert found == sum(LENGTHS)
    assert len(ranks[0]) == 1


def place(samples: Sequence[Sample], token_ids: np.ndarray) -> int:
    [found] = [i for i, sample in enumerate(samples) if np.array_equal(sample.token_ids, token_ids)]
    return found


def test_the_forms_do_differ():
    """So that the comparison above cannot pass by all forms being one."""
    torch.manual_seed(1)
    logprobs, old = torch.randn(2, 5, dtype=torch.float64) * 0.4
    arguments = (logprobs, old, tensor(1, 1, -1, -1, -1), torch.full((5,), 0.2).double())
    segments = torch.tensor([0, 0, 1, 1, 1])
    values = [
        clipped_policy_loss(*arguments, clip=CLIP).value,
        sequence_policy_loss(*arguments, segments, clip=CLIP).value,
        weighted_policy_loss(*arguments, clip=CLIP).value,
    ]
    assert len({round(value.item(), 6) for value in values}) == 3
