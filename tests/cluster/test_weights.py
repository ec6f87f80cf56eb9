"""The weight store with a real journal: what is offered reaches replicas, proves itself, and survives its makers."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from clawrl.config import VersionsSection, model_path
from clawrl.journal.actor import Journal
from clawrl.journal.store import JournalReader
from clawrl.testing import ScriptedPolicy
from clawrl.training.checkpoint import read_buckets, read_canary
from clawrl.training.weights import Head, WeightStore
from clawrl.types import GROUP, Bucket, Canary, GateCheck, GateDecision, Swap, WeightVersion

pytestmark = pytest.mark.cluster

BASE = model_path("clawrl:tiny")


def get(asked: Any) -> Any:
    """ray.get, of whatever type the answer is."""
    return ray.get(asked)


class Setup:
    """A journal and a store over one run directory; `restart` makes a new store, as after a crash."""

    def __init__(self, folder: Path, settings: VersionsSection) -> None:
        self.folder, self.settings = folder, settings
        self.journal: Any = ray.remote(Journal).options(num_cpus=0).remote(f"sqlite:///{folder}/journal.sqlite")
        self.restart()

    def restart(self) -> None:
        self.store: Any = (
            ray.remote(WeightStore).options(num_cpus=0).remote(self.settings, self.journal, str(self.folder), BASE)
        )

    def publish(self, number: int, parent: int, scale: float = 1.0) -> None:
        for index, bucket in enumerate(scaled_base(scale, self.settings.bucket_mib << 20)):
            get(self.store.hold.remote(number, index, bucket))
        version = WeightVersion(number, parent, "full", None, (f"sample-{number}",), {"loss": 1.0}, time.time())
        assert get(self.store.offer.remote(version, index + 1, canary(-scale)))

    def report(self, number: int, error: float, moved: float = 1.0, replica: str = "a") -> None:
        get(self.store.report.remote(Swap(number, replica, 20.0, error, moved, time.time())))

    def states(self) -> dict[int, str]:
        """The journal's view."""
        return {event.version: event.state for event in get(self.journal.version_events.remote())}


def scaled_base(scale: float, bucket_bytes: int) -> list[Bucket]:
    return [
        Bucket(each.names, each.dtypes, each.shapes, tuple(array * np.float32(scale) for array in each.arrays))
        for each in read_buckets(Path(BASE), bucket_bytes)
    ]


def canary(logprob: float) -> Canary:
    return Canary((np.array([1, 2], np.int32),), (np.array([logprob], np.float32),))


def fetch(store: Any, number: int, count: int) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for index in range(count):
        (ref,) = get(store.bucket.remote(number, index))
        bucket = get(ref)
        found |= dict(zip(bucket.names, bucket.arrays, strict=True))
    return found


@pytest.fixture
def setup(cluster, tmp_path) -> Setup:
    return Setup(tmp_path, VersionsSection(keep=2, keep_in_memory=1, bucket_mib=2))


def test_a_version_reaches_a_waiting_replica_and_proves_itself(setup):
    store = setup.store
    assert get(store.latest.remote()) == Head(0, 1)
    assert get(store.wait.remote("a", {GROUP: 0}, 0.05)) is None
    waiting = store.wait.remote("a", {GROUP: 0}, 20.0)
    setup.publish(1, 0, scale=2.0)
    publication = get(waiting)
    assert publication.number == 1
    assert publication.num_buckets > 1
    assert publication.canary.logprobs[0].tolist() == [-2.0]
    tensors = fetch(store, 1, publication.num_buckets)
    expected = {
        name: 2 * array
        for each in read_buckets(Path(BASE), 1 << 30)
        for name, array in zip(each.names, each.arrays, strict=True)
    }
    assert set(tensors) == set(expected)
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    setup.report(1, error=1e-5)
    assert setup.states() == {0: "retired", 1: "serving"}
    status = get(store.status.remote())
    assert (status["desired"], status["serving"], status["replicas"]) == (1, 1, {"a": 1})
    assert [swap.version for swap in get(setup.journal.swaps.remote())] == [1]
    (version,) = get(setup.journal.versions.remote())
    assert Path(version.checkpoint) == setup.folder / "versions" / "1"
    assert get(setup.journal.counts.remote())["consumed"] == 1


def test_transformers_reads_a_version(setup):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    setup.publish(1, 0)
    folder = setup.folder / "versions" / "1"
    ids = AutoTokenizer.from_pretrained(folder)("How many apples?", return_tensors="pt").input_ids
    outputs = [AutoModelForCausalLM.from_pretrained(place)(ids).logits for place in (folder, BASE)]
    torch.testing.assert_close(*outputs)


def test_a_failed_canary_sends_replicas_back(setup):
    store = setup.store
    get(store.anchor.remote(0, canary(-7.0)))
    setup.publish(1, 0)
    setup.report(1, error=0.5)
    assert setup.states()[1] == "rejected"
    publication = get(store.wait.remote("a", {GROUP: 1}, 5.0))
    assert (publication.number, publication.canary.logprobs[0].tolist()) == (0, [-7.0])
    tensors = fetch(store, 0, publication.num_buckets)  # read from the base model's folder
    assert np.array_equal(
        tensors["model.norm.weight"],
        {n: a for b in read_buckets(Path(BASE), 1 << 30) for n, a in zip(b.names, b.arrays, strict=True)}[
            "model.norm.weight"
        ],
    )
    setup.report(0, error=1e-5)
    assert get(store.latest.remote()) == Head(0, 2)  # training goes on from 0; the number 1 is spent


def test_a_child_of_a_rejected_version_is_refused_not_recorded(setup):
    setup.publish(1, 0)
    setup.report(1, error=float("nan"))
    version = WeightVersion(2, 1, "full", None, ("late",), {}, time.time())
    get(setup.store.hold.remote(2, 0, scaled_base(1.0, 1 << 30)[0]))
    assert not get(setup.store.offer.remote(version, 1, canary(-1.0)))
    assert [version.number for version in get(setup.journal.versions.remote())] == [1]
    setup.publish(2, 0)
    assert get(setup.store.latest.remote()) == Head(2, 3)


def verdict(number: int, passed: bool, stage: Any = "before") -> GateDecision:
    return GateDecision(number, stage, passed, "for a test", (), 0.1, time.time())


def test_a_version_that_fails_the_gate_serves_nobody_and_its_samples_are_spent(setup):
    setup.publish(1, 0)
    setup.report(1, error=1e-5)
    refused = WeightVersion(2, 1, "full", None, ("sample-2",), {"loss": 1.0}, time.time())
    assert get(setup.store.offer.remote(refused, 0, canary(-1.0), verdict(2, False)))
    assert setup.states()[2] == "rejected"
    assert get(setup.store.wait.remote("a", {GROUP: 1}, 0.05)) is None
    assert get(setup.store.latest.remote()) == Head(1, 3)
    assert get(setup.journal.counts.remote())["consumed"] == 2
    assert [decision.passed for decision in get(setup.journal.gate_decisions.remote())] == [False]
    assert not (setup.folder / "versions" / "2").exists()
    ray.kill(setup.store)
    setup.restart()
    assert get(setup.store.latest.remote()) == Head(1, 3)
    assert get(setup.store.status.remote())["desired"] == 1


def test_what_people_said_takes_versions_back(setup):
    for number in (1, 2):
        setup.publish(number, number - 1)
        setup.report(number, error=1e-5)
    get(setup.store.withdraw.remote(verdict(2, True, "after")))
    assert setup.states()[2] == "serving"
    get(setup.store.withdraw.remote(verdict(2, False, "after")))
    assert (setup.states()[1], setup.states()[2]) == ("serving", "rejected")
    assert get(setup.store.wait.remote("a", {GROUP: 2}, 5.0)).number == 1
    get(setup.store.withdraw.remote(verdict(2, False, "after")))  # gone already: recorded, nothing else
    assert setup.states()[1] == "serving"
    assert [decision.passed for decision in get(setup.journal.gate_decisions.remote())] == [True, False, False]


def test_the_way_back_ends_where_weights_are_kept(setup):
    for number in (1, 2, 3, 4):
        setup.publish(number, number - 1)
        setup.report(number, error=1e-5)
    assert not (setup.folder / "versions" / "1").exists()
    get(setup.store.withdraw.remote(verdict(2, False, "after")))
    assert {number: setup.states()[number] for number in (2, 3, 4)} == {2: "retired", 3: "serving", 4: "rejected"}


def test_a_publish_that_changed_nothing_is_rejected(setup):
    setup.publish(1, 0, scale=1.5)
    setup.report(1, error=1e-5)
    setup.publish(2, 1, scale=1.6)  # the trainer's canary moved by 0.1
    setup.report(2, error=1e-3, moved=0.0)
    assert setup.states()[2] == "rejected"
    assert get(setup.store.status.remote())["desired"] == 1


def test_a_restarted_store_knows_all_and_reads_tensors_from_disk(setup):
    for number in (1, 2, 3):
        setup.publish(number, number - 1, scale=1.0 + number)
        setup.report(number, error=1e-5)
    before = get(setup.store.status.remote())
    ray.kill(setup.store)
    setup.restart()
    after = get(setup.store.status.remote())
    assert after["states"] == before["states"] == {0: "retired", 1: "retired", 2: "retired", 3: "serving"}
    publication = get(setup.store.wait.remote("late", {GROUP: 0}, 5.0))
    assert (publication.number, publication.canary.logprobs[0].tolist()) == (3, [-4.0])
    assert fetch(setup.store, 3, publication.num_buckets)["model.norm.weight"].shape == (192,)
    assert get(setup.store.latest.remote()) == Head(3, 4)


def test_old_versions_leave_memory_and_disk(setup):
    for number in (1, 2, 3, 4):
        setup.publish(number, number - 1)
        setup.report(number, error=1e-5)
    on_disk = {path.name for path in (setup.folder / "versions").iterdir()}
    assert {"3", "4"} <= on_disk
    assert "1" not in on_disk
    assert set(get(setup.store.status.remote())["in_memory"]) <= {3, 4}


def test_tensors_outlive_the_process_that_sent_them(setup):
    class Sender:
        def send(self, store):
            for index, bucket in enumerate(scaled_base(3.0, 2 << 20)):
                get(store.hold.remote(1, index, bucket))
            return index + 1

    sender: Any = ray.remote(Sender).options(num_cpus=0).remote()
    count = get(sender.send.remote(setup.store))
    version = WeightVersion(1, 0, "full", None, ("a",), {}, time.time())
    assert get(setup.store.offer.remote(version, count, canary(-1.0)))
    ray.kill(sender)
    for path in (setup.folder / "versions" / "1").iterdir():
        path.unlink()  # nor is it read from disk
    tensors = fetch(setup.store, 1, count)
    assert sum(array.size for array in tensors.values()) > 2_000_000


def test_an_incomplete_or_repeated_offer(setup):
    setup.publish(1, 0)
    setup.publish(1, 0)  # a trainer that heard no answer asks again
    assert len(get(setup.journal.versions.remote())) == 1
    version = WeightVersion(2, 1, "full", None, ("b",), {}, time.time())
    with pytest.raises(RayTaskError, match="hold all"):
        get(setup.store.offer.remote(version, 3, canary(-1.0)))
    with pytest.raises(RayTaskError, match="does not exist"):
        get(setup.store.bucket.remote(9, 0))


def test_closing_lets_waiting_replicas_go(setup):
    waiting = setup.store.wait.remote("a", {GROUP: 0}, 60.0)
    get(setup.store.status.remote())
    get(setup.store.close.remote())
    assert get(waiting) is None


# -- an operator's acts ------------------------------------------------------------------------------------------------


def publish_all(setup: Setup, count: int) -> None:
    for number in range(1, count + 1):
        setup.publish(number, number - 1, scale=1.0 + number)
        setup.report(number, error=1e-5)


@pytest.fixture
def roomy(cluster, tmp_path) -> Setup:
    return Setup(tmp_path, VersionsSection(keep=4, keep_in_memory=1, bucket_mib=64))


def test_rollback_reaches_replicas_and_training_goes_on_from_there(roomy):
    store = roomy.store
    publish_all(roomy, 4)
    waiting = store.wait.remote("a", {GROUP: 4}, 30.0)
    assert get(store.rollback.remote(2)) == {"serving": 2, "rejected": [3, 4], "next": 5}
    publication = get(waiting)
    assert (publication.number, publication.canary.logprobs[0].tolist()) == (2, [-3.0])
    norm = fetch(store, 2, publication.num_buckets)["model.norm.weight"]  # from disk: only the newest is in memory
    assert np.array_equal(norm, fetch(store, 0, 1)["model.norm.weight"] * 3)
    roomy.report(2, error=1e-5)
    roomy.report(4, error=1e-5, replica="late")  # a replica that took 4 over meanwhile changes nothing
    assert roomy.states() == {0: "retired", 1: "retired", 2: "serving", 3: "rejected", 4: "rejected"}
    head = get(store.latest.remote())
    assert (head, head.line) == (Head(2, 5), (2, 1, 0))
    roomy.publish(5, 2)
    roomy.report(5, error=1e-5)
    assert get(store.rollback.remote(reason="5 is worse")) == {"serving": 2, "rejected": [5], "next": 6}
    reasons = {event.version: event.reason for event in get(roomy.journal.version_events.remote())}
    assert (reasons[4], reasons[5]) == ("rolled back to 2 by user", "5 is worse")
    ray.kill(store)
    roomy.restart()
    assert get(roomy.store.latest.remote()) == Head(2, 6)


def test_a_step_in_work_during_a_rollback_is_refused_and_can_be_made_again(roomy):
    publish_all(roomy, 2)
    for index, bucket in enumerate(scaled_base(9.0, 64 << 20)):
        get(roomy.store.hold.remote(3, index, bucket))
    version = WeightVersion(3, 2, "full", None, ("again",), {}, time.time())
    offering = roomy.store.offer.remote(version, 1, canary(-9.0))
    get(roomy.store.rollback.remote(1))
    if get(offering):  # it came first: then it was rejected with the others
        assert roomy.states()[3] == "rejected"
        return
    assert not (roomy.folder / "versions" / "3").exists()
    assert [version.number for version in get(roomy.journal.versions.remote())] == [1, 2]
    roomy.publish(3, 1, scale=2.0)
    kept = read_canary(roomy.folder / "versions" / "3")
    assert kept is not None
    assert kept.logprobs[0].tolist() == [-2.0]


def test_a_rollback_that_cannot_be_changes_nothing(setup):
    publish_all(setup, 4)  # 1 and 2 are no longer on disk
    before = get(setup.store.status.remote())["states"]
    for number, message in [
        (9, "version 9 does not exist"),
        (1, r"checkpoint of version 1 is no longer in .*, those of 0, 3, 4 are; raise versions.keep or pin"),
        ("3", r"number='3' is not of type int \| None"),
        (True, r"number=True is not of type int \| None"),
    ]:
        with pytest.raises(RayTaskError, match=message):
            get(setup.store.rollback.remote(number))
    file = next((setup.folder / "versions" / "3").glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(RayTaskError, match=rf"{file.name} cannot be read"):
        get(setup.store.rollback.remote(3))
    assert get(setup.store.status.remote())["states"] == before == setup.states()
    setup.publish(5, 4)
    setup.report(5, error=0.9)
    with pytest.raises(RayTaskError, match="version 5 was rejected"):
        get(setup.store.rollback.remote(5))


def test_pinned_versions_stay_on_disk_through_a_restart(setup):
    publish_all(setup, 2)
    assert get(setup.store.pin.remote(1)) == {"number": 1, "pinned": True}
    ray.kill(setup.store)
    setup.restart()
    for number in (3, 4, 5):
        setup.publish(number, number - 1)
        setup.report(number, error=1e-5)
    on_disk = {path.name for path in (setup.folder / "versions").iterdir()}
    assert on_disk >= {"1", "4", "5"}
    assert not on_disk & {"2", "3"}
    with pytest.raises(RayTaskError, match="version 2 is no longer"):
        get(setup.store.pin.remote(2))
    with pytest.raises(RayTaskError, match="7 does not exist"):
        get(setup.store.pin.remote(7))
    get(setup.store.pin.remote(1, pinned=False))
    setup.publish(6, 5)
    assert not (setup.folder / "versions" / "1").exists()


def test_what_is_known_of_versions(setup):
    publish_all(setup, 3)
    setup.publish(4, 3)
    get(setup.store.pin.remote(3))
    check = GateCheck("reward", float("nan"), None, 1.0, "above 0", False)
    decision = GateDecision(4, "before", False, "worse", (check,), 0.5, 9.0)
    get(setup.journal.append.remote(decision))
    setup.report(4, error=0.5)
    entries = get(setup.store.versions.remote())
    assert json.loads(json.dumps(entries, allow_nan=False)) == entries
    told = {entry["number"]: entry for entry in entries}
    assert list(told) == [0, 1, 2, 3, 4]
    assert (told[0]["state"], told[0]["parent"], told[0]["on_disk"]) == ("retired", None, True)
    assert (told[1]["on_disk"], told[3]["on_disk"], told[3]["pinned"], told[3]["state"]) == (
        False,
        True,
        True,
        "serving",
    )
    assert (told[4]["state"], told[4]["samples"], told[4]["metrics"]) == ("rejected", 1, {"loss": 1.0})
    assert "canary error 0.5" in told[4]["reason"]
    assert told[4]["decision"]["checks"][0]["value"] == "nan"
    assert [entry["number"] for entry in get(setup.store.versions.remote(last=2))] == [3, 4]


def test_what_made_the_difference(setup):
    policy = ScriptedPolicy()
    turns = [policy.turn([{"role": "user", "content": "secret"}], user=user, session=f"of-{user}") for user in "abb"]
    turns = [replace(turn, id=f"sample-{number}") for number, turn in enumerate(turns, start=1)]
    get(setup.journal.append.remote(*turns))
    publish_all(setup, 4)  # version n learnt from sample-n
    found = get(setup.store.diff.remote(1, 4))
    assert [entry["number"] for entry in found["versions"]] == [1, 4]
    assert found["between"] == [2, 3, 4]
    assert found["users"] == {"b": 2, "(erased)": 1}
    assert found["turns"][0] == {"turn": "sample-2", "user": "b", "session": "of-b", "version": 2}
    assert found["turns"][2] == {"turn": "sample-4", "user": None, "session": None, "version": 4}
    assert "secret" not in json.dumps(found)
    get(setup.store.rollback.remote(3))
    setup.publish(5, 3)
    assert get(setup.store.diff.remote(4, 5))["between"] == [4, 5]
    with pytest.raises(RayTaskError, match="8 does not exist"):
        get(setup.store.diff.remote(1, 8))


def test_an_exported_version_is_what_transformers_loads(setup, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    setup.publish(1, 0, scale=1.1)
    folder = tmp_path / "exported"
    assert get(setup.store.export.remote(1, str(folder))) == {"number": 1, "folder": str(folder)}
    ids = AutoTokenizer.from_pretrained(folder)("How many apples?", return_tensors="pt").input_ids
    base, exported = (AutoModelForCausalLM.from_pretrained(place) for place in (BASE, folder))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(1.1)
        torch.testing.assert_close(exported(ids).logits, base(ids).logits)
    assert {"canary.npz"} & {file.name for file in folder.iterdir()} == set()
    with pytest.raises(RayTaskError, match="not empty; name another"):
        get(setup.store.export.remote(1, str(folder)))
    get(setup.store.export.remote(0, str(tmp_path / "base")))
    assert (tmp_path / "base" / "config.json").read_text() == (Path(BASE) / "config.json").read_text()


@pytest.mark.parametrize("harm", ["truncated", "missing", "no canary"])
def test_a_damaged_newest_version_gives_way_to_its_parent(roomy, harm):
    publish_all(roomy, 3)
    ray.kill(roomy.store)
    folder = roomy.folder / "versions" / "3"
    if harm == "missing":
        shutil.rmtree(folder)
    elif harm == "truncated":
        os.truncate(folder / "model.safetensors", 5000)
    else:
        (folder / "canary.npz").unlink()
    roomy.restart()
    publication = get(roomy.store.wait.remote("a", {GROUP: 0}, 10.0))
    assert publication.number == 2
    assert get(roomy.store.latest.remote()) == Head(2, 4)
    assert roomy.states() == {0: "retired", 1: "retired", 2: "serving", 3: "rejected"}
    last = get(roomy.journal.version_events.remote())
    assert any(event.version == 3 and event.reason.startswith("checkpoint damaged: ") for event in last)
    assert harm == "missing" or (folder / "config.json").exists(), "what is left of it was touched"


def test_a_lost_versions_folder_is_not_taken_for_damage(roomy):
    publish_all(roomy, 2)
    ray.kill(roomy.store)
    (roomy.folder / "versions").rename(roomy.folder / "elsewhere")
    roomy.restart()
    with pytest.raises(RayTaskError, match=r"versions is missing, and 2 versions in it; restore it"):
        get(roomy.store.latest.remote())
    (roomy.folder / "elsewhere").rename(roomy.folder / "versions")
    assert get(roomy.store.latest.remote()) == Head(2, 3)


def test_what_the_journal_refuses_does_not_happen(roomy):
    publish_all(roomy, 2)
    get(roomy.journal.close.remote())
    for act in (lambda: roomy.store.rollback.remote(1), lambda: roomy.store.pin.remote(1)):
        with pytest.raises(RayTaskError, match="the journal is closed"):
            get(act())
    with pytest.raises(RayTaskError, match="the journal is closed"):
        roomy.report(2, error=0.5)
    kept = JournalReader(f"sqlite:///{roomy.folder}/journal.sqlite").version_events()
    assert {event.version: event.state for event in kept} == {0: "retired", 1: "retired", 2: "serving"}
