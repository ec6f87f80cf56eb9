"""The trainer: two gloo workers under Ray Train against one in this process that nothing interrupts.

A rank is killed, the application is started again with one worker, its controller is killed, a version is rolled back.
"""

import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
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
from clawrl.training.rank import canary_sequences
from clawrl.training.resume import TrainerCheckpoints
from clawrl.training.trainer import TrainLoop, run_trainer
from clawrl.training.weights import WeightStore
from clawrl.types import Bucket, Distillation, Sample, Swap, WeightVersion

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

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


class Training:
    """Journal, buffer, store and a trainer over one run directory, in a thread; Ray restarts none of them."""

    def __init__(self, folder: Path, workers: int) -> None:
        def actor(cls: Any, *arguments: Any) -> Any:
            return ray.remote(cls).options(num_cpus=0).remote(*arguments)

        self.journal = actor(Journal, f"sqlite:///{folder}/journal.sqlite")
        self.buffer = actor(ReplayBuffer, BufferSection(batch_size=BATCH), self.journal)
        self.store = actor(WeightStore, VERSIONS, self.journal, str(folder), "clawrl:tiny")
        settings = SETTINGS.model_copy(update={"workers": workers})
        self._loop = TrainLoop(settings, LEARNING, VERSIONS, "clawrl:tiny", self.buffer, self.store)
        self._folder, self.failure = folder, []
        self._thread = threading.Thread(target=self._train)
        self._thread.start()

    def _train(self) -> None:
        try:
            run_trainer(self._loop, str(self._folder))
        except BaseException as error:
            self.failure.append(error)

    def give(self, batch: int, version: int) -> None:
        """Append the samples of the batch of this number (from 0), sampled by `version`."""
        get(self.journal.append.remote(*(make_sample(i, version) for i in numbers(batch))))

    def wait_for(self, number: int) -> None:
        deadline = time.monotonic() + 240
        while get(self.store.latest.remote()).number < number:
            assert time.monotonic() < deadline, f"no version {number}: {self.failure}"
            assert self._thread.is_alive(), self.failure
            time.sleep(0.1)

    def close(self) -> tuple[list[WeightVersion], float]:
        """The versions, and the seconds until the trainer had ended."""
        started = time.monotonic()
        get(self.buffer.close.remote())
        self._thread.join(120)
        assert not self._thread.is_alive()
        versions = get(self.journal.versions.remote())
        closed_s = time.monotonic() - started
        get(self.journal.close.remote())
        for each in (self.store, self.buffer, self.journal):
            ray.kill(each)
        return versions, closed_s


def numbers(batch: int) -> range:
    return range(batch * BATCH, (batch + 1) * BATCH)


def kill_9(name: str) -> None:
    """Kill a process of Ray Train that this test process started."""
    for process in psutil.Process().children(recursive=True):
        if name in "".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return
    raise AssertionError(f"no {name} is running")


def wait_gone(name: str) -> None:
    deadline = time.monotonic() + 120
    while any(name in "".join(each.cmdline()) for each in _children()):
        assert time.monotonic() < deadline, f"{name} still runs"
        time.sleep(0.1)


def _children() -> Iterator[psutil.Process]:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.cmdline()
            yield process


@dataclass
class Run:
    """What happened: 1 and 2, a killed rank, 3 and 4; one worker instead of two, 5, a killed controller, 6; a rollback
    to 4, and 7."""

    folder: Path
    versions: list[WeightVersion]
    close_s: float
    buffer_stats: dict[str, Any]
    failure: list[BaseException]


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    first = Training(folder, workers=2)
    first.give(0, 0)
    first.give(1, 0)
    first.wait_for(2)
    kill_9("RayTrainWorker")
    first.give(2, 2)
    first.give(3, 2)
    first.wait_for(4)
    stats = get(first.buffer.stats.remote())
    _, close_s = first.close()
    second = Training(folder, workers=1)
    second.give(4, 4)
    second.wait_for(5)
    kill_9("TrainController")
    wait_gone("RayTrainWorker")
    second.give(5, 5)
    second.wait_for(6)
    get(second.store.report.remote(Swap(4, "replica", 1.0, 0.0, 1.0, 0.0)))  # it served once
    get([second.store.pin.remote(number) for number in (5, 6)])  # their weights are compared below
    get(second.store.rollback.remote(4))
    second.give(6, 4)
    second.wait_for(7)
    versions, _ = second.close()
    return Run(folder, versions, close_s, stats, first.failure + second.failure)


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


def test_nothing_is_trained_twice_or_never(run):
    """Whoever was killed; what the rejected versions learnt from stays consumed."""
    parents = [(version.number, version.parent) for version in run.versions]
    assert parents == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (6, 5), (7, 4)]
    consumed = [name for version in run.versions for name in version.samples]
    assert consumed == [f"turn-{i}" for i in range(7 * BATCH)]
    assert run.failure == []
    assert run.buffer_stats["leased"] == run.buffer_stats["size"] == run.buffer_stats["dropped"] == 0
    assert [version.metrics["lag_mean"] for version in run.versions] == [0, 1, 0, 1, 0, 0, 0]


def test_restarts_change_nothing(run, learner):
    """After each of them the weights are those of one process that trained on without a break."""
    for step in range(6):
        learner.update([make_sample(i, version=[0, 0, 2, 2, 4, 5][step]) for i in numbers(step)], step)
        assert gap(learner, run, step + 1) < 1e-6, f"version {step + 1}"


def test_without_their_moments_the_weights_would_differ(run, learner):
    learner.load(read_buckets(run.folder / "versions" / "4", 1 << 30))
    learner.update([make_sample(i, version=4) for i in numbers(4)], 4)
    assert gap(learner, run, 5) > 1e-5


def test_after_a_rollback_the_restored_version_is_trained(run, learner):
    """Its moments are gone: they start anew."""
    learner.load(read_buckets(run.folder / "versions" / "4", 1 << 30))
    learner.update([make_sample(i, version=4) for i in numbers(6)], 4)
    assert gap(learner, run, 7) < 1e-5


def gap(learner: Learner, run: Run, number: int) -> float:
    """The largest difference between the learner's weights and a version's."""
    expected = tensors(learner.buckets(1 << 30))
    found = tensors(read_buckets(run.folder / "versions" / str(number), 1 << 30))
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


def test_only_the_last_checkpoints_of_the_line_stay(run):
    assert {path.name for path in (run.folder / "trainer" / "group").iterdir()} == {"7-from-4"}


def test_checkpoints_are_quick(run):
    assert statistics.median(version.metrics["checkpoint_s"] for version in run.versions) < 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_restores_moments_and_master_weights(alone, tmp_path, dtype):
    settings = SETTINGS.model_copy(update={"dtype": dtype})
    one, other = (Learner(BASE, settings, LEARNING, alone) for _ in range(2))
    checkpoints = TrainerCheckpoints(tmp_path, every=1)
    one.update([make_sample(i) for i in numbers(0)], 0)
    checkpoints.save((1, 0), one.state())
    assert checkpoints.has((1, 0))
    other.load(bucket for bucket in one.buckets(1 << 30) if bucket is not None)
    assert checkpoints.load((1, 0), other.state())
    for learner in (one, other):
        learner.update([make_sample(i) for i in numbers(1)], 1)
    ours, theirs = one.state(), other.state()
    assert ours.keys() == theirs.keys()
    assert (dtype == "bfloat16") == any(key.endswith("/weight") for key in ours)
    assert all(torch.equal(whole(ours[key]), whole(theirs[key])) for key in ours)


def test_states_of_before_users_had_policies_are_everyones(alone, tmp_path):
    (tmp_path / "3-from-2").mkdir()
    (tmp_path / "3-from-2" / ".metadata").touch()
    assert TrainerCheckpoints(tmp_path, every=1).has((3, 2, 0))
    assert [path.name for path in tmp_path.iterdir()] == ["group"]


def whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_a_damaged_or_missing_checkpoint_is_said_and_survived(learner, tmp_path, caplog):
    caplog.set_level("INFO")
    checkpoints = TrainerCheckpoints(tmp_path, every=2)
    checkpoints.save((1, 0), learner.state())
    assert not checkpoints.has((1, 0))  # every second
    assert "event=moments_anew version=1" in caplog.text
    checkpoints.save((2, 1, 0), learner.state())
    assert checkpoints.has((2, 1, 0))
    assert not checkpoints.has((2, 0))  # the same number from another parent
    shards = next((tmp_path / "group" / "2-from-1").glob("*.distcp"))
    os.truncate(shards, shards.stat().st_size // 2)
    assert not checkpoints.load((2, 1, 0), learner.state())
    assert "event=moments_anew version=2" in caplog.text
    (tmp_path / "group" / "2-from-1" / ".metadata").write_bytes(b"torn")
    assert not checkpoints.load((2, 1, 0), learner.state())
    blocked = TrainerCheckpoints(tmp_path / "file" / "below", every=1)
    (tmp_path / "file").write_text("")
    blocked.save((1, 0), learner.state())
    assert "event=checkpoint_not_saved version=1" in caplog.text


def test_publishing_is_quick_and_closing_too(run):
    # The second version: the first one's time holds imports.
    assert run.versions[1].metrics["publish_s"] < 0.5
    assert run.close_s < 15
