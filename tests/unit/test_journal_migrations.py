"""An older journal opens with all it holds; a migration that breaks off leaves it as it was."""

import os
import subprocess
import sys
from collections import defaultdict
from contextlib import closing

import pytest
from sqlalchemy import create_engine, inspect, text
from test_journal import assert_same, judgement, next_state, sample, turn, version

from clawrl.errors import JournalError
from clawrl.journal import migrations
from clawrl.journal.store import JournalReader, JournalStore
from clawrl.journal.tables import RECORD_TABLES, SCHEMA
from clawrl.types import Feedback, Swap, VersionEvent

SCHEMA_1 = [
    """CREATE TABLE turns ({seq}, id TEXT NOT NULL, "user" TEXT NOT NULL, session TEXT NOT NULL,
        "index" BIGINT NOT NULL, kind TEXT NOT NULL, source TEXT NOT NULL, "group" TEXT, messages TEXT NOT NULL,
        tools TEXT NOT NULL, template TEXT NOT NULL, reply TEXT NOT NULL, finish_reason TEXT NOT NULL,
        conversation TEXT NOT NULL, capture_prompt_ids {blob} NOT NULL, capture_completion_ids {blob} NOT NULL,
        capture_logprobs {blob} NOT NULL, capture_top_ids {blob} NOT NULL, capture_top_logprobs {blob} NOT NULL,
        capture_versions TEXT NOT NULL, started {real} NOT NULL, ended {real} NOT NULL)""",
    "CREATE UNIQUE INDEX turns_id ON turns (id)",
    'CREATE INDEX turns_conversation_user_kind_seq ON turns (conversation, "user", kind, seq)',
    'CREATE INDEX turns_user_session_kind_seq ON turns ("user", session, kind, seq)',
    'CREATE INDEX turns_user_seq ON turns ("user", seq)',
    """CREATE TABLE next_states ({seq}, turn TEXT NOT NULL, role TEXT NOT NULL, messages TEXT NOT NULL,
        done BOOLEAN NOT NULL, at {real} NOT NULL)""",
    "CREATE UNIQUE INDEX next_states_turn ON next_states (turn)",
    """CREATE TABLE judgements ({seq}, turn TEXT NOT NULL, votes TEXT NOT NULL, score BIGINT, hints TEXT NOT NULL,
        judge_version BIGINT NOT NULL, seconds {real} NOT NULL, error TEXT, at {real} NOT NULL)""",
    "CREATE UNIQUE INDEX judgements_turn ON judgements (turn)",
    """CREATE TABLE samples ({seq}, id TEXT NOT NULL, "user" TEXT NOT NULL, source TEXT NOT NULL,
        token_ids {blob} NOT NULL, loss_mask {blob} NOT NULL, logprobs {blob} NOT NULL, advantages {blob},
        distillation_support {blob}, distillation_behaviour_logprobs {blob}, distillation_advantages {blob},
        distillation_valid {blob}, reference_logprobs {blob}, oldest_version BIGINT NOT NULL,
        newest_version BIGINT NOT NULL, weight {real} NOT NULL, at {real} NOT NULL)""",
    "CREATE UNIQUE INDEX samples_id ON samples (id)",
    """CREATE TABLE versions ({seq}, number BIGINT NOT NULL, parent BIGINT, kind TEXT NOT NULL, checkpoint TEXT,
        samples TEXT NOT NULL, metrics TEXT NOT NULL, at {real} NOT NULL)""",
    "CREATE UNIQUE INDEX versions_number ON versions (number)",
    """CREATE TABLE feedback ({seq}, id TEXT NOT NULL, turn TEXT NOT NULL, "user" TEXT NOT NULL, score BIGINT,
        text TEXT, at {real} NOT NULL)""",
    "CREATE UNIQUE INDEX feedback_id ON feedback (id)",
    "CREATE INDEX feedback_turn ON feedback (turn)",
    """CREATE TABLE version_events ({seq}, version BIGINT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL,
        at {real} NOT NULL)""",
    """CREATE TABLE swaps ({seq}, version BIGINT NOT NULL, replica TEXT NOT NULL, stall_ms {real} NOT NULL,
        canary_error {real}, canary_moved {real}, at {real} NOT NULL)""",
    "CREATE TABLE consumptions (sample TEXT NOT NULL PRIMARY KEY, version BIGINT NOT NULL)",
    "CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL)",
    "INSERT INTO meta VALUES ('schema', '1')",
]
"""What clawrl wrote before it counted to 2."""

RECORDS = [
    *(turn(id) for id in ("unjudged", "judged", "silent")),
    turn("side", kind="side"),
    *(next_state(id) for id in ("unjudged", "judged", "side")),
    judgement("judged", hints=("be brief",)),
    *(sample(id) for id in ("trained", "waits")),
    version(0),
    version(1, "trained", loss=0.5),
    VersionEvent(1, "serving", "first", 1.0),
    Swap(1, "r", 2.0, None, float("nan"), 3.0),
    Feedback("f", "judged", "ann", -1, None, 4.0),
    VersionEvent(1, "serving", "first", 1.0),  # appended twice
]


@pytest.fixture
def old(url) -> str:
    """A journal of schema 1 with one of everything."""
    engine = create_engine(url)
    kinds = {
        "sqlite": ("INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT", "BLOB"),
        "postgresql": ("BIGSERIAL PRIMARY KEY", "BYTEA"),
    }
    seq, blob = kinds[engine.dialect.name]
    with engine.begin() as connection:
        for statement in SCHEMA_1:
            connection.execute(text(statement.format(seq=f"seq {seq}", blob=blob, real="DOUBLE PRECISION")))
        for record in RECORDS:
            table = RECORD_TABLES[type(record)]
            known = {column["name"] for column in inspect(connection).get_columns(table.table.name)}
            row = {name: value for name, value in table.encode(record).items() if name in known}
            connection.execute(table.table.insert().values(row))
        connection.execute(text("INSERT INTO consumptions VALUES ('trained', 1)"))
    engine.dispose()
    return url


def layout(url: str) -> dict[str, set]:
    """Columns, indexes and keys of all tables."""
    engine = create_engine(url)
    seen = inspect(engine)
    found: defaultdict[str, set] = defaultdict(set)
    for (_, name), columns in seen.get_multi_columns().items():
        found[name] |= {(each["name"], str(each["type"]), each["nullable"]) for each in columns}
    for (_, name), indexes in seen.get_multi_indexes().items():
        found[name] |= {(*map(str, each["column_names"]), bool(each["unique"])) for each in indexes}
    for (_, name), keys in seen.get_multi_unique_constraints().items():
        found[name] |= {(*each["column_names"], True) for each in keys}
    for (_, name), keys in seen.get_multi_foreign_keys().items():
        found[name] |= {(*each["constrained_columns"], each.get("options", {}).get("ondelete")) for each in keys}
    for (_, name), key in seen.get_multi_pk_constraint().items():
        found[name].add(("primary", *key["constrained_columns"]))
    engine.dispose()
    assert len(found) >= 10
    return found


def test_all_records_are_there_and_all_works(old):
    with pytest.raises(JournalError, match=f"has schema 1 and this clawrl reads {SCHEMA}; `clawrl serve`"):
        JournalReader(old)
    with closing(JournalStore(old)) as store:
        for record in RECORDS[:4]:
            assert_same(store.turn(record.id), record)
        assert [found.id for _, found, _ in store.pairs_to_judge(0, 10)] == ["unjudged"]
        assert [found.id for _, found, _ in store.samples_to_train(0, 10)] == ["waits"]
        assert_same(tuple(store.versions()), tuple(RECORDS[10:12]))
        assert_same(store.swaps()[0], RECORDS[13])
        assert store.version_events() == [RECORDS[12]]
        counts = store.counts()
        assert (counts["turns"], counts["main_turns"], counts["judgements"], counts["consumed"]) == (4, 3, 1, 1)
        store.append(turn("new", request="digest", key="k"), judgement("unjudged"), sample("held", held_out=True))
        assert_same(store.turn("new"), turn("new", request="digest", key="k"))
        assert store.pairs_to_judge(0, 10) == []
    with closing(JournalStore(old)) as again:
        assert again.counts()["turns"] == 5


def test_it_ends_where_a_new_journal_begins(old, new_database):
    new = new_database()
    for url in (old, new):
        JournalStore(url).close()
    assert layout(old) == layout(new)


def test_a_step_that_fails_leaves_the_old_schema(old, monkeypatch):
    before = layout(old)
    monkeypatch.setitem(migrations.STEPS, 1, [*migrations.STEPS[1], "INSERT INTO nowhere VALUES (1)"])
    with pytest.raises(JournalError, match="cannot be opened"):
        JournalStore(old)
    assert layout(old) == before
    monkeypatch.undo()
    JournalStore(old).close()


def test_a_process_that_dies_in_the_middle_leaves_the_old_schema(old):
    before = layout(old)
    program = (
        "import os, sys; from sqlalchemy import event; from clawrl.journal import store\n"
        "migrate = store.migrate\n"
        "store.migrate = lambda *arguments: (migrate(*arguments), os._exit(9))\n"
        "store.JournalStore(sys.argv[1])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program, old], env=environment, timeout=60).returncode == 9
    assert layout(old) == before
    with closing(JournalStore(old)) as store:
        assert store.counts()["turns"] == 4
