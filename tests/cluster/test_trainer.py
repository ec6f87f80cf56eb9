"""The trainer: two gloo workers under Ray Train against one in this process, and a rank that is killed."""

import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from clawrl.config import BufferSection, LearningSection, TrainerSection, VersionsSection, model_path
from clawrl.journal.actor import Journal
from clawrl.training.buffer import ReplayBuffer
from clawrl.training.checkpoint import read_buckets, read_canary
from clawrl.training.learner import Learner
from clawrl.training.trainer import TrainLoop, canary_sequences, run_trainer
from clawrl.training.weights import WeightStore
from clawrl.types import Bucket, Distillation, Sample, WeightVersion

pytestmark = pytest.mark.cluster

BASE = model_path("clawrl:tiny")
BATCH = 6
SETTINGS = TrainerSection(workers=2, nice=0, learning_rate=1e-4, pack_tokens=512, logit_chunk=64, max_failures=1)
LEARNING = LearningSection(kl_weight=0.05)
VERSIONS = VersionsSection(bucket_mib=1, keep=10)


def get(asked: Any) -> Any:
    """ray.get, of whatever type the answer is."""
    return ray.get(asked)


def make_sample(number: int, version: int = 0, seed: int | None = None) -> Sample:
    """A sample with every term; `seed` (default: its number) makes its contents."""
    rng = np.random.default_rng(number if seed is None else seed)
    prompt, reply, k = int(rng.integers(20, 120)), int(rng.integers(8, 50)), 4
    length = prompt + reply
    mask = np.arange(length) >= prompt
    logprobs = np.where(mask, rng.normal(-2, 0.5, length), 0).astype(np.float32)
    target = Distillation(
        support=rng.integers(0, 1500, (length, k)).astype(np.int32),
        behaviour_logprobs=rng.normal(-2, 0.3, (length, k)).astype(np.float32),
        advantages=rng.normal(0, 0.3, (length, k)).astype(np.float32),
        valid=(rng.random((length, k)) < 0.8) & mask[:, None],
    )
    return Sample(
        id=f"turn-{number}", user="ada", source="chat", token_ids=rng.integers(0, 1500, length).astype(np.int32),
        loss_mask=mask, logprobs=logprobs, advantages=np.where(mask, rng.choice([-1.0, 1.0]), 0).astype(np.float32),
        distillation=target, reference_logprobs=logprobs, oldest_version=version, newest_version=version, weight=1.0,
        at=0.0,
    )  # fmt: skip


def tensors(buckets: Any) -> dict[str, np.ndarray]:
    return {name: array for each in buckets for name, array in zip(each.names, each.arrays, strict=True)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one, in this process."""
    meeting = tmp_path_factory.mktemp("group") / "meeting"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def learner(alone) -> Learner:
    torch.set_num_threads(1)
    return Learner(BASE, SETTINGS, LEARNING, alone)


def test_the_loss_falls_on_a_repeated_batch(learner):
    batch = [make_sample(i, version=-1) for i in range(BATCH)]
    metrics = [learner.update(batch, version=0) for _ in range(5)]
    losses = [each["loss"] for each in metrics]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert metrics[0]["loss"] == pytest.approx(
        metrics[0]["loss_rl"] + metrics[0]["loss_opd"] + LEARNING.kl_weight * metrics[0]["loss_kl"], rel=1e-6
    )
    assert metrics[0]["tokens"] == sum(len(sample.token_ids) for sample in batch)
    assert metrics[0]["lag_mean"] == 1
    assert 0 < metrics[0]["update_norm"] < 1
    assert "mismatch" not in metrics[0]  # no token was sampled under these very weights


def test_micro_batches_change_nothing(learner, alone):
    batch = [make_sample(i) for i in range(BATCH)]
    small = Learner(BASE, SETTINGS.model_copy(update={"pack_tokens": 64, "logit_chunk": 8}), LEARNING, alone)
    one, many = learner.update(batch, 0), small.update(batch, 0)
    for key in ("loss", "grad_norm", "kl", "entropy", "mismatch"):
        assert many[key] == pytest.approx(one[key], rel=1e-4), key


def test_the_ways_of_saving_memory_change_nothing(learner, alone, monkeypatch):
    """Recomputed activations, and parameters that are dropped between forward and backward, as for large models."""
    batch = [make_sample(i) for i in range(BATCH)]
    monkeypatch.setattr("clawrl.training.model.RESHARD_ABOVE_PARAMETERS", 0)
    monkeypatch.setattr("clawrl.training.learner.RESHARD_ABOVE_PARAMETERS", 0)
    thrifty = SETTINGS.model_copy(update={"pack_tokens": 256, "activation_checkpointing": True})
    one, other = learner.update(batch, 0), Learner(BASE, thrifty, LEARNING, alone).update(batch, 0)
    for key in ("loss", "grad_norm", "update_norm", "kl", "entropy"):
        assert other[key] == pytest.approx(one[key], rel=1e-4), key


def test_a_bad_sample_is_left_out_and_the_others_are_learnt_from(learner, alone):
    batch = [make_sample(i) for i in range(BATCH)]
    bad = make_sample(99)
    bad = replace(bad, logprobs=np.full_like(bad.logprobs, np.nan))
    metrics = learner.update([*batch, bad], 0)
    clean = Learner(BASE, SETTINGS, LEARNING, alone).update(batch, 0)
    assert (metrics["samples_unusable"], metrics["skipped"]) == (1, 0)
    assert metrics["loss"] == pytest.approx(clean["loss"])


def test_a_step_that_is_not_finite_changes_nothing(learner):
    before = {name: array.copy() for name, array in tensors(learner.buckets(1 << 30)).items()}
    huge = make_sample(0, version=-1)
    metrics = learner.update([replace(huge, logprobs=np.where(huge.loss_mask, -3e38, 0).astype(np.float32))], 0)
    assert metrics["skipped"] == 1
    assert all(np.isfinite(value) for value in metrics.values())
    after = tensors(learner.buckets(1 << 30))
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert learner.update([huge], 0)["skipped"] == 0  # and the next batch trains


def test_weights_and_canary_are_those_of_the_model(learner):
    """What is sent is what the base model's file holds, and loading it back restores the scores."""
    expected = tensors(read_buckets(Path(BASE), 1 << 30))
    sent: list[Bucket] = [bucket for bucket in learner.buckets(1 << 20) if bucket is not None]
    assert len(sent) > 1
    assert all(np.array_equal(array, expected[name]) for name, array in tensors(sent).items())
    sent = [replace(each, arrays=tuple(array.copy() for array in each.arrays)) for each in sent]
    sequences = canary_sequences(BASE)
    before = learner.canary(sequences)
    check_canary(Path(BASE), before)
    learner.update([make_sample(i) for i in range(BATCH)], 0)
    moved = learner.canary(sequences)
    assert max(np.abs(a - b).max() for a, b in zip(before.logprobs, moved.logprobs, strict=True)) > 1e-4
    learner.load(sent)
    back = learner.canary(sequences)
    assert all(np.array_equal(a, b) for a, b in zip(before.logprobs, back.logprobs, strict=True))


def test_bfloat16_travels_as_bits(alone):
    settings = SETTINGS.model_copy(update={"dtype": "bfloat16"})
    learner = Learner(BASE, settings, LEARNING, alone)
    metrics = learner.update([make_sample(i) for i in range(2)], 0)
    assert metrics["skipped"] == 0
    (bucket,) = learner.buckets(1 << 30)
    assert bucket is not None
    assert set(bucket.dtypes) == {"bfloat16"}
    assert {array.dtype for array in bucket.arrays} == {np.dtype(np.uint16)}
    before = learner.canary(canary_sequences(BASE))
    learner.load([bucket])
    after = learner.canary(canary_sequences(BASE))
    assert all(np.array_equal(a, b) for a, b in zip(before.logprobs, after.logprobs, strict=True))


def check_canary(folder: Path, canary: Any) -> None:
    """The canary's log-probabilities are plain transformers' on the folder's weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for ids, logprobs in zip(canary.token_ids, canary.logprobs, strict=True):
        tokens = torch.from_numpy(ids).long()
        with torch.no_grad():
            table = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        np.testing.assert_allclose(table.gather(-1, tokens[1:, None])[:, 0].numpy(), logprobs, atol=1e-4)


@dataclass
class Run:
    """What two workers under Ray Train did: versions 1 and 2, a killed rank, versions 3 and 4, the end."""

    folder: Path
    versions: list[WeightVersion]
    restart_s: float
    close_s: float
    buffer_stats: dict[str, Any]
    failure: list[BaseException]


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    journal: Any = ray.remote(Journal).options(num_cpus=0).remote(f"sqlite:///{folder}/journal.sqlite")
    buffer: Any = ray.remote(ReplayBuffer).options(num_cpus=0).remote(BufferSection(batch_size=BATCH), journal)
    store: Any = ray.remote(WeightStore).options(num_cpus=0).remote(VERSIONS, journal, str(folder), "clawrl:tiny")
    loop = TrainLoop(SETTINGS, LEARNING, VERSIONS, "clawrl:tiny", buffer, store)
    failure: list[BaseException] = []

    def train() -> None:
        try:
            run_trainer(loop, str(folder))
        except BaseException as error:
            failure.append(error)

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 60
        while get(store.latest.remote()).number < number:
            assert time.monotonic() < deadline, f"no version {number}: {failure}"
            assert thread.is_alive(), failure
            time.sleep(0.1)

    thread = threading.Thread(target=train)
    thread.start()
    get(journal.append.remote(*(make_sample(i) for i in range(2 * BATCH))))
    wait_for(2)
    os.kill(_pid_of_a_rank(), signal.SIGKILL)
    killed = time.monotonic()
    get(journal.append.remote(*(make_sample(i, version=2) for i in range(2 * BATCH, 4 * BATCH))))
    wait_for(4)
    restart_s = time.monotonic() - killed
    stats = get(buffer.stats.remote())
    closed = time.monotonic()
    get(buffer.close.remote())
    thread.join(30)
    assert not thread.is_alive()
    versions = get(journal.versions.remote())
    return Run(folder, versions, restart_s, time.monotonic() - closed, stats, failure)


def _pid_of_a_rank() -> int:
    """A train worker among the processes that this test process started."""
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in "".join(process.cmdline()):
            return process.pid
    raise AssertionError("no train worker is running")


def test_two_workers_make_the_update_of_one(run, learner):
    before = {name: array.copy() for name, array in tensors(learner.buckets(1 << 30)).items()}
    metrics = learner.update([make_sample(i) for i in range(BATCH)], 0)
    expected = tensors(learner.buckets(1 << 30))
    found = tensors(read_buckets(run.folder / "versions" / "1", 1 << 30))
    assert set(found) == set(expected)
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) < 1e-5
    error = sum(np.square(found[name] - expected[name]).sum() for name in expected)
    update = sum(np.square(before[name] - expected[name]).sum() for name in expected)
    assert np.sqrt(error / update) < 1e-3
    for key in ("loss", "loss_rl", "loss_opd", "loss_kl", "grad_norm", "entropy", "approx_kl", "mismatch"):
        assert run.versions[0].metrics[key] == pytest.approx(metrics[key], rel=1e-4), key


def test_every_version_comes_with_its_canary(run):
    for number in (1, 4):
        canary = read_canary(run.folder / "versions" / str(number))
        assert canary is not None
        assert len(canary.token_ids) == 4
        check_canary(run.folder / "versions" / str(number), canary)


def test_a_killed_rank_is_replaced_and_nothing_is_trained_twice_or_never(run):
    assert [(version.number, version.parent) for version in run.versions] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    consumed = [name for version in run.versions for name in version.samples]
    assert consumed == [f"turn-{i}" for i in range(4 * BATCH)]
    assert run.failure == []
    assert run.buffer_stats["leased"] == run.buffer_stats["size"] == run.buffer_stats["dropped"] == 0


def test_the_restarted_group_goes_on_from_the_latest_version(run, learner):
    """Version 3 is version 2's weights and a fresh optimizer's step on the third batch."""
    learner.load(read_buckets(run.folder / "versions" / "2", 1 << 30))
    learner.update([make_sample(i, version=2) for i in range(2 * BATCH, 3 * BATCH)], 2)
    expected, found = tensors(learner.buckets(1 << 30)), tensors(read_buckets(run.folder / "versions" / "3", 1 << 30))
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) < 1e-5


def test_publishing_is_quick_and_closing_too(run):
    # The second version: the first one's time holds imports.
    assert run.versions[1].metrics["publish_s"] < 0.5
    assert run.close_s < 15
