"""The replay buffer over a real journal: nothing lost, nothing twice, whoever restarts."""

import dataclasses
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import ray
from handles import answer, is_pending

from clawrl.config import BufferSection
from clawrl.journal.actor import Journal
from clawrl.training.buffer import CLOSED, ReplayBuffer, shares
from clawrl.types import PolicyScope, Sample, VersionEvent, WeightVersion

pytestmark = pytest.mark.cluster
PATIENCE_S = 120.0
EMPTY = {
    "size": 0,
    "offline": 0,
    "longest": 0,
    "everyones": 0,
    "leased": 0,
    "replayed": 0,
    "dropped": 0,
    "oldest_version": None,
}


RESTARTS = {"max_restarts": -1, "max_task_retries": -1}


@pytest.fixture
def journal(actors, tmp_path):
    return actors(Journal, f"sqlite:///{tmp_path}/journal.sqlite", **RESTARTS)


@pytest.fixture
def start(actors, journal):
    def start_buffer(batch_size: int = 4, max_lag: int = 2, scope: PolicyScope = "group", **given: Any) -> Any:
        settings = BufferSection(batch_size=batch_size, max_lag=max_lag, **given)
        return actors(ReplayBuffer, settings, journal, scope, **RESTARTS)

    return start_buffer


def sample(id: str, version: int = 0) -> Sample:
    tokens = np.arange(3, dtype=np.int32)
    return Sample(id, "ann", "chat", tokens, tokens > 0, tokens * 0.5, None, None, None, version, version, 1.0, 4.0)


def append(journal, ids: str, version: int = 0) -> None:
    """One sample per letter."""
    answer(journal.append.remote(*(sample(id, version) for id in ids)))


def record(journal, number: int, ids: str) -> None:
    """Version `number` learnt from the samples `ids`."""
    version = WeightVersion(number, number - 1, "full", None, tuple(ids), {}, 5.0)
    answer(journal.record_version.remote(version, None))


def take(buffer, step: int, timeout_s: float = PATIENCE_S) -> str | None:
    """The batch's sample ids in a row, None at the timeout."""
    batch = answer(buffer.take.remote(step, timeout_s))
    if batch is None:
        return None
    assert batch.step == step
    return "".join(found.id for found in batch.samples)


def stats(buffer, **expected) -> dict:
    """The statistics, once `expected` is among them."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        found = answer(buffer.stats.remote())
        if found.items() >= expected.items():
            return found
        assert time.monotonic() < deadline, f"{found} never came to {expected}"
        time.sleep(0.05)


def kill_9(actor) -> None:
    os.kill(answer(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)


def test_a_batch_comes_when_it_is_full_and_the_surplus_stays(journal, start):
    buffer = start()
    assert take(buffer, 1, 0.2) is None
    append(journal, "abc")
    assert take(buffer, 1, 0.2) is None
    taking = buffer.take.remote(1, PATIENCE_S)
    append(journal, "defghi")
    assert "".join(found.id for found in answer(taking).samples) == "abcd"
    assert stats(buffer, size=5) == {
        "size": 5,
        "offline": 0,
        "longest": 5,
        "everyones": 5,
        "leased": 4,
        "replayed": 0,
        "dropped": 0,
        "oldest_version": 0,
    }
    record(journal, 1, "abcd")
    answer(buffer.release.remote(1))
    assert take(buffer, 2) == "efgh"
    record(journal, 2, "efgh")
    answer(buffer.release.remote(2))
    assert take(buffer, 3, 0.2) is None
    assert stats(buffer)["size"] == 1


def test_a_small_batch_comes_when_it_has_waited_long_enough(journal, start):
    buffer = start(min_batch=2, max_wait_s=0.3)
    append(journal, "a")
    assert take(buffer, 1, 0.6) is None, "less than the least"
    started = time.monotonic()
    append(journal, "bc")
    assert take(buffer, 1) == "abc"
    append(journal, "defgh")
    record(journal, 1, "abc")
    answer(buffer.release.remote(1))
    assert take(buffer, 2) == "defg", "a whole one does not wait"
    record(journal, 2, "defg")
    answer(buffer.release.remote(2))
    assert take(buffer, 3, 0.6) is None
    append(journal, "i")
    assert take(buffer, 3) == "hi"
    assert time.monotonic() - started >= 0.6


def test_who_waits_for_a_small_batch_is_called_in_time(journal, start):
    buffer = start(min_batch=1, max_wait_s=0.5)
    taking = buffer.take.remote(1, PATIENCE_S)
    time.sleep(0.2)
    append(journal, "a")
    assert is_pending(taking, 0.05)
    assert [found.id for found in answer(taking).samples] == ["a"]


def test_batches_carry_samples_whole(journal, start):
    original = dataclasses.replace(sample("a"), advantages=np.array([0, 1, -1], np.float32))
    answer(journal.append.remote(original))
    batch = answer(start(batch_size=1).take.remote(1, PATIENCE_S))
    [found] = batch.samples
    assert found.advantages.dtype == np.float32
    assert found.advantages.tolist() == [0, 1, -1]
    assert found.reference_logprobs is None


def test_the_same_step_gets_the_same_batch(journal, start):
    buffer = start()
    taking = [buffer.take.remote(1, PATIENCE_S) for _ in range(3)]
    append(journal, "abcdefghijkl")
    batches = answer(taking)
    assert [[found.id for found in batch.samples] for batch in batches] == [["a", "b", "c", "d"]] * 3
    assert take(buffer, 1) == "abcd"
    assert stats(buffer, size=8)["leased"] == 4


def test_stale_samples_are_dropped_and_counted(journal, start):
    buffer = start(max_lag=2)
    append(journal, "abc", version=0)
    append(journal, "def", version=1)
    stats(buffer, size=6)
    answer(buffer.advance.remote([2, 1, 0]))
    assert stats(buffer) == EMPTY | {"size": 6, "longest": 6, "everyones": 6, "oldest_version": 0}
    answer(buffer.advance.remote([3, 2, 1, 0]))
    assert stats(buffer) == EMPTY | {"size": 3, "longest": 3, "everyones": 3, "dropped": 3, "oldest_version": 1}
    append(journal, "gh", version=0)
    append(journal, "i", version=3)
    assert take(buffer, 4) == "defi"
    assert stats(buffer) == EMPTY | {"leased": 4, "dropped": 5}


@pytest.mark.parametrize(
    ("waiting", "offline", "size", "fraction", "expected"),
    [
        (9, 9, 8, 0.0, (8, 0)),
        (9, 9, 8, 0.25, (6, 2)),
        (9, 1, 8, 0.25, (7, 1)),
        (9, 0, 8, 0.25, (8, 0)),
        (3, 9, 8, 0.25, (3, 1)),  # a quarter of four, where no more than three wait
        (2, 9, 8, 0.25, (2, 0)),
        (0, 9, 8, 0.5, (0, 0)),
        (4, 9, 5, 0.2, (4, 1)),
        (9, 9, 10, 0.99, (1, 9)),
        (99, 99, 100, 0.29, (71, 29)),
    ],
)
def test_offline_samples_are_at_most_their_share(waiting, offline, size, fraction, expected):
    found = shares(waiting, offline, BufferSection(batch_size=size, replay_fraction=fraction))
    assert found == expected
    assert found[1] <= fraction * sum(found) + 1e-9


def test_stale_samples_are_replayed_newest_first_and_once(journal, start):
    buffer = start(batch_size=4, replay_fraction=0.25, replay_size=2, min_batch=1, max_wait_s=3600.0)
    append(journal, "abcd", version=1)
    stats(buffer, size=4)
    append(journal, "e", version=2)
    stats(buffer, size=5)
    answer(buffer.advance.remote([5, 4, 3, 2, 1, 0]))
    stats(buffer, size=0, offline=2, dropped=3)  # d and e are the newest
    append(journal, "fgh", version=5)
    assert take(buffer, 6) == "fghe"
    record(journal, 6, "fghe")
    answer(buffer.release.remote(6))
    append(journal, "ijk", version=5)
    assert take(buffer, 7) == "ijkd"
    record(journal, 7, "ijkd")
    answer(buffer.release.remote(7))
    append(journal, "lmn", version=5)
    assert take(buffer, 8, timeout_s=1.0) is None
    stats(buffer, size=3, offline=0, replayed=2, dropped=3)


@pytest.mark.processes
def test_a_killed_buffer_replays_the_same_samples_for_the_same_step(journal, start):
    for number in range(1, 6):
        record(journal, number, "")
    append(journal, "ab", version=1)
    append(journal, "fgh", version=5)
    buffer = start(batch_size=4, replay_fraction=0.25)
    stats(buffer, size=3, offline=2)
    assert take(buffer, 6) == "fghb"
    kill_9(buffer)
    assert take(buffer, 6) == "fghb"
    record(journal, 6, "fghb")
    append(journal, "ijk", version=5)
    assert take(buffer, 7) == "ijka"


def test_a_lease_outlives_its_age(journal, start):
    buffer = start(max_lag=1)
    append(journal, "abcdefgh")
    assert take(buffer, 1) == "abcd"
    stats(buffer, size=4)
    answer(buffer.advance.remote([5, 4, 3, 2, 1, 0]))
    assert take(buffer, 1) == "abcd"
    assert stats(buffer)["dropped"] == 4


def test_a_rollback_makes_no_sample_older_and_the_refused_batch_comes_again(journal, start):
    for number in range(1, 9):
        record(journal, number, "")
    rejected = [VersionEvent(number, "rejected", "rolled back", 5.0) for number in range(4, 9)]
    append(journal, "abcd", version=8)  # by the line that was rejected
    append(journal, "efgh", version=3)
    answer(journal.append.remote(*rejected))
    buffer = start(max_lag=1)  # it starts after the rollback, and finds the line in the journal
    stats(buffer, size=8, dropped=0)
    assert take(buffer, 9) == "abcd"
    answer(buffer.advance.remote([3, 2, 1, 0]))  # offer 9 was refused, 9 is made again
    assert take(buffer, 9) == "abcd"
    answer(journal.record_version.remote(WeightVersion(9, 3, "full", None, tuple("abcd"), {}, 6.0), None))
    answer([buffer.release.remote(9), buffer.advance.remote([9, 3, 2, 1, 0])])
    assert stats(buffer) == {
        "size": 4,
        "offline": 0,
        "longest": 4,
        "everyones": 4,
        "leased": 0,
        "replayed": 0,
        "dropped": 0,
        "oldest_version": 3,
    }  # 3 is one step ago, not six
    answer(buffer.advance.remote([10, 9, 3, 2, 1, 0]))
    assert stats(buffer)["dropped"] == 4


def test_cold_start_reads_what_no_version_consumed(journal, start):
    append(journal, "abcdefgh", version=0)
    append(journal, "ijkl", version=3)
    for number, ids in ((1, "a"), (2, "b"), (3, "c")):
        record(journal, number, ids)
    buffer = start(max_lag=2)
    assert take(buffer, 4) == "ijkl"  # d to h are three versions old
    assert stats(buffer) == EMPTY | {"leased": 4, "dropped": 5}


@pytest.mark.processes
def test_a_killed_buffer_gives_the_same_batch_for_the_same_step(journal, start):
    buffer = start()
    append(journal, "abcdefgh")
    assert take(buffer, 1) == "abcd"
    kill_9(buffer)
    assert take(buffer, 1) == "abcd"


@pytest.mark.processes
def test_a_buffer_killed_during_a_step_does_not_hand_its_samples_out_again(journal, start):
    buffer = start()
    append(journal, "abcdefgh")
    assert take(buffer, 1) == "abcd"
    kill_9(buffer)
    assert stats(buffer, size=8)["leased"] == 0  # restarted while the trainer works on abcd
    record(journal, 1, "abcd")
    answer(buffer.release.remote(1))
    assert take(buffer, 2) == "efgh"


@pytest.mark.parametrize(("recorded", "expected"), [(True, "efgh"), (False, "abcd")])
def test_a_trainer_that_never_released(journal, start, recorded, expected):
    buffer = start()
    append(journal, "abcdefgh")
    assert take(buffer, 1) == "abcd"
    if recorded:
        record(journal, 1, "abcd")
    assert take(buffer, 2) == expected
    assert stats(buffer, leased=4, size=0 if recorded else 4)["dropped"] == 0


def test_a_late_release_leaves_the_lease_in_work_alone(journal, start):
    buffer = start()
    append(journal, "abcdefgh")
    assert take(buffer, 1) == "abcd"
    record(journal, 1, "abcd")
    assert take(buffer, 2) == "efgh"
    answer(buffer.release.remote(1))
    assert take(buffer, 2) == "efgh"


@pytest.mark.processes
def test_a_killed_journal_is_only_a_pause(journal, start, tmp_path):
    buffer = start()
    append(journal, "ab")
    stats(buffer, size=2)
    ray.kill(journal, no_restart=False)
    append(journal, "cd")
    assert take(buffer, 1) == "abcd"


def test_closing_ends_the_trainer(journal, start):
    buffer = start()
    waiting = buffer.take.remote(1, 60.0)
    assert is_pending(waiting, 0.5)
    answer(buffer.close.remote())
    for batch in answer([waiting, buffer.take.remote(2, 60.0)]):
        assert (batch.step, batch.samples) == (CLOSED, ())


def of(user: str, ids: str, scope: PolicyScope = "user") -> list[Sample]:
    return [dataclasses.replace(sample(id), user=user, policy_scope=scope) for id in ids]


def test_no_policy_learns_from_what_is_anothers_and_all_have_their_turn(start, journal):
    """Ann's 12, Ben's 4: batches of one user's alone, in turn, however many one has."""
    buffer = start(scope="user")
    answer(journal.append.remote(*of("ann", "abcdefgh"), *of("ben", "ABCD"), *of("ann", "ijkl")))
    batches = []
    for step in range(1, 5):
        batch = answer(buffer.take.remote(step, PATIENCE_S))
        ids = "".join(each.id for each in batch.samples)
        batches.append((batch.scope, ids))
        answer(
            journal.record_version.remote(WeightVersion(step, 0, "lora", None, tuple(ids), {}, 5.0, batch.scope), None)
        )
        answer(buffer.release.remote(step))
    assert sorted(batches) == [("ann", "abcd"), ("ann", "efgh"), ("ann", "ijkl"), ("ben", "ABCD")]
    assert ("ben", "ABCD") in batches[:2]


def test_everyones_policy_and_the_users_learn_from_a_sample_once_each(start, journal):
    buffer = start(scope="hierarchy")
    answer(journal.append.remote(*of("ann", "abcd", "hierarchy")))
    found = []
    for step in (1, 2):
        batch = answer(buffer.take.remote(step, PATIENCE_S))
        ids = tuple(each.id for each in batch.samples)
        found.append((batch.scope, "".join(ids)))
        answer(journal.record_version.remote(WeightVersion(step, 0, "lora", None, ids, {}, 5.0, batch.scope), None))
        answer(buffer.release.remote(step))
        buffer = start(scope="hierarchy")  # one that knows the journal alone
    assert sorted(found) == [("", "abcd"), ("ann", "abcd")]
    assert take(buffer, 3, 0.2) is None


def test_a_users_samples_are_as_old_as_their_own_policy_makes_them(start, journal):
    """Everyone's has gone on by three, Ann's has not: what she was answered is not old for hers."""
    buffer = start(scope="hierarchy")
    answer([buffer.advance.remote([1], "ann"), buffer.advance.remote([4, 3, 2, 0])])
    answer(journal.append.remote(*of("ann", "abcd", "hierarchy")))
    batch = answer(buffer.take.remote(5, PATIENCE_S))
    assert (batch.scope, len(batch.samples)) == ("ann", 4)
    assert answer(buffer.stats.remote())["dropped"] == 4


def test_everyones_policy_learns_from_what_users_own_said_just_now(start, journal):
    """Ann's version 1 is her newest while everyone's has gone on to 7: what it says is as old as it is long ago."""
    buffer = start(scope="hierarchy")
    answer([buffer.advance.remote([1], "ann"), buffer.advance.remote([7, 6, 5, 4, 3, 2, 0])])
    now, long_ago = time.time(), 4.0
    fresh, stale = of("ann", "abcd", "hierarchy"), of("ann", "ABCD", "hierarchy")
    answer(journal.append.remote(*(dataclasses.replace(each, newest_version=1, at=now) for each in fresh)))
    answer(journal.append.remote(*(dataclasses.replace(each, newest_version=1, at=long_ago) for each in stale)))
    found = {}
    for step in (8, 9, 10):
        batch = answer(buffer.take.remote(step, PATIENCE_S))
        ids = tuple(each.id for each in batch.samples)
        found.setdefault(batch.scope, []).append("".join(ids))
        answer(journal.record_version.remote(WeightVersion(step, 0, "lora", None, ids, {}, 5.0, batch.scope), None))
        answer(buffer.release.remote(step))
    assert found == {"": ["abcd"], "ann": ["abcd", "ABCD"]}
    assert answer(buffer.stats.remote())["dropped"] == 4


def test_what_users_count_in_everyones(start, journal):
    buffer = start(scope="hierarchy", user_weights={"ann": 3.0}, batch_size=2)
    answer(journal.append.remote(*of("ann", "a", "hierarchy"), *of("ben", "b", "hierarchy")))
    batch = answer(buffer.take.remote(1, PATIENCE_S))
    assert [(each.user, each.weight) for each in batch.samples] == [("ann", 3.0), ("ben", 1.0)]


def test_a_batch_of_everyones_has_no_more_of_a_user_than_their_quota(start, journal):
    buffer = start(user_quota=2, min_batch=1, max_wait_s=0.5)
    answer(journal.append.remote(*of("ann", "abcde", "group"), *of("ben", "AB", "group")))
    batch = answer(buffer.take.remote(1, PATIENCE_S))
    assert "".join(each.id for each in batch.samples) == "abAB"
    record(journal, 1, "abAB")
    answer(buffer.release.remote(1))
    assert take(buffer, 2) == "cd", "less than a batch, after a while"
