"""Opt-out and erasure under way: what waits, is leased, is being judged or was learnt, on real actors."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from test_buffer import stats, take
from test_collector import House
from test_weights import Setup, canary, get, scaled_base

from clawrl.config import BufferSection, VersionsSection
from clawrl.testing import ScriptedPolicy
from clawrl.training.buffer import ReplayBuffer
from clawrl.training.weights import WeightStore
from clawrl.types import GROUP, Pin, Sample, Turn, WeightVersion

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


class Training(Setup):
    """Journal, weight store and buffer, and the steps of a trainer."""

    def __init__(self, folder: Path, keep: int = 9) -> None:
        super().__init__(folder, VersionsSection(keep=keep, keep_in_memory=2, bucket_mib=256))
        self.buffer: Any = (
            ray.remote(ReplayBuffer).options(num_cpus=0).remote(BufferSection(batch_size=2, max_lag=1), self.journal)
        )

    def learn_from(self, ids: str, version: int = 0) -> None:
        """Turns and samples: small letters are Ann's, capitals Bob's."""
        for id in ids:
            user = "ann" if id.islower() else "bob"
            get(self.journal.append.remote(said(id, user), sample(id, user, version)))

    def step(self, ids: str) -> bool:
        """One step of the trainer; whether its version was taken."""
        head = get(self.store.latest.remote())
        assert take(self.buffer, head.next_number) == ids
        return self.offer(head.number, head.next_number, ids)

    def offer(self, parent: int, number: int, ids: str) -> bool:
        buckets = scaled_base(1 + number / 10, 256 << 20)
        for index, bucket in enumerate(buckets):
            get(self.store.hold.remote(number, index, bucket))
        version = WeightVersion(number, parent, "full", None, tuple(ids), {"loss": 1.0}, time.time())
        if not get(self.store.offer.remote(version, len(buckets), canary(-1 - number / 10))):
            return False
        self.report(number, error=1e-5)
        line = get(self.store.latest.remote()).line
        get([self.buffer.release.remote(number), self.buffer.advance.remote(line)])
        return True

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "versions").iterdir())


def said(id: str, user: str) -> Turn:
    return dataclasses.replace(
        ScriptedPolicy().turn([{"role": "user", "content": f"words of {user}"}], user=user), id=id
    )


def sample(id: str, user: str, version: int) -> Sample:
    tokens = np.arange(3, dtype=np.int32)
    return Sample(id, user, "chat", tokens, tokens > 0, tokens * 0.5, None, None, None, version, version, 1.0, 4.0)


@pytest.fixture
def training(tmp_path) -> Training:
    return Training(tmp_path)


def test_an_opt_out_takes_back_what_waits_and_what_is_leased(training):
    training.learn_from("AaBb")
    assert take(training.buffer, 1) == "Aa"
    get(training.journal.consent.remote(user="ann", train=False))
    assert not training.offer(0, 1, "Aa"), "the step that was under way is refused"
    assert training.checkpoints() == []
    assert training.step("AB")
    assert stats(training.buffer, size=0)["leased"] == 0
    assert [version.samples for version in get(training.journal.versions.remote())] == [("A", "B")]


def test_forgetting_goes_back_and_trains_on_what_others_said(training):
    for ids, sampled_by in (("ABCa", 0), ("DE", 1), ("FG", 2)):
        training.learn_from(ids, sampled_by)
    for ids in ("AB", "Ca", "DE", "FG"):
        assert training.step(ids)
    get(training.journal.append.remote(Pin(3, True, 1.0)))
    told = get(training.store.forget.remote(user="ann", retrain=True))
    assert (told["done"], told["restored"], told["pinned"]) == (False, 1, [3])
    assert training.checkpoints() == ["1", "2", "3", "4"], "asked only"

    told = get(training.store.forget.remote(user="ann", retrain=True, yes=True))
    assert (told["versions"], told["restored"], told["rejected"]) == ([2], 1, [2, 3, 4])
    assert training.checkpoints() == ["1"]
    assert {number: state for number, state in training.states().items() if number} == {
        1: "serving", 2: "rejected", 3: "rejected", 4: "rejected",
    }  # fmt: skip
    assert get(training.store.wait.remote("a", {GROUP: 4}, 5.0)).number == 1
    head = get(training.store.latest.remote())
    assert (head.number, head.next_number) == (1, 5)
    get([training.buffer.release.remote(1), training.buffer.advance.remote(head.line)])
    for ids in ("CD", "EF"):  # beyond max_lag = 1, but they were in time when they were first trained on
        assert training.step(ids)
    assert take(training.buffer, 7, 0.2) is None
    assert stats(training.buffer, size=1)["dropped"] == 0
    assert get(training.journal.turn.remote("a")) is None
    assert b"words of ann" not in b"".join(file.read_bytes() for file in training.folder.glob("journal*"))


def test_a_store_that_starts_again_knows_it(training):
    training.learn_from("aA")
    assert training.step("aA")
    get(training.store.forget.remote(user="ann", retrain=True, yes=True))
    training.restart()
    head = get(training.store.latest.remote())
    assert (head.number, head.next_number) == (0, 2)
    assert take(training.buffer, 2, 0.2) is None
    training.learn_from("B")
    assert training.step("AB")


def test_without_retraining_versions_stay(training):
    training.learn_from("aABC")
    assert training.step("aA")
    told = get(training.store.forget.remote(session="session", user="ann", yes=True))
    assert (told["versions"], told["restored"], told["rejected"]) == ([1], None, [])
    assert training.checkpoints() == ["1"]
    assert training.step("BC")


@pytest.mark.processes
def test_a_turn_that_is_being_judged_when_it_is_erased_leaves_nothing(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect()
    anns = house.say("-1 wait:1 hint: be brief", user="ann")
    while not get(house.judge.most_at_once.remote()):
        time.sleep(0.02)
    store = actors(WeightStore, VersionsSection(), house.journal, str(tmp_path), "clawrl:tiny")
    get(store.forget.remote(user="ann", yes=True))
    bobs = house.say("-1 hint: be kind", user="bob")
    house.wait(1)
    house.stats()
    assert [turn for turn, _, _ in house.judgements()] == [bobs.id]
    assert set(house.samples()) == {bobs.id}
    assert get(house.journal.turn.remote(anns.id)) is None
