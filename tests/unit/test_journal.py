"""The journal's store on both databases: exact round trips, idempotence, look-ups, one consumption per sample, and
clear refusals. What concerns one database's files alone is in test_journal_files.py."""

import dataclasses
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from sqlalchemy import create_engine, event, inspect

from clawrl.errors import JournalError
from clawrl.journal import database, queues
from clawrl.journal.store import JournalReader, JournalStore
from clawrl.journal.tables import SCHEMA
from clawrl.serving.sessions import NAME_BYTES
from clawrl.types import (
    Capture,
    Consent,
    Distillation,
    Feedback,
    GateCheck,
    GateDecision,
    Judgement,
    NextState,
    Pin,
    Sample,
    Scores,
    Swap,
    TeacherTop,
    Turn,
    VersionEvent,
    VersionSpan,
    WeightVersion,
)


@pytest.fixture
def store(url):
    with closing(JournalStore(url)) as opened:
        yield opened


def turn(id: str, **changed) -> Turn:
    capture = Capture(
        prompt_ids=np.array([5, 2, 2**31 - 1], np.int32),
        completion_ids=np.array([7, 9], np.int32),
        logprobs=np.array([-0.1, -np.inf], np.float32),
        top_ids=np.array([[7, 8], [9, 1]], np.int32),
        top_logprobs=np.array([[-0.1, -3.25], [-1e-45, np.nan]], np.float32),
        versions=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2)),
    )
    original = Turn(
        id=id,
        user="ann",
        session="s",
        index=0,
        kind="main",
        source="chat",
        group=None,
        messages=({"role": "user", "content": "Grüße \ud83d \x00 \U0001f600"},),
        tools=({"type": "function", "function": {"name": "add", "parameters": {}}},),
        template={"enable_thinking": False},
        reply={"role": "assistant", "content": None, "tool_calls": []},
        finish_reason="stop",
        conversation=f"digest of {id}",
        capture=capture,
        started=0.1,
        ended=1e9 + 1 / 3,
    )
    return dataclasses.replace(original, **changed)


def next_state(turn: str, **changed) -> NextState:
    messages = ({"role": "tool", "content": "1"}, {"role": "tool", "content": "2"})
    return dataclasses.replace(NextState(turn, "tool", messages, False, 2.5), **changed)


def judgement(turn: str, score: Any = 1, hints: tuple[str, ...] = ()) -> Judgement:
    return Judgement(turn, (1, None, -1), score, hints, 0, 0.25, None if score is not None else "timeout", 3.0)


def sample(id: str, **changed) -> Sample:
    mask = np.array([False, True, True])
    original = Sample(
        id=id,
        user="ann",
        source="chat",
        token_ids=np.array([1, 2, 3], np.int32),
        loss_mask=mask,
        logprobs=np.array([0, -1, -2], np.float32),
        advantages=None,
        distillation=None,
        reference_logprobs=None,
        oldest_version=3,
        newest_version=4,
        weight=0.5,
        at=4.0,
    )
    return dataclasses.replace(original, **changed)


def version(number: int, *samples: str, **metrics: Any) -> WeightVersion:
    return WeightVersion(number, number - 1 if number else None, "full", None, samples, metrics, 5.0)


def assert_same(left, right) -> None:
    """Equal through and through: types, dtypes, shapes, bits; NaN equals NaN."""
    assert type(left) is type(right)
    if dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_same(getattr(left, field.name), getattr(right, field.name))
    elif isinstance(left, np.ndarray):
        assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())
    elif isinstance(left, tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right or (left != left and right != right)


def rows(store: JournalStore, query: str) -> list[tuple]:
    """What another program sees."""
    with store.database.reader.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


class TestRoundTrips:
    def test_turn(self, store):
        original = turn("t")
        store.append(original)
        assert_same(store.turn("t"), original)
        assert store.turn("another") is None

    def test_arrays_without_elements_and_of_any_layout(self, store):
        empty = np.zeros((0, 4), np.int32)
        silent = Capture(np.arange(8, dtype=np.int32)[::2], empty[:, 0], empty[:, 0] * 1.0, empty, empty * 1.0, ())
        store.append(turn("t", capture=silent))
        assert_same(store.turn("t").capture.top_ids, empty)
        assert_same(store.turn("t").capture.prompt_ids, np.array([0, 2, 4, 6], np.int32))

    def test_next_state(self, store):
        original = next_state("t")
        store.append(turn("t"), original)
        [(seq, answered, found)] = store.pairs_to_judge(0, 10)
        assert seq == 1
        assert_same(answered, turn("t"))
        assert_same(found, original)

    def test_sample_with_and_without_targets(self, store):
        target = Distillation(
            support=np.array([[1, 2]] * 3, np.int32),
            behaviour_logprobs=np.full((3, 2), -0.5, np.float32),
            advantages=np.array([[0, 0], [1, -1], [np.nan, 0]], np.float32),
            valid=np.array([[False, False], [True, True], [False, True]]),
        )
        full = sample(
            "full", advantages=np.ones(3, np.float32), distillation=target, reference_logprobs=np.ones(3, np.float32)
        )
        top = TeacherTop(np.zeros((3, 2), np.int32), np.array([[-1, -np.inf]] * 3, np.float32), np.ones(3, np.float32))
        taught = sample("taught", teacher_top=top)
        store.append(sample("bare"), full, taught)
        for (_, found, _), original in zip(store.samples_to_train(0, 10), (sample("bare"), full, taught), strict=True):
            assert_same(found, original)

    def test_versions_events_and_swaps(self, store):
        first = WeightVersion(0, None, "full", None, (), {}, 1.0)
        second = WeightVersion(1, 0, "lora", "/v/1", ("a", "b"), {"loss": float("nan"), "kl": 0.1}, 2.0)
        event = VersionEvent(1, "rejected", "canary off", 3.0)
        unmeasured, broken = Swap(1, "r", 22.0, None, None, 4.0), Swap(1, "r", 22.0, float("nan"), float("inf"), 5.0)
        store.append(first, second, event, unmeasured, broken)
        for found, original in (
            (store.versions(), (first, second)),
            (store.version_events(), (event,)),
            (store.swaps(), (unmeasured, broken)),
        ):
            assert_same(tuple(found[:1]), original[:1])
            assert len(found) == len(original)
        assert repr(store.versions()[1].metrics) == repr(second.metrics)
        assert_same(store.swaps()[1], broken)  # NaN is not None

    def test_numpy_scalars_become_plain(self, store):
        store.append(judgement("t", score=np.int64(-1)), version(0, loss=np.float32(0.5)))
        assert rows(store, "SELECT score, score + 1 FROM judgements") == [(-1, 0)]
        assert store.versions()[0].metrics == {"loss": 0.5}

    def test_another_program_reads_it(self, store):
        store.append(turn("t"), next_state("t"), Feedback("f", "t", "ann", None, "shorter", 1.0), judgement("t"))
        assert rows(store, 'SELECT id, "user", "index", finish_reason FROM turns') == [("t", "ann", 0, "stop")]
        assert rows(store, "SELECT score, text FROM feedback") == [(None, "shorter")]
        assert rows(store, "SELECT votes, error FROM judgements") == [("[1,null,-1]", None)]

    def test_whole_numbers_of_64_bits(self, store):
        store.append(turn("t", index=2**63 - 1))
        assert store.turn("t").index == 2**63 - 1
        with pytest.raises(JournalError, match="refused a record"):
            store.append(turn("u", index=2**63))


class TestAppends:
    def test_a_repeated_append_changes_nothing(self, store):
        store.append(turn("t"), next_state("t"), judgement("t"), sample("t"), version(0))
        before = store.counts()
        store.append(turn("t", user="eve"), next_state("t", done=True), judgement("t", -1), sample("t"), version(0))
        assert store.counts() == before
        assert store.turn("t").user == "ann"

    def test_the_first_next_state_wins(self, store):
        store.append(turn("t"), next_state("t", role="user"))
        store.append(next_state("t", role="tool"))
        assert [found.role for _, _, found in store.pairs_to_judge(0, 10)] == ["user"]

    def test_feedback_may_come_often(self, store):
        store.append(Feedback("f1", "t", "ann", 1, None, 1.0), Feedback("f2", "t", "ann", -1, None, 2.0))
        store.append(Feedback("f2", "t", "ann", -1, None, 2.0))
        assert rows(store, "SELECT id FROM feedback") == [("f1",), ("f2",)]

    def test_records_of_one_append_stand_or_fall_together(self, store):
        with pytest.raises(JournalError, match="surrogates not allowed"):
            store.append(turn("good"), turn("bad \ud800"))
        assert store.counts()["turns"] == 0

    def test_only_the_guilty_of_a_group_are_refused(self, store):
        ids = ["a", "b", "bad \ud800", "c"]
        outcomes = store.commit([store.appending(turn(id)) for id in ids])
        assert [outcome is None for outcome in outcomes] == [True, True, False, True]
        assert isinstance(outcomes[2], JournalError)
        assert [store.turn(id) is not None for id in ("a", "b", "c")] == [True] * 3

    def test_a_group_is_one_transaction(self, store):
        commits = []
        event.listen(store.database.writer, "commit", commits.append)
        store.commit([store.appending(judgement(str(number))) for number in range(32)])
        assert len(commits) == 1

    @pytest.mark.parametrize("record", [turn("a\x00b"), turn("t", user="a\x00"), Feedback("f", "t", "u", 1, "\x00", 1)])
    def test_nul_is_refused_outside_of_messages(self, store, record):
        with pytest.raises(JournalError, match="no NUL character in a name or a text; leave it out"):
            store.append(record)

    def test_what_is_no_record_is_refused(self, store):
        empty = np.zeros((0, 1), np.float32)
        with pytest.raises(JournalError, match="Scores"):
            store.append(Scores(empty[:, 0], empty.astype(np.int32), empty, 0))
        with pytest.raises(JournalError, match="Judgement"):
            store.append(judgement("t", score="good"))

    def test_errors_repeat_no_words_of_users(self, store):
        with pytest.raises(JournalError) as caught:
            store.append(Feedback("f", "t", "ann", None, "my secret \ud800", 1.0))
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("kind", ["version_events", "swaps", "pins", "gate_decisions"])
    def test_what_has_no_id_is_told_once_all_the_same(self, store, kind):
        records = {
            "version_events": [VersionEvent(1, "serving", "canary", at) for at in (1.0, 2.0)],
            "swaps": [Swap(1, "r", 22.0, None, None, at) for at in (1.0, 2.0)],
            "pins": [Pin(1, True, at) for at in (1.0, 2.0)],
            "gate_decisions": [GateDecision(1, "after", True, "fine", (), 0.1, at) for at in (1.0, 2.0)],
        }[kind]
        for record in (*records, *records):  # as a call whose answer was lost is made again
            store.append(record)
        assert getattr(store, kind)() == records

    def test_the_longest_names_that_the_gateway_lets_in(self, store):
        rng = np.random.default_rng(0)  # what cannot be compressed
        user, session, key = (rng.bytes(NAME_BYTES // 2).hex() for _ in range(3))
        store.append(turn("long", user=user, session=session, key=key))
        assert store.keyed_turn(key).id == store.last_turn(user, session)[0] == "long"


class TestLookUps:
    def test_open_turn_is_the_users_newest_main_turn_of_a_conversation(self, store):
        store.append(turn("old", conversation="c"), turn("new", conversation="c", session="s2", index=4))
        store.append(turn("side", conversation="c", kind="side"), turn("hers", conversation="c", user="eve"))
        assert store.open_turn("ann", "c") == ("new", "s2", 4)
        assert store.open_turn("ann", "unheard") is None

    def test_last_turn_of_a_session(self, store):
        store.append(turn("t0"), turn("t1", index=1, conversation="c1"), turn("other", session="s2", index=9))
        store.append(turn("side", kind="side", index=7), turn("hers", user="eve", index=8))
        assert store.last_turn("ann", "s") == ("t1", "s", 1, "c1")
        assert store.last_turn("bob", "s") is None

    def test_pairs_to_judge(self, store):
        ids = ["a", "b", "side", "judged", "c"]
        for id in ids:
            store.append(turn(id, kind="side" if id == "side" else "main"), next_state(id))
        store.append(turn("silent"), judgement("judged"), next_state("of no turn"))
        pairs = store.pairs_to_judge(0, 10)
        assert [found.id for _, found, _ in pairs] == ["a", "b", "c"]
        assert [found.turn for _, _, found in pairs] == ["a", "b", "c"]
        assert [found.id for _, found, _ in store.pairs_to_judge(pairs[0][0], 1)] == ["b"]
        assert store.pairs_to_judge(pairs[-1][0], 10) == []

    def test_recent_scores(self, store):
        for number, score in enumerate([1, -1, None, 0, 1]):
            store.append(turn(str(number)), judgement(str(number), score))
        store.append(turn("hers", user="eve"), judgement("hers", -1))
        assert store.recent_scores("ann", 10) == [1, -1, 0, 1]
        assert store.recent_scores("ann", 2) == [0, 1]
        assert store.recent_scores("bob", 2) == []

    def test_held_out_samples_measure_and_are_not_trained_on(self, store):
        for name, held, score in (("a", True, 1), ("b", False, 1), ("c", True, None), ("d", True, -1)):
            store.append(turn(name), dataclasses.replace(sample(name), held_out=held), judgement(name, score))
        assert [found.id for _, found, _ in store.samples_to_train(0, 10)] == ["b"]
        assert [(found.id, score) for found, score in store.held_out(10)] == [("d", -1), ("c", None), ("a", 1)]
        assert [found.id for found, _ in store.held_out(2)] == ["d", "c"]
        assert store.counts()["held_out"] == 3

    def test_judged_turns_of_people(self, store):
        store.append(turn("a"), turn("b", source="terminal"), turn("c"), turn("d"))
        for name in ("c", "b", "a"):
            store.append(judgement(name, 1))
        found = store.judged_turns(0, 10)
        assert [(each.id, judged.turn) for _, each, judged in found] == [("c", "c"), ("a", "a")]
        assert [each.id for _, each, _ in store.judged_turns(found[0][0], 10)] == ["a"]
        assert [each.id for _, each, _ in store.judged_turns(None, 1)] == ["a"]
        assert [each.id for _, each, _ in store.judged_turns(None, 10)] == ["c", "a"]

    def test_counts(self, store):
        store.append(turn("a"), turn("b", kind="side"), next_state("a"), sample("a"), sample("b"))
        store.append(judgement("a", None), judgement("b", 1, ("be brief", "be kind")), judgement("c", 0))
        store.record_version(version(0), None)
        store.record_version(version(1, "a"), VersionEvent(1, "candidate", "trained", 1.0))
        store.append(Swap(1, "r", 1.0, None, None, 2.0))
        assert store.counts() == {
            "turns": 2,
            "main_turns": 1,
            "next_states": 1,
            "for_both": 0,
            "feedback": 0,
            "judgements": 3,
            "abstentions": 1,
            "hints": 1,
            "samples": 2,
            "held_out": 0,
            "consumed": 1,
            "versions": 2,
            "swaps": 1,
        }

    def test_what_waits_in_whatever_order_it_came(self, store):
        store.append(next_state("late"), judgement("hasty"), sample("taken"))
        store.record_version(version(1, "taken", "hasty"), None)
        store.append(turn("late"), turn("hasty"), next_state("hasty"), sample("hasty"), sample("h", held_out=True))
        assert [found.id for _, found, _ in store.pairs_to_judge(0, 10)] == ["late"]
        assert store.samples_to_train(0, 10) == []
        store.append(judgement("late"), next_state("late"), turn("late"), sample("late"), sample("taken"))
        assert store.pairs_to_judge(0, 10) == []
        assert [found.id for _, found, _ in store.samples_to_train(0, 10)] == ["late"]
        with store.database.snapshot() as connection:
            assert queues.stale(connection) == {}

    def test_counts_read_only_what_is_new(self, store):
        store.append(*(turn(str(number)) for number in range(20)))
        store.counts()
        with store.database.writer.begin() as connection:  # behind its back
            connection.exec_driver_sql("DELETE FROM turns WHERE id < '5'")
        store.append(turn("new"))
        assert store.counts()["turns"] == 21
        store.recount()
        assert store.counts()["turns"] == rows(store, "SELECT count(*) FROM turns")[0][0] < 21


class TestVersions:
    def test_a_consumed_sample_is_not_trained_again(self, store):
        store.append(sample("a"), sample("b"), sample("c"))
        event = VersionEvent(1, "candidate", "trained", 1.0)
        store.record_version(version(1, "a", "b"), event)
        assert [found.id for _, found, _ in store.samples_to_train(0, 10)] == ["c"]
        with pytest.raises(JournalError, match="version 2 would learn again from sample b, which version 1 consumed"):
            store.record_version(version(2, "c", "b"), dataclasses.replace(event, version=2))
        assert [found.id for _, found, _ in store.samples_to_train(0, 10)] == ["c"]
        assert ([found.number for found in store.versions()], store.version_events()) == ([1], [event])

    def test_a_repetition_is_ignored(self, store):
        event = VersionEvent(1, "candidate", "trained", 1.0)
        for _ in range(2):
            store.record_version(version(1, "a"), event)
        assert (len(store.versions()), store.version_events()) == (1, [event])
        with pytest.raises(JournalError, match="version 1 was recorded before with other samples"):
            store.record_version(version(1, "b"), event)

    def test_order_and_limit_of_samples(self, store):
        store.append(*(sample(id) for id in "dbca"))
        first = store.samples_to_train(0, 3)
        assert [found.id for _, found, _ in first] == ["d", "b", "c"]
        assert [found.id for _, found, _ in store.samples_to_train(first[-1][0], 3)] == ["a"]


class TestRetention:
    DAY = 86400.0

    def test_old_turns_go_with_all_that_was_said_about_them(self, store):
        for number in range(10):
            id = str(number)
            store.append(turn(id, ended=number * self.DAY), next_state(id), judgement(id), sample(id))
            store.append(Feedback(id, id, "ann", 1, None, 1.0))
        store.record_version(version(1, *"01234"), None)
        assert store.expire(4 * self.DAY, 0, 3) == 3
        assert store.expire(4 * self.DAY, 3, 3) == 6
        assert store.expire(4 * self.DAY, 6, 3) is None
        for table, key in (("turns", "id"), ("next_states", "turn"), ("judgements", "turn"), ("feedback", "turn")):
            assert rows(store, f"SELECT {key} FROM {table} ORDER BY seq") == [(id,) for id in "456789"]
        assert rows(store, "SELECT count(*) FROM consumptions") == [(5,)]
        store.recount()
        assert (store.counts()["turns"], store.counts()["consumed"]) == (6, 5)
        store.shrink()

    def test_what_waits_stays_until_training_has_passed_it_over(self, store):
        for id in ("unjudged", "passed over", "trained", "waits", "silent"):
            store.append(turn(id, ended=0.0), *([] if id == "silent" else [next_state(id)]))
            if id not in ("unjudged", "silent"):
                store.append(judgement(id), sample(id))
        store.record_version(version(1, "trained"), None)
        assert store.expire(1.0, 0, 10) == 5
        assert rows(store, "SELECT id FROM turns ORDER BY seq") == [("unjudged",), ("waits",)]
        assert [found.id for _, found, _ in store.samples_to_train(0, 10)] == ["waits"]
        assert [found.id for _, found, _ in store.pairs_to_judge(0, 10)] == ["unjudged"]


class TestRepeatedRequests:
    def test_a_retry_finds_the_open_turn(self, store):
        store.append(turn("old", request="r", started=10.0), turn("new", request="r", started=20.0))
        found = store.repeated_turn("ann", "r", since=15.0)
        assert found is not None
        assert found.id == "new"
        assert store.repeated_turn("ann", "r", since=25.0) is None
        assert store.repeated_turn("bob", "r", since=0.0) is None
        assert store.repeated_turn("ann", "other", since=0.0) is None

    def test_a_turn_that_was_continued_is_not_repeated(self, store):
        store.append(turn("t", request="r", started=20.0), NextState("t", "user", (), False, 1.0))
        assert store.repeated_turn("ann", "r", since=0.0) is None

    @pytest.mark.parametrize("other", [{"kind": "side"}, {"source": "terminal"}, {"group": "g"}, {"session": "other"}])
    def test_a_retry_is_of_the_same_kind(self, store, other):
        store.append(turn("t", request="r", started=20.0))
        assert store.repeated_turn("ann", "r", since=0.0, **{"session": "s", **other}) is None
        assert store.repeated_turn("ann", "r", since=0.0, session="s") is not None
        store.append(turn("u", request="r", started=20.0, **other))
        found = store.repeated_turn("ann", "r", since=0.0, **other)
        assert found is not None
        assert found.id == "u"

    def test_a_withdrawn_turn_is_not_repeated(self, store):
        store.append(turn("t", request="r", key="k", started=20.0))
        store.consent(Consent("ann", None, False, 1.0))
        assert store.repeated_turn("ann", "r", since=0.0) is None
        assert store.keyed_turn("k") is None

    def test_a_key_is_stored_once(self, store):
        store.append(turn("one", key="ann:k"))
        store.append(turn("two", key="ann:k"))
        found = store.keyed_turn("ann:k")
        assert found is not None
        assert found.id == "one"
        assert store.keyed_turn("ann:other") is None

    def test_a_turn_whose_key_another_has_is_kept_without_it(self, store):
        store.append(turn("one", key="k"))
        store.append(turn("two", key="k"), turn("three", key="l"), turn("four", key="l"), turn("five"))
        store.append(turn("two", key="k"), turn("one", key="k"))
        keys = rows(store, "SELECT id, key FROM turns ORDER BY seq")
        assert keys == [("one", "k"), ("two", None), ("three", "l"), ("four", None), ("five", None)]

    def test_two_in_one_commit(self, store):
        assert store.commit([store.appending(turn(id, key="k")) for id in "ab"]) == [None, None]
        assert rows(store, "SELECT id, key FROM turns ORDER BY seq") == [("a", "k"), ("b", None)]


class TestOpening:
    def test_reopened_journal_has_everything(self, store, url):
        store.append(turn("t"))
        store.close()
        with closing(JournalStore(url)) as again:
            assert_same(again.turn("t"), turn("t"))
            again.append(turn("u"))

    def test_one_writer_at_a_time(self, store, url, monkeypatch):
        monkeypatch.setattr(database, "_LOCK_WAIT_S", 0.1)
        store.append(turn("t"))
        with pytest.raises(JournalError, match="another process writes to this journal; end it, or name another"):
            JournalStore(url)
        with closing(JournalReader(url)) as reader:
            assert reader.turn("t") is not None
        store.close()
        with closing(JournalStore(url)) as again:
            assert again.turn("t") is not None

    def test_readers_see_the_last_commit_while_a_transaction_is_open(self, store):
        store.append(turn("t"))
        with store.database.writer.connect() as other, other.begin() as transaction:
            other.exec_driver_sql("UPDATE turns SET id = 'stolen'")
            assert store.turn("t") is not None
            transaction.rollback()

    def test_newer_schema(self, store, url):
        with store.database.writer.begin() as connection:
            connection.exec_driver_sql("UPDATE meta SET value = '99' WHERE name = 'schema'")
        store.close()
        for opener in (JournalStore, JournalReader):
            with pytest.raises(JournalError, match=rf"has schema 99 and this clawrl knows {SCHEMA}; use the"):
                opener(url)

    def test_another_programs_database_stays_as_it_is(self, url):
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE recipes (name TEXT)")
        with pytest.raises(JournalError, match="another program's tables; name another file or database"):
            JournalStore(url)
        assert inspect(engine).get_table_names() == ["recipes"]
        engine.dispose()

    def test_readers_make_nothing(self, url, tmp_path):
        with pytest.raises(JournalError, match="no journal"):
            JournalReader(url)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "bad",
        ["sqlite", "sqlite://", "sqlite:///:memory:", "mysql://u:secret@h/d", "postgresql+pg8000://u@h/d", "", "///"],
    )
    def test_useless_urls(self, bad):
        with pytest.raises(
            JournalError, match=r"journal\.url.*use sqlite:////folder/.* or postgresql\+psycopg:"
        ) as caught:
            JournalStore(bad)
        assert "secret" not in str(caught.value)


def test_pins_and_decisions_come_back_in_order(store):
    check = GateCheck("reward", 0.5, None, 0.7, "at least 0.2", True)
    decision = GateDecision(2, "before", True, "fine", (check,), 1.5, 9.0)
    store.append(Pin(2, True, 1.0), decision, Pin(2, False, 2.0))
    assert store.pins() == [Pin(2, True, 1.0), Pin(2, False, 2.0)]
    assert store.gate_decisions() == [decision]


def test_authors_of_many_turns(store):
    store.append(*(turn(f"t{i}", user="bob" if i % 2 else "ann", session=f"s{i}") for i in range(1200)))
    found = store.authors([f"t{i}" for i in range(1200)] + ["erased"])
    assert len(found) == 1200
    assert {("t1", "bob", "s1"), ("t1100", "ann", "s1100")} <= set(found)
    assert store.authors([]) == []

    def test_a_sample_for_two_policies_waits_for_both(self, store):
        store.append(sample("both", policy_scope="hierarchy"), sample("own", policy_scope="user"), sample("all"))
        assert waiting_for(store) == [("both", ("", "ann")), ("own", ("ann",)), ("all", ("",))]
        store.record_version(dataclasses.replace(version(1, "both", "own"), scope="ann"), None)
        assert waiting_for(store) == [("both", ("",)), ("all", ("",))]
        with pytest.raises(JournalError, match="learn again from sample both, which version 1 consumed"):
            store.record_version(dataclasses.replace(version(2, "both"), scope="ann"), None)
        store.record_version(version(2, "both"), None)
        assert waiting_for(store) == [("all", ("",))]
        assert store.counts()["for_both"] == 1

    def test_a_users_version_never_learns_from_another(self, store):
        store.append(sample("hers", policy_scope="user"), sample("his", user="ben", policy_scope="user"))
        with pytest.raises(JournalError, match="would learn from another's samples"):
            store.record_version(dataclasses.replace(version(1, "hers", "his"), scope="ann"), None)
        assert store.versions() == []

    def test_what_is_held_out_of_one_user(self, store):
        for id, user in (("a", "ann"), ("b", "ben")):
            store.append(sample(id, user=user, held_out=True), judgement(id))
        assert [held.id for held, _ in store.held_out(10, "ben")] == ["b"]
        assert [held.id for held, _ in store.held_out(10)] == ["b", "a"]


def waiting_for(store: JournalStore) -> list[tuple[str, tuple[str, ...]]]:
    return [(found.id, scopes) for _, found, scopes in store.samples_to_train(0, 10)]
