"""The journal as an actor on both databases: durable when it returns, whoever dies; long polls that wake."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import ray
from handles import answer, is_pending
from ray.exceptions import RayActorError

from clawrl.errors import JournalError
from clawrl.journal.actor import Journal
from clawrl.journal.store import JournalStore
from clawrl.types import Capture, Judgement, NextState, Sample, Turn, VersionEvent, VersionSpan, WeightVersion

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster")]


@pytest.fixture
def journal(actors, url):
    return actors(Journal, url)


@contextmanager
def running(url: str, **options: Any) -> Iterator[Any]:
    """A journal in a process of its own for the time of a block."""
    actor: Any = ray.remote(Journal).options(num_cpus=0, **options).remote(url)
    try:
        yield actor
    finally:
        ray.kill(actor)


def turn(id: str, user: str = "ann") -> Turn:
    tokens = np.arange(4, dtype=np.int32)
    capture = Capture(tokens, tokens, tokens * -0.5, tokens[:, None], tokens[:, None] * -0.5, (VersionSpan(0, 0, 4),))
    messages, reply = ({"role": "user", "content": "hello"},), {"role": "assistant", "content": "hi"}
    return Turn(id, user, "s", 0, "main", "chat", None, messages, (), {}, reply, "stop", f"c {id}", capture, 1.0, 2.0)


def next_state(turn: str) -> NextState:
    return NextState(turn, "user", ({"role": "user", "content": "thanks"},), False, 3.0)


def sample(id: str) -> Sample:
    tokens = np.arange(3, dtype=np.int32)
    return Sample(id, "ann", "chat", tokens, tokens > 0, tokens * 0.5, None, None, None, 0, 0, 1.0, 4.0)


def pid(actor: Any) -> int:
    return answer(actor.__ray_call__.remote(lambda _: os.getpid()))


def test_what_append_returned_for_survives_kill_9(url):
    with running(url) as journal:
        process = pid(journal)
        answer([journal.append.remote(turn(str(number))) for number in range(8)])
        os.kill(process, signal.SIGKILL)
        with pytest.raises(RayActorError):
            answer(journal.counts.remote())
    with closing(JournalStore(url)) as store:
        assert store.counts()["turns"] == 8
        last = store.turn("7")
        assert last is not None
        assert last.capture.completion_ids.tolist() == [0, 1, 2, 3]


def test_ray_restarts_it_and_retries_what_was_on_its_way(url):
    with running(url, max_restarts=-1, max_task_retries=-1) as journal:
        answer(journal.append.remote(turn("before")))
        os.kill(pid(journal), signal.SIGKILL)
        answer([journal.append.remote(turn(str(number))) for number in range(16)])
        assert answer(journal.counts.remote())["turns"] == 17


def test_concurrent_appends_are_all_there_once(journal):
    appends = [journal.append.remote(turn(str(number % 100)), next_state(str(number % 100))) for number in range(200)]
    answer(appends)
    counts = answer(journal.counts.remote())
    assert (counts["turns"], counts["next_states"]) == (100, 100)


def test_one_guilty_append_does_not_take_down_its_neighbours(journal):
    ids = [f"bad {number} \ud800" if number % 10 == 5 else str(number) for number in range(40)]
    outcomes = []
    for append in [journal.append.remote(turn(id)) for id in ids]:
        try:
            outcomes.append(answer(append))
        except JournalError as error:
            outcomes.append(error)
    assert [isinstance(outcome, JournalError) for outcome in outcomes] == [id.startswith("bad") for id in ids]
    assert answer(journal.counts.remote())["turns"] == 36


def test_reads(journal):
    answer(journal.append.remote(turn("a"), turn("b", "eve"), next_state("a")))
    answer(journal.append.remote(Judgement("a", (1,), 1, (), 0, 0.1, None, 4.0)))
    assert answer(journal.turn.remote("a")).messages == turn("a").messages
    assert answer(journal.turn.remote("c")) is None
    assert answer(journal.open_turn.remote("ann", "c a")) == ("a", "s", 0)
    assert answer(journal.last_turn.remote("eve", "s")) == ("b", "s", 0, "c b")
    assert answer(journal.recent_scores.remote("ann", 5)) == [1]
    assert answer([journal.versions.remote(), journal.version_events.remote(), journal.swaps.remote()]) == [[]] * 3


def test_a_version_consumes_its_samples_once(journal):
    answer(journal.append.remote(sample("a"), sample("b")))
    first, again = (WeightVersion(number, 0, "full", None, ("a",), {}, 5.0) for number in (1, 2))
    event = VersionEvent(1, "candidate", "trained", 5.0)
    answer(journal.record_version.remote(first, event))
    answer(journal.record_version.remote(first, event))
    with pytest.raises(JournalError, match="learn again from sample a"):
        answer(journal.record_version.remote(again, None))
    [(_, left, _)] = answer(journal.samples_to_train.remote(0, 10, 0))
    assert left.id == "b"
    assert answer(journal.version_events.remote()) == [event]


@pytest.mark.parametrize(
    ("poll", "earlier", "awaited"),
    [("pairs_to_judge", [turn("a")], next_state("a")), ("samples_to_train", [], sample("a"))],
    ids=["pairs", "samples"],
)
def test_long_poll_wakes_at_the_commit(journal, poll, earlier, awaited):
    answer(journal.append.remote(*earlier))
    polling = getattr(journal, poll).remote(0, 10, 300.0)
    assert is_pending(polling, 0.5)
    answer(journal.append.remote(turn("of no interest")))
    answer(journal.append.remote(awaited))
    [found] = answer(polling)
    assert found[0] == 1
    assert answer(getattr(journal, poll).remote(1, 10, 0)) == []


def test_long_poll_returns_nothing_at_its_timeout(journal):
    started = time.monotonic()
    assert answer(journal.samples_to_train.remote(0, 10, 0.3)) == []
    assert time.monotonic() - started >= 0.3


def test_close_leaves_no_append_in_doubt_and_ends_polls(url):
    with running(url) as journal:
        polling = journal.pairs_to_judge.remote(0, 10, 300.0)
        while not answer(journal.__ray_call__.remote(lambda actor: NextState in actor._arrivals)):
            time.sleep(0.05)  # until it waits
        appends = {str(number): journal.append.remote(turn(str(number))) for number in range(50)}
        answer(journal.close.remote())
        assert answer(polling) == []
        durable = {id for id, append in appends.items() if not is_refused(append)}
        with pytest.raises(JournalError, match="closed"):
            answer(journal.append.remote(turn("late")))
    with closing(JournalStore(url)) as store:
        assert {id for id in [*appends, "late"] if store.turn(id) is not None} == durable


def is_refused(append: Any) -> bool:
    try:
        answer(append)
    except JournalError:
        return True
    return False


def test_a_useless_url_is_told_to_whoever_asks(tmp_path):
    refusal = pytest.raises(RayActorError, match="make its folder first")
    with running(f"sqlite:///{tmp_path}/nowhere/journal.sqlite") as journal, refusal:
        answer(journal.counts.remote())
