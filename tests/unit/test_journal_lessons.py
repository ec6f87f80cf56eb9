"""Sessions that teach when they have ended: which wait, what they hold, and that a turn is taught once."""

import time
from contextlib import closing
from dataclasses import replace

import pytest
from test_journal import judgement, next_state, sample, turn

from clawrl.journal import queues
from clawrl.journal.store import JournalStore
from clawrl.types import Consent, Feedback, Lesson

LATER, EARLIER = 1e12, 0.0
"""Everything, or nothing, has been silent for long enough."""


@pytest.fixture
def store(url):
    with closing(JournalStore(url)) as opened:
        yield opened


def deferred(id: str, **changes):
    return replace(judgement(id, **changes), deferred=True)


def say(store, *ids: str, session: str = "s", judged: bool = True, done: bool = False) -> None:
    """Turns of a session, each with what followed."""
    for id in ids:
        last = done and id == ids[-1]
        store.append(turn(id, session=session), replace(next_state(id), done=last))
        if judged:
            store.append(deferred(id))


def taught(id: str) -> Lesson:
    return Lesson(id, "Be brief.", None, 5.0)


def waiting(store, session: str = "s") -> list[str]:
    user = turn("x").user
    return [each.id for each, _, _, waits in store.exchanges(user, session) if waits]


def test_a_session_ends_by_word_or_by_silence(store):
    user = turn("x").user
    say(store, "a", "b", done=True)
    say(store, "c", "d", session="open")
    assert store.sessions_to_distil(EARLIER, 10) == [(user, "s")]
    assert store.sessions_to_distil(LATER, 10) == [(user, "s"), (user, "open")]
    assert store.sessions_to_distil(LATER, 1) == [(user, "s")]
    store.append(turn("e", session="s"))  # it goes on: the word of its end was not the last
    assert store.sessions_to_distil(EARLIER, 10) == []


def test_a_session_waits_for_its_judgements(store):
    say(store, "a")
    say(store, "b", judged=False, done=True)
    assert store.sessions_to_distil(LATER, 10) == []
    store.append(deferred("b"))
    assert store.sessions_to_distil(LATER, 10) == [(turn("x").user, "s")]


def test_a_turn_is_taught_once(store):
    say(store, "a", "b", done=True)
    store.append(judgement("side"), turn("side", kind="side"))
    assert waiting(store) == ["a", "b"]
    store.append(taught("a"), taught("b"), sample("a"))
    store.append(replace(taught("a"), text="another"), sample("a"))
    assert waiting(store) == []
    assert store.sessions_to_distil(LATER, 10) == []
    assert store.lesson("a") == taught("a")
    say(store, "c")
    assert waiting(store) == ["c"], "what a session says after its end is taught by itself"
    assert [each.id for each, *_ in store.exchanges(turn("x").user, "s")] == ["a", "b", "c"]


def test_the_list_is_what_the_records_tell(store):
    say(store, "a", "b", "c")
    store.append(judgement("elsewhere"), turn("elsewhere"), taught("b"))
    with store.database.writer.begin() as connection:
        assert queues.stale(connection) == {}
        queues.fill(connection)
    assert waiting(store) == ["a", "c"]


def test_who_opts_out_teaches_nothing(store):
    say(store, "a", "b", done=True)
    store.append(taught("b"))
    store.consent(Consent(turn("x").user, None, False, time.time()))
    assert store.sessions_to_distil(LATER, 10) == []
    assert store.exchanges(turn("x").user, "s") == []
    store.append(taught("a"))
    assert store.lesson("a") is None


def test_late_feedback_has_a_turn_taught_again_that_learnt_nothing(store):
    say(store, "a", "b", done=True)
    store.append(taught("a"), taught("b"), sample("b"))
    for id in ("a", "b"):
        taken: list[tuple[str, bool]] = []
        said = Feedback(f"f-{id}", id, turn("x").user, -1, None, 9.0)
        store.write(store.taking_feedback(said, taken))
        assert taken == [(f"f-{id}", id == "a")]
    store.append(deferred("a", score=-1))
    assert waiting(store) == ["a"]


def test_what_waits_does_not_expire(store):
    say(store, "a", "b")
    store.append(taught("b"))
    assert store.expire(LATER, 0, 10) is not None
    assert waiting(store) == ["a"]
    assert store.turn("b") is None
    assert store.lesson("b") is None
