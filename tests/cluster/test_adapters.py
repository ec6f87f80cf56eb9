"""Versions as adapters: what the trainer learns and writes is what PEFT reads, and the model itself stays as it is."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from test_trainer import BASE, BATCH, LEARNING, SETTINGS, alone, make_sample, tensors  # noqa: F401
from transformers import AutoModelForCausalLM

from clawrl.config import LoraSection
from clawrl.errors import WeightSyncError
from clawrl.training.adapter import description
from clawrl.training.checkpoint import export_checkpoint, read_buckets, require_whole, write_adapter
from clawrl.training.learner import Learner
from clawrl.training.rank import canary_sequences
from clawrl.training.resume import TrainerCheckpoints
from clawrl.types import EMA, Canary, Sample

pytestmark = pytest.mark.cluster

LORA = LoraSection(rank=8, alpha=16, targets=("q_proj", "v_proj", "down_proj"))
SEQUENCES = canary_sequences(BASE)


def make(alone, lora: LoraSection | None = LORA, learning=LEARNING, **settings) -> Learner:  # noqa: F811
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Learner(BASE, SETTINGS.model_copy(update={"learning_rate": 5e-3, **settings}), learning, alone, lora)


@pytest.fixture
def learner(alone) -> Learner:  # noqa: F811
    return make(alone)


def batch() -> list[Sample]:
    return [make_sample(i, version=-1) for i in range(BATCH)]


def furthest(one: Canary, other: Canary) -> float:
    return max(np.abs(a - b).max() for a, b in zip(one.logprobs, other.logprobs, strict=True))


def test_an_untrained_adapter_changes_nothing_and_learns(learner, alone):  # noqa: F811
    plain = make(alone, lora=None)
    assert furthest(learner.canary(SEQUENCES), plain.canary(SEQUENCES)) < 1e-5
    losses = [learner.update(batch(), 0)["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert furthest(learner.canary(SEQUENCES), plain.canary(SEQUENCES)) > 1e-3


def test_peft_reads_what_is_published(learner, tmp_path):
    learner.update(batch(), 0)
    published = list(learner.buckets(40_000))
    assert len(published) > 1
    canary = learner.canary(SEQUENCES)
    write_adapter(tmp_path / "1", published, description(LORA, BASE), canary)
    require_whole(tmp_path / "1")
    export_checkpoint(tmp_path / "1", tmp_path / "mine")

    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), tmp_path / "mine"
    )
    for ids, expected in zip(canary.token_ids, canary.logprobs, strict=True):
        with torch.no_grad():
            logprobs = whole(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].log_softmax(-1)
        found = logprobs[:-1].gather(1, torch.from_numpy(ids[1:].astype(np.int64))[:, None])[:, 0]
        assert found.numpy() == pytest.approx(expected, abs=1e-5)


def test_a_version_is_taken_over_again_and_version_0_is_the_start(learner, alone, tmp_path):  # noqa: F811
    start = tensors(learner.buckets(1 << 30))
    learner.update(batch(), 0)
    canary = learner.canary(SEQUENCES)
    write_adapter(tmp_path / "1", list(learner.buckets(1 << 30)), description(LORA, BASE), canary)
    learner.update(batch(), 1)

    learner.load(read_buckets(tmp_path / "1", 30_000))
    assert furthest(learner.canary(SEQUENCES), canary) < 1e-6
    learner.load([])
    assert {name: array.tolist() for name, array in tensors(learner.buckets(1 << 30)).items()} == {
        name: array.tolist() for name, array in start.items()
    }


def test_the_moving_average_travels_with_its_version(alone, tmp_path):  # noqa: F811
    averaging = LEARNING.model_copy(update={"teacher": "ema", "ema_decay": 0.75})
    learner = make(alone, learning=averaging)
    expected = parts(learner)[0]
    for version in range(3):
        learner.update(batch(), version)
        weights, average = parts(learner)
        expected = {name: 0.75 * old + 0.25 * weights[name] for name, old in expected.items()}
        assert average.keys() == weights.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(average[name], array, atol=1e-6)
    assert max(np.abs(average[name] - weights[name]).max() for name in weights) > 1e-3

    folder, canary = tmp_path / "3", learner.canary(SEQUENCES)
    published = [each for each in learner.buckets(40_000) if each]
    write_adapter(folder, published, description(LORA, BASE), canary)
    export_checkpoint(folder, tmp_path / "mine")
    assert sorted(each.name for each in (tmp_path / "mine").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    learner.update(batch(), 3)
    learner.load(read_buckets(folder, 30_000))
    assert same(parts(learner), (weights, average))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightSyncError, match="has no"):
        require_whole(folder)

    write_adapter(folder, [each for each in make(alone).buckets(40_000) if each], description(LORA, BASE), canary)
    learner.load(read_buckets(folder, 30_000))
    assert same(*([part] for part in parts(learner))), "an average that a version lacks begins with it"
    learner.update(batch(), 3)
    learner.load([])
    assert same(parts(learner), parts(make(alone, learning=averaging)))


def test_an_average_may_begin_in_the_middle_of_a_run_of_16_bits(alone, tmp_path):  # noqa: F811
    """The state that was saved without it is taken as it is: moments, and weights of float32."""
    states, half = TrainerCheckpoints(tmp_path, every=1), make(alone, dtype="bfloat16")
    half.update(batch(), 0)
    states.save((1, 0), half.state())
    averaging = make(alone, learning=LEARNING.model_copy(update={"teacher": "ema"}), dtype="bfloat16")
    averaging.load([each for each in half.buckets(1 << 30) if each])
    assert any(name.endswith("/average") for name in averaging.state())
    assert states.load((1, 0), averaging.state())
    expected, found = half.state(), averaging.state()
    assert all(torch.equal(each, found[name]) for name, each in expected.items())


def parts(learner: Learner) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is published of the weights, and of their average under the same names."""
    found = tensors(learner.buckets(40_000))
    averages = {name for name in found if name.startswith(EMA)}
    plain = {name: array for name, array in found.items() if name not in averages}
    return plain, {name.removeprefix(EMA): found[name] for name in averages}


def same(one, other) -> bool:
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
        for a, b in zip(one, other, strict=True)
    )


def test_an_adapter_of_other_layers_is_refused(learner, alone):  # noqa: F811
    other = make(alone, LORA.model_copy(update={"targets": ("k_proj",)}))
    with pytest.raises(WeightSyncError, match="lacks"):
        learner.load(list(other.buckets(1 << 30)))


def test_recomputed_activations_change_nothing(learner, alone):  # noqa: F811
    thrifty = make(alone, pack_tokens=256, activation_checkpointing=True)
    one, other = learner.update(batch(), 0), thrifty.update(batch(), 0)
    for key in ("loss", "grad_norm", "update_norm"):
        assert other[key] == pytest.approx(one[key], rel=1e-4), key


def test_a_frozen_base_in_16_bits(alone):  # noqa: F811
    """The adapter's own weights stay float32, and its steps are about those of float32 altogether."""
    half, full = make(alone, dtype="bfloat16"), make(alone)
    one, other = half.update(batch(), 0), full.update(batch(), 0)
    assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert {bucket.dtypes[0] for bucket in half.buckets(1 << 30) if bucket} == {"bfloat16"}
    assert {str(each.dtype) for each in half._parameters.values()} == {"torch.float32"}
