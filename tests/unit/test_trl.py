"""The GRPO family, from samples to loss and gradient, against TRL's own code: `GRPOTrainer._compute_loss`, which needs
no trainer, only its settings and the log-probabilities. TRL does not truncate ratios unless asked to: neither do we
here."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_policy_losses import LENGTHS, batch

from clawrl.algorithms.losses import Targets, total_loss
from clawrl.config import LearningSection
from clawrl.training.pack import pack

trl = pytest.importorskip("trl", reason="trl==1.16.0 is not installed: pip install --no-deps trl==1.16.0")

LOW, HIGH, BETA, LONGEST = 0.2, 0.28, 0.05, 12
SETTINGS: dict[str, dict[str, Any]] = {
    "GRPO": {"trl": {"loss_type": "grpo"}, "ours": {"normalise": "sample"}},
    "Dr. GRPO": {"trl": {"loss_type": "dr_grpo"}, "ours": {"normalise": "constant", "normalise_length": LONGEST}},
    "DAPO": {"trl": {"loss_type": "dapo"}, "ours": {"normalise": "token"}},
    "GSPO": {
        "trl": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        "ours": {"normalise": "sample", "policy_loss": "gspo"},
    },
    # TRL bounds CISPO's weight above alone and takes the bound itself, as the paper writes it.
    "CISPO": {
        "trl": {"loss_type": "cispo", "epsilon_high": 1 + HIGH},
        "ours": {"normalise": "token", "policy_loss": "cispo", "clip": {"low": 0.999, "high": HIGH}},
    },
    "symmetric clip": {
        "trl": {"loss_type": "grpo", "epsilon_high": LOW},
        "ours": {"normalise": "sample", "clip": {"low": LOW, "high": LOW}},
    },
}


def theirs(settings: dict[str, Any], logprobs: torch.Tensor, samples: Sequence[Any], shape: tuple[int, int]) -> Any:
    """TRL's loss of logprobs f64[B, T], padded on the right; one process, no accumulation."""
    mask = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    trainer = SimpleNamespace(
        **{
            "importance_sampling_level": "token", "epsilon_low": LOW, "epsilon_high": HIGH, "beta": BETA,
            "max_completion_length": LONGEST, "use_vllm": False, "vllm_importance_sampling_correction": False,
            "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None, "aux_loss_enabled": False,
            "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
            "model": torch.nn.Module(), "_metrics": {"train": _Lists()},
            "accelerator": SimpleNamespace(
                num_processes=1, gather=lambda each: each, reduce=lambda each, reduction: each
            ),
            "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
            "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros(shape), None),
        } | settings
    )  # fmt: skip
    ids = torch.zeros(shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": mask.double(),
        "advantages": torch.tensor([float(each.advantages[-1]) for each in samples], dtype=torch.float64),
        "old_per_token_logps": padded([each.logprobs[4:] for each in samples], shape),
        "ref_per_token_logps": padded([each.reference_logprobs[4:] for each in samples], shape),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


class _Lists(dict):
    def __missing__(self, name: str) -> list:
        return self.setdefault(name, [])


def padded(rows: Sequence[Any], shape: tuple[int, int]) -> torch.Tensor:
    table = torch.zeros(shape, dtype=torch.float64)
    for at, row in enumerate(rows):
        table[at, : len(row)] = torch.from_numpy(np.asarray(row, np.float64))
    return table


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_those_of_trl(name):
    rng = np.random.default_rng(3)
    samples: list[Any] = [
        replace(
            each, weight=1.0, reference_logprobs=(each.logprobs + rng.normal(0, 0.2, len(each.logprobs))).astype("f4")
        )
        for each in batch(rng)
    ]
    shape = (len(LENGTHS), max(LENGTHS))
    now = padded([each.logprobs[4:] + rng.normal(0, 0.4, n) for each, n in zip(samples, LENGTHS, strict=True)], shape)
    now.requires_grad_()
    expected = theirs(SETTINGS[name]["trl"], now, samples, shape)
    expected.backward()

    learning = LearningSection.model_validate({"kl_weight": BETA, "importance_cap": 1e6, **SETTINGS[name]["ours"]})
    normalised = {"normalise": learning.normalise, "normalise_length": learning.normalise_length}
    ((row,),) = pack(samples, world=1, pack_tokens=4096, version=2, **normalised)
    targets = Targets(**{key: torch.from_numpy(getattr(row, key)) for key in Targets.__slots__})
    mask = torch.arange(shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    logprobs = now.detach()[mask].requires_grad_()
    loss = total_loss(logprobs, torch.zeros(len(logprobs), 0).double(), targets, learning)
    loss.value.backward()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert now.grad is not None
    torch.testing.assert_close(logprobs.grad, now.grad[mask], rtol=1e-5, atol=1e-8)
