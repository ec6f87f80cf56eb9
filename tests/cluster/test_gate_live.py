"""The gate at work: candidates measured by the trainer, refused before they serve, and training that goes on."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from test_journal_actor import turn
from test_trainer import BASE, LEARNING, SETTINGS, VERSIONS, alone, get, make_sample, tensors  # noqa: F401 (fixture)
from test_weights import Setup

from clawrl.config import BufferSection, GateSection, TrainerSection
from clawrl.journal.actor import Journal
from clawrl.training.buffer import ReplayBuffer
from clawrl.training.checkpoint import read_buckets
from clawrl.training.inspection import Inspection
from clawrl.training.learner import Learner
from clawrl.training.trainer import TrainLoop, run_trainer
from clawrl.training.watch import Watch
from clawrl.training.weights import Head, WeightStore
from clawrl.types import Judgement, Sample, Swap, Turn, VersionSpan

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

BATCH = 4
GATE = GateSection(min_turns=2, size=16, max_seconds=60)


def judgement(turn: str, score: int | None) -> Judgement:
    return Judgement(turn, (score,), score, (), 0, 0.1, None, 1.0)


def spoken_by(id: str, version: int) -> Turn:
    spoken = turn(id)
    return replace(spoken, capture=replace(spoken.capture, versions=(VersionSpan(version, 0, 4),)))


def said_by(learner: Learner, sample: Sample) -> Sample:
    """The sample with the learner's own log-probabilities as its behaviour."""
    [scores] = learner.score([sample], None, 60)
    logprobs = np.zeros_like(sample.logprobs)
    logprobs[np.flatnonzero(sample.loss_mask)] = scores.logprobs
    return replace(sample, logprobs=logprobs, reference_logprobs=logprobs, distillation=None)


@pytest.fixture
def learner(alone) -> Learner:  # noqa: F811
    torch.set_num_threads(1)
    return Learner(BASE, SETTINGS, LEARNING, alone)


def test_scores_are_those_of_every_reply_alone(learner):
    samples = [make_sample(number) for number in range(6)]
    together = learner.score(samples, 2, 60)
    assert [len(each.logprobs) for each in together] == [int(sample.loss_mask.sum()) for sample in samples]
    for sample, scores in zip(samples, together, strict=True):
        canary = learner.canary([sample.token_ids])
        at = np.flatnonzero(sample.loss_mask) - 1
        np.testing.assert_allclose(scores.logprobs, canary.logprobs[0][at], atol=1e-4)
        stopped = sample.token_ids.copy()
        stopped[at[0] + 1] = 2
        first = learner.canary([stopped]).logprobs[0][at[0]]
        assert scores.stops is not None
        assert scores.stops[0] == pytest.approx(first, abs=1e-4)


def test_when_time_is_up_the_first_ones_are_scored(learner):
    samples = [make_sample(number) for number in range(40)]
    found = learner.score(samples, None, 0.0)
    assert 1 <= len(found) < 40
    assert found[0].stops is None


def test_an_inspection_sees_the_step_between_begin_and_end(learner):
    held_out = [(said_by(learner, make_sample(number)), 1) for number in range(4)]
    inspection = Inspection(learner, GATE, 2)
    inspection.begin(0, held_out)
    batch = [make_sample(number) for number in range(10, 13)]
    batch.append(replace(make_sample(13), advantages=None))
    metrics = learner.update(batch, 0)
    evidence = inspection.end((1, 0), metrics["update_norm"], batch)
    assert evidence.finite
    assert 0 < evidence.update < 0.1
    assert [len(each.token_ids) for each in evidence.batch] == [int(sample.loss_mask.sum()) for sample in batch[:3]]
    assert [each.value for each in evidence.batch] == [np.asarray(sample.advantages)[-1] for sample in batch[:3]]
    assert [len(each.token_ids) for each in evidence.turns] == [len(each.parent) for each in evidence.turns]
    for each in evidence.turns:
        np.testing.assert_allclose(each.behaviour, each.parent, atol=1e-4)
        assert np.abs(each.candidate - each.parent).max() > 1e-4
    before = [each.candidate for each in evidence.turns]
    inspection.begin(1, held_out[:2])
    evidence = inspection.end((2, 1, 0), 0.0, [])
    assert [np.array_equal(each.parent, old) for each, old in zip(evidence.turns, before, strict=False)] == [True] * 2
    with torch.no_grad():
        next(iter(learner._parameters.values())).fill_(float("nan"))
    inspection.begin(2, held_out)
    assert not inspection.end((3, 2, 1, 0), 0.0, []).finite


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory) -> Any:
    """Three batches at a reckless learning rate under the gate, then the end."""
    folder = tmp_path_factory.mktemp("gate")
    return train(folder, SETTINGS.model_copy(update={"learning_rate": 1.0, "max_grad_norm": 1e6}))


def train(folder: Path, settings: TrainerSection) -> tuple[Any, Any]:
    held_out = [(replace(make_sample(number), held_out=True), 1) for number in range(100, 108)]
    batches = [[make_sample(batch * BATCH + i) for i in range(BATCH)] for batch in range(3)]
    return train_on(folder, settings, GATE, held_out, batches)


def train_on(
    folder: Path, settings: TrainerSection, gate: GateSection, held_out: list[tuple[Sample, int]],
    batches: list[list[Sample]],
) -> tuple[Any, Any]:  # fmt: skip
    """A trainer under a gate, batch after batch, each given when the version before is recorded; then the end."""
    journal: Any = ray.remote(Journal).options(num_cpus=0).remote(f"sqlite:///{folder}/journal.sqlite")
    batching = BufferSection(batch_size=len(batches[0]))
    buffer: Any = ray.remote(ReplayBuffer).options(num_cpus=0).remote(batching, journal)
    store: Any = ray.remote(WeightStore).options(num_cpus=0).remote(VERSIONS, journal, str(folder), "clawrl:tiny")
    for sample, score in held_out:
        get(journal.append.remote(sample, judgement(sample.id, score)))
    loop = TrainLoop(settings, LEARNING, VERSIONS, "clawrl:tiny", buffer, store, journal, gate)
    thread = threading.Thread(target=lambda: run_trainer(loop, str(folder)))
    thread.start()
    for number, batch in enumerate(batches, 1):
        get(journal.append.remote(*batch))
        deadline = time.monotonic() + 240
        while get(journal.counts.remote())["versions"] < number:
            assert time.monotonic() < deadline
            assert thread.is_alive()
            time.sleep(0.1)
    get(buffer.close.remote())
    thread.join(120)
    assert not thread.is_alive()
    return journal, store


def test_a_step_too_far_is_refused_and_training_goes_on_from_the_parent(run):
    journal, store = run
    versions = get(journal.versions.remote())
    assert [(version.number, version.parent) for version in versions] == [(1, 0), (2, 0), (3, 0)]
    assert [event.state for event in get(journal.version_events.remote())] == ["rejected"] * 3
    assert [len(version.samples) for version in versions] == [BATCH] * 3
    assert get(store.latest.remote()) == Head(0, 4)
    assert get(store.status.remote())["desired"] == 0
    for decision in get(journal.gate_decisions.remote()):
        assert not decision.passed
        assert decision.stage == "before"
        assert "update" in decision.reason


def test_no_held_out_sample_is_trained_on(run):
    journal, _ = run
    trained = {name for version in get(journal.versions.remote()) for name in version.samples}
    assert trained == {f"turn-{number}" for number in range(3 * BATCH)}


LENIENT = GateSection(
    min_turns=4, size=24, max_seconds=60, max_kl=100, max_reference_kl=100, max_approved_loss=100,
    max_approved_loss_recent=100,
)  # fmt: skip
"""Nothing but signs is looked at: replies of random tokens move as no person's do."""


def liked(learner: Learner, number: int, *, version: int, sign: int = 1) -> Sample:
    """A reply in one of two styles, which are sets of tokens, that of even numbers is disliked; `sign` -1 learns it
    the wrong way round."""
    rng = np.random.default_rng(number)
    sample = make_sample(number)
    style = (100, 140) if number % 2 else (200, 240)
    ids = np.where(sample.loss_mask, rng.integers(*style, len(sample.loss_mask)), 300).astype(np.int32)
    said = said_by(learner, replace(sample, token_ids=ids, oldest_version=version, newest_version=version))
    return replace(said, advantages=np.where(said.loss_mask, sign if number % 2 else -sign, 0).astype(np.float32))


def test_a_batch_turned_round_is_refused_and_leaves_no_moments(cluster, tmp_path, alone):  # noqa: F811
    """Four batches, one with the wrong sign, which momentum hides, and one more: as if the fifth had never been."""
    torch.set_num_threads(1)
    settings = SETTINGS.model_copy(update={"learning_rate": 2e-5})
    learner = Learner(BASE, settings, LEARNING, alone)
    held_out = [
        (replace(liked(learner, number, version=0), held_out=True), 1 if number % 2 else -1)
        for number in range(900, 924)
    ]
    batches = [
        [liked(learner, 100 * batch + i, version=min(batch, 4), sign=-1 if batch == 4 else 1) for i in range(16)]
        for batch in range(6)
    ]
    journal, store = train_on(tmp_path, settings, LENIENT, held_out, batches)
    versions = get(journal.versions.remote())
    assert [version.parent for version in versions] == [0, 1, 2, 3, 4, 4]
    *honest, turned, last = get(journal.gate_decisions.remote())
    assert all(decision.passed for decision in (*honest, last))
    assert [check.name for check in turned.checks if not check.passed] == ["agreement"]
    agreements = [check.value for each in (turned, last) for check in each.checks if check.name == "agreement"]
    assert agreements[0] < -0.8 < 0.8 < agreements[1]
    assert get(store.latest.remote()) == Head(6, 7)
    for batch, parent in ((0, 0), (1, 1), (2, 2), (3, 3), (5, 4)):
        learner.update(batches[batch], parent)
    expected = tensors(learner.buckets(1 << 30))
    for name, array in tensors(read_buckets(tmp_path / "versions" / "6", 1 << 30)).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5, err_msg=name)


def test_the_watch_takes_back_what_people_speak_badly_of(cluster, tmp_path):
    setup = Setup(tmp_path, VERSIONS)
    for number in (1, 2):
        setup.publish(number, number - 1)
        get(setup.store.report.remote(Swap(number, "a", 1.0, 1e-5, 1.0, time.time())))
    rng = np.random.default_rng(0)
    for number in range(160):
        version, mean = (1, 0.9) if number < 100 else (2, 0.1)
        spoken = spoken_by(f"t-{number}", version)
        score = 1 if rng.random() < mean else -1
        get(setup.journal.append.remote(spoken, judgement(spoken.id, score)))
    watch: Any = ray.remote(Watch).options(num_cpus=0).remote(GATE, setup.journal, setup.store)
    deadline = time.monotonic() + 120
    while get(setup.store.status.remote())["serving"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    [decision] = get(setup.journal.gate_decisions.remote())
    assert (decision.version, decision.stage, decision.passed) == (2, "after", False)
    assert "mean score went from" in decision.reason
    ray.kill(watch)
    again: Any = ray.remote(Watch).options(num_cpus=0).remote(GATE, setup.journal, setup.store)
    deadline = time.monotonic() + 120
    while get(again.stats.remote())["turns"] < 100:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    assert get(again.stats.remote())["turns"] == 100  # a restart does not count the rejected version's turns again
    assert len(get(setup.journal.gate_decisions.remote())) == 1
