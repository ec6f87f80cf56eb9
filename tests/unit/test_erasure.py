"""Opt-out and erasure in the journal: what enters, what still trains, and what is left on disk afterwards."""

import dataclasses
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from test_journal import judgement, next_state, rows, sample, turn, version

from clawrl.errors import WithdrawnError
from clawrl.journal import queues
from clawrl.journal.store import JournalStore
from clawrl.types import NOT_KEPT, Consent, Erasure, Feedback, Pin, VersionEvent

WORDS = "the zebra's umbrella"
TOKENS = np.arange(70_000, 70_400, dtype=np.int32)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def store(path):
    with closing(JournalStore(f"sqlite:///{path}")) as opened:
        yield opened


def word(train: bool, session: str | None = None, user: str = "ann") -> Consent:
    return Consent(user, session, train, 10.0)


def erasure(session: str | None = None, user: str = "ann", versions: tuple[int, ...] = (), at: float = 20.0) -> Erasure:
    return Erasure(user, session, 0, versions, None, at)


def rejected(number: int) -> VersionEvent:
    return VersionEvent(number, "rejected", "learnt from what was erased", 20.0)


def to_judge(store: JournalStore) -> list[str]:
    return [turn.id for _, turn, _ in store.pairs_to_judge(0, 100)]


def to_train(store: JournalStore) -> list[str]:
    return [sample.id for _, sample, _ in store.samples_to_train(0, 100)]


def turns(store: JournalStore) -> list[str]:
    return [id for id in "abcdefgh" if store.turn(id) is not None]


class TestOptOut:
    def test_nothing_of_an_opted_out_user_enters_but_the_conversations_digest(self, store, path):
        store.consent(word(False))
        store.append(turn("a"), next_state("a"))
        store.append(turn("b", user="bob"))
        assert turns(store) == ["b"]
        assert to_judge(store) == []
        assert store.unrecorded("ann", ["digest of a"]) == "s"
        assert store.unrecorded("bob", ["digest of a"]) is None
        assert store.unrecorded("ann", ["digest of b"]) is None

    def test_of_one_session_only(self, store):
        store.consent(word(False, "s"))
        store.append(turn("a"), turn("b", session="other"), turn("c", user="bob"))
        assert turns(store) == ["b", "c"]

    def test_what_was_recorded_before_stays_and_never_trains(self, store):
        store.append(turn("a"), next_state("a"), turn("b"), next_state("b"), judgement("b"), sample("b"))
        store.append(turn("c", user="bob"), next_state("c"), sample("c", user="bob"))
        store.consent(word(False))
        assert turns(store) == ["a", "b", "c"]
        assert (to_judge(store), to_train(store)) == (["c"], ["c"])
        store.consent(word(True))
        store.append(turn("d"), next_state("d"), sample("d"))
        assert (to_judge(store), to_train(store)) == (["c", "d"], ["c", "d"]), "an opt-in is for what comes after"

    def test_what_comes_late_about_an_earlier_turn_is_ignored(self, store, path):
        """A continuation that raced with the opt-out, and what the collector had in work."""
        store.append(turn("a"))
        store.consent(word(False))
        store.append(next_state("a"))
        store.append(judgement("a"), sample("a"), Feedback("f", "a", "ann", 1, None, 1.0))
        store.append(turn("a"))  # a repeated append
        counts = store.counts()
        assert (counts["next_states"], counts["judgements"], counts["samples"]) == (0, 0, 0)
        assert rows(store, "SELECT count(*) FROM feedback") == [(0,)]

    def test_a_session_is_recorded_if_neither_it_nor_its_user_opted_out(self, store):
        store.consent(word(False))
        store.consent(word(True, "s"))
        store.append(turn("a"))
        store.consent(word(True))
        store.append(turn("b"))
        store.consent(word(False, "s"))
        store.append(turn("c"), turn("d", session="other"))
        assert turns(store) == ["b", "d"]

    def test_a_word_said_again_changes_nothing(self, store, path):
        for train in (False, False, True, True):
            store.consent(word(train))
        assert [consent.train for _, consent in store.consents(0, 10)] == [False, True]
        assert store.withdrawals() == 0, "there is nothing to withdraw"
        store.append(turn("a"), turn("b"))
        store.consent(word(False))
        assert store.withdrawals() == 2

    @pytest.mark.parametrize(("ended", "expected"), [(9.0, "s"), (10.0, "s"), (11.0, None)])
    def test_the_newer_of_mark_and_turn_goes_on(self, store, ended, expected):
        store.append(turn("a", conversation="digest", ended=ended), Consent("ann", "s", False, 10.0, "digest"))
        store.append(turn("b", conversation="digest", kind="side"), turn("c", conversation="digest", user="bob"))
        assert store.unrecorded("ann", ["digest"]) == expected

    def test_marks_are_no_words(self, store):
        store.append(turn("a"), next_state("a"), sample("a"))
        store.append(Consent("ann", "s", False, 10.0, "digest"))
        store.append(turn("b"))
        assert store.consents(0, 10) == []
        assert (turns(store), to_train(store), store.withdrawals()) == (["a", "b"], ["a"], 0)

    def test_a_version_that_learnt_from_withdrawn_samples_is_refused_whole(self, store):
        store.append(turn("a"), sample("a"), sample("b", user="bob"))
        store.consent(word(False))
        with pytest.raises(WithdrawnError, match="version 1 learnt from 1 samples that were withdrawn meanwhile"):
            store.record_version(version(1, "a", "b"), None)
        assert store.versions() == []
        assert to_train(store) == ["b"]

    def test_the_lists_agree_with_the_records(self, store):
        store.append(turn("a"), next_state("a"), turn("b"), sample("b"), turn("c", user="bob"), next_state("c"))
        store.consent(word(False))
        with store.database.snapshot() as connection:
            assert queues.stale(connection) == {}
        with store.database.writer.begin() as connection:
            queues.fill(connection)
        assert (to_judge(store), to_train(store)) == (["c"], [])


def test_a_turn_without_its_tokens_is_not_judged(store):
    store.append(turn("a", capture=NOT_KEPT), next_state("a"), turn("b"), next_state("b"))
    assert to_judge(store) == ["b"]
    found = store.turn("a")
    assert found is not None
    assert len(found.capture.prompt_ids) == 0


class TestErasure:
    def fill(self, store: JournalStore, many: int = 1) -> None:
        """Ann's `a` and Bob's `b`, and `many` more of both."""
        for id, user in [("a", "ann"), ("b", "bob"), *((f"{i}", "ann" if i % 2 else "bob") for i in range(many))]:
            said = WORDS if user == "ann" else "other words"
            tokens = TOKENS if user == "ann" else np.arange(400, dtype=np.int32)
            capture = dataclasses.replace(turn("x").capture, prompt_ids=tokens)
            store.append(
                turn(id, user=user, messages=({"role": "user", "content": said},), reply={"content": said},
                     capture=capture),
                next_state(id, messages=({"role": "user", "content": said * 50},)),
                judgement(id, hints=(said,)),
                sample(id, user=user, token_ids=tokens, loss_mask=tokens > 0, logprobs=tokens * np.float32(0.5)),
                Feedback(f"f{id}", id, user, None, said, 1.0),
            )  # fmt: skip

    def test_nothing_is_left_in_any_file(self, store, path):
        """Words, and runs of tokens, in the database, its WAL and whatever else lies there."""
        self.fill(store, many=60)
        needles = [WORDS.encode(), TOKENS[5:20].tobytes(), (TOKENS[5:20] * np.float32(0.5)).tobytes()]

        def found(needle: bytes) -> bool:
            return any(needle in file.read_bytes() for file in path.parent.iterdir())

        assert all(map(found, needles)), "or the test could not fail"
        store.erase(erasure())
        store.scrub()
        assert not any(map(found, needles))
        assert found(b"other words")
        assert store.turn("b") is not None
        assert store.counts()["turns"] == 31

    def test_of_one_session(self, store):
        store.append(turn("a"), turn("b", session="other"), turn("c", user="bob"), sample("a"), sample("b"))
        store.erase(erasure("s"))
        assert (turns(store), to_train(store)) == (["b", "c"], ["b"])

    def test_it_is_recorded(self, store):
        store.erase(erasure(versions=(3,)))
        assert store.erasures() == [erasure(versions=(3,))]

    def test_nothing_comes_back_late(self, store, path):
        store.append(turn("a"))
        store.erase(erasure(at=20.0))
        store.append(turn("a"), next_state("a"), judgement("a"), sample("a"))
        store.append(turn("b", started=19.0), turn("c", started=21.0), turn("d", user="bob", started=19.0))
        assert turns(store) == ["c", "d"], "b was being answered when its user was erased"
        assert (to_judge(store), to_train(store)) == ([], [])

    def test_a_version_in_work_is_refused(self, store):
        self.fill(store)
        store.erase(erasure())
        with pytest.raises(WithdrawnError):
            store.record_version(version(1, "a", "b"), None)

    def test_what_learnt_from_it_is_told(self, store):
        self.fill(store, many=4)
        store.record_version(version(1, "b"), None)
        store.record_version(version(2, "a", "0"), None)
        store.append(Pin(1, True, 1.0), Pin(2, True, 1.0), Pin(1, False, 2.0))
        found = store.content("ann", None)
        assert (found.turns, found.samples, found.versions, found.pinned) == (3, 3, (2,), (2,))
        assert store.content("ann", "unknown").turns == 0
        assert store.owners("s") == ["ann", "bob"]

    def test_expired_samples_are_nobodys(self, store):
        self.fill(store, many=4)
        store.append(sample("no turn"))
        store.record_version(version(1, "a", "b", "no turn"), None)
        store.record_version(version(2, "0"), None)
        assert store.content("ann", None).unknown == 0
        store.erase(erasure("s"))
        assert store.content("ann", None).unknown == 0, "what was erased is known to be"
        store.expire(2e9, 0, 100)
        assert store.content("ann", None).unknown == 2, "Bob's, who may have been anybody"

    def test_consumption_stays_unless_its_version_is_rejected(self, store):
        self.fill(store, many=4)
        store.record_version(version(1, "b"), None)
        store.record_version(version(2, "a", "0"), None)
        store.record_version(version(3, "1", "2"), None)
        store.erase(erasure(), [rejected(2), rejected(3)])
        assert to_train(store) == ["0", "2"], "the samples of others that only rejected versions learnt from"
        assert store.content("ann", None).turns == 0
        store.record_version(version(4, "0", "2"), None)
        assert to_train(store) == []
        assert [event.version for event in store.version_events()] == [2, 3]

    def test_an_opted_out_sample_is_not_released(self, store):
        self.fill(store)
        store.record_version(version(1, "a", "b"), None)
        store.consent(word(False, user="bob"))
        store.erase(erasure(), [rejected(1)])
        assert to_train(store) == []

    def test_pins_and_events_are_part_of_it(self, store):
        store.erase(erasure(), [rejected(2), Pin(2, False, 3.0)])
        assert store.version_events() == [rejected(2)]

    def test_a_repetition_changes_nothing(self, store):
        store.append(turn("a"))
        for _ in range(2):
            store.erase(erasure(), [rejected(1)])
            store.append(turn("b", started=21.0))
        assert (store.erasures(), store.version_events(), turns(store)) == ([erasure()], [rejected(1)], ["b"])

    def test_news_are_heard(self, store):
        before = store.withdrawals()
        store.erase(erasure())
        assert store.withdrawals() > before


def test_look_ups_stay_on_their_index(store, path):
    from sqlalchemy import event

    statements = []
    event.listen(store.database.reader, "before_cursor_execute", lambda *args: statements.append(args[2:4]))
    store.unrecorded("ann", ["c"])
    store.consents(7, 10)
    store.held_out(10)
    plans = [[plan[3] for plan in rows_of(path, f"EXPLAIN QUERY PLAN {one}", with_)] for one, with_ in statements]
    assert [plans[0][0].partition(" (")[0], plans[0][2].partition(" (")[0]] == [
        "SEARCH consents USING INDEX consents_conversation_user",
        "SEARCH turns USING INDEX turns_conversation_user_kind_seq",
    ]
    assert plans[1] == ["SEARCH consents USING INDEX consents_conversation_seq (conversation=? AND seq>?)"]
    assert plans[2][0] == "SEARCH samples USING INDEX samples_held_out_seq (held_out=?)"
    assert not any("SCAN" in step or "TEMP" in step for plan in plans for step in plan)


def rows_of(path: Path, query: str, parameters: tuple) -> list[tuple]:
    import sqlite3

    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query, parameters).fetchall()
