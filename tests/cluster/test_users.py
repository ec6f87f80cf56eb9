"""Policies of users: a rank of the trainer, a buffer, a store and a journal in this process, real batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from handles import answer, is_pending
from test_trainer import BASE, LEARNING, SETTINGS, alone, make_sample, tensors  # noqa: F401

from clawrl.config import BufferSection, GateSection, LoraSection, VersionsSection
from clawrl.journal.actor import Journal
from clawrl.training import rank
from clawrl.training.buffer import ReplayBuffer
from clawrl.training.inspection import Inspection
from clawrl.training.learner import Learner
from clawrl.training.resume import TrainerCheckpoints
from clawrl.training.trainer import TrainLoop
from clawrl.training.weights import WeightStore
from clawrl.types import GROUP, PolicyScope, Publication, Sample, Swap, Withdrawal

pytestmark = pytest.mark.cluster

BATCH = 2


@dataclass
class House:
    """`learnt` has the samples of each gradient, as the learner got them."""

    worker: rank._Rank
    learner: Learner
    store: Any
    journal: Any
    learnt: list[list[Sample]]

    def train(self, samples: list[Sample], steps: int) -> list[str]:
        """So many steps; whose policy each was of."""
        answer(self.journal.append.remote(*samples))
        scopes = []
        while len(scopes) < steps:
            order = self.worker._agree()
            if order.kind == "train" and order.batch is not None:
                self.worker._train(order)
                scopes.append(order.batch.scope)
        return scopes

    def weights(self, scope: str) -> dict[str, np.ndarray]:
        number = answer(self.store.heads.remote())[scope]
        return tensors(rank._fetched(self.store, number))


@pytest.fixture
def start(actors, alone, tmp_path, monkeypatch) -> Callable[..., House]:  # noqa: F811
    monkeypatch.setattr(rank, "ray", SimpleNamespace(get=answer))

    def start_house(name: str, scope: PolicyScope, anchor: float = 0.0) -> House:
        folder: Path = tmp_path / name
        folder.mkdir()
        lora = LoraSection(rank=8, alpha=16, targets=("q_proj", "v_proj"), policy_scope=scope, anchor=anchor)
        settings = SETTINGS.model_copy(update={"learning_rate": 5e-3})
        journal = actors(Journal, f"sqlite:///{folder}/journal.sqlite")
        store = actors(WeightStore, VersionsSection(), journal, str(folder), BASE, lora)
        buffer = actors(ReplayBuffer, BufferSection(batch_size=BATCH, max_lag=100), journal, scope)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        learner = Learner(BASE, settings, LEARNING, alone, lora)
        learnt: list[list[Sample]] = []
        update = learner.update

        def noted(samples: list[Sample], version: int, **options: Any) -> dict[str, float]:
            learnt.append(list(samples))
            return update(samples, version, **options)

        learner.update = noted  # type: ignore[method-assign]
        gate = GateSection(enabled=False)
        loop = TrainLoop(settings, LEARNING, VersionsSection(), BASE, buffer, store, journal, gate, lora)
        checkpoints = TrainerCheckpoints(folder / "trainer", every=1)
        worker = rank._Rank(loop, learner, checkpoints, Inspection(learner, gate, None), rank.canary_sequences(BASE))
        answer(store.anchor.remote(0, learner.canary(worker._canary)))
        return House(worker, learner, store, journal, learnt)

    return start_house


def of(user: str, numbers: range, scope: PolicyScope) -> list[Sample]:
    made = [make_sample(number) for number in numbers]
    return [replace(each, id=f"{user}-{each.id}", user=user, policy_scope=scope) for each in made]


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.allclose(one[name], other[name], atol=1e-7) for name in one)


def test_no_users_words_reach_anothers_policy(start):
    """By the list of samples of every gradient, and by what comes of it: Ann's is the one she would have alone."""
    both, hers = start("both", "user"), start("hers", "user")
    ann, ben = of("ann", range(6), "user"), of("ben", range(10, 16), "user")
    scopes = both.train([*ann, *ben], 6)
    assert sorted(scopes) == ["ann"] * 3 + ["ben"] * 3
    assert scopes != sorted(scopes), "in turn, so that weights and moments had to be changed"
    assert [{each.user for each in samples} for samples in both.learnt] == [{scope} for scope in scopes]
    versions = answer(both.journal.versions.remote())
    assert [version.scope for version in versions] == scopes
    assert all(sample.startswith(version.scope) for version in versions for sample in version.samples)
    hers.train(ann, 3)
    assert same(both.weights("ann"), hers.weights("ann"))
    assert not same(both.weights("ann"), both.weights("ben"))


def test_a_users_policy_begins_with_everyones_and_all_learn_once(start):
    house = start("house", "hierarchy")
    scopes = house.train(of("ann", range(4), "hierarchy"), 4)
    assert sorted(scopes) == ["", "", "ann", "ann"]
    versions = answer(house.journal.versions.remote())
    first = next(version for version in versions if version.scope == "ann")
    assert first.parent == max([version.number for version in versions if version.number < first.number], default=0)
    learnt = [(version.scope, sample) for version in versions for sample in version.samples]
    assert len(learnt) == len(set(learnt)) == 8


def test_the_anchor_holds_a_users_policy_near_to_everyones(start):
    samples, weights = of("ann", range(4), "hierarchy"), {}
    for anchor in (0.0, 1e9):
        house = start(f"anchored {anchor}", "hierarchy", anchor)
        house.train(samples, 4)
        weights[anchor] = house.weights("ann"), house.weights(GROUP)
    assert not same(*weights[0.0])
    own, everyones = weights[1e9]
    last = max(np.abs(own[name] - everyones[name]).max() for name in own)
    free = max(np.abs(weights[0.0][0][name] - weights[0.0][1][name]).max() for name in own)
    assert last < free, "what everyone's learnt after the user's last step lies between them"


def test_a_replica_follows_the_users_that_it_met(start):
    house = start("house", "user")
    house.train([*of("ann", range(2), "user"), *of("ben", range(2, 4), "user")], 2)
    numbers = answer(house.store.heads.remote())
    assert is_pending(house.store.wait.remote("one", {GROUP: 0}, 60.0), 0.2), "of nobody that it has not met"
    met = answer(house.store.meet.remote("one", "ann"))
    assert isinstance(met, Publication)
    assert (met.number, met.scope) == (numbers["ann"], "ann")
    assert answer(house.store.meet.remote("one", "eve")) is None
    answer(house.store.report.remote(Swap(met.number, "one", 0.0, 0.0, 1.0, 1.0)))
    versions = {GROUP: 0, "ann": met.number, "eve": None}
    waiting = house.store.wait.remote("one", versions, 60.0)
    assert is_pending(waiting, 0.2)
    house.train(of("ann", range(4, 6), "user"), 1)
    news = answer(waiting)
    assert (news.number, news.scope) == (answer(house.store.heads.remote())["ann"], "ann")
    assert answer(house.store.rollback.remote(0, "rude", "ann"))["rejected"] == [met.number, news.number]
    assert answer(house.store.wait.remote("one", versions | {"ann": news.number}, 60.0)) == Withdrawal("ann")
    assert answer(house.store.status.remote())["unproven"] == 0, "Ben's does not count: no replica has met him"
    with pytest.raises(Exception, match="user 'eve' has no version of their own"):
        answer(house.store.rollback.remote(None, None, "eve"))
