"""Bringing an older journal to today's schema: one step from each number to the next, all in one transaction.

Knows what each schema added, as SQL that both databases speak. A step is written once and follows no later change of
`tables`. Ignores locks: the store calls it with the writer's lock held.
"""

from __future__ import annotations

from sqlalchemy import Connection, text

_DIALECT = {
    "sqlite": {"seq": "seq INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL", "whole": "INTEGER", "blob": "BLOB"},
    "postgresql": {"seq": "seq BIGSERIAL PRIMARY KEY", "whole": "BIGINT", "blob": "BYTEA"},
}

_TO_2 = [  # what tells a repeated request; held-out samples; pins, gate, consent and erasure; what waits
    "ALTER TABLE turns ADD COLUMN request TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE turns ADD COLUMN key TEXT",
    "ALTER TABLE samples ADD COLUMN held_out BOOLEAN DEFAULT FALSE NOT NULL",
    "CREATE INDEX samples_held_out_seq ON samples (held_out, seq)",
    'CREATE INDEX turns_user_request_seq ON turns ("user", request, seq)',
    "CREATE UNIQUE INDEX turns_key ON turns (key)",
    "CREATE INDEX ix_consumptions_version ON consumptions (version)",
    "CREATE TABLE pins ({seq}, version BIGINT NOT NULL, pinned BOOLEAN NOT NULL, at DOUBLE PRECISION NOT NULL)",
    """CREATE TABLE gate_decisions (
        {seq}, version BIGINT NOT NULL, stage TEXT NOT NULL, passed BOOLEAN NOT NULL, reason TEXT NOT NULL,
        checks TEXT NOT NULL, seconds DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE consents (
        {seq}, "user" TEXT NOT NULL, session TEXT, train BOOLEAN NOT NULL, at DOUBLE PRECISION NOT NULL,
        conversation TEXT)""",
    'CREATE INDEX consents_user_session ON consents ("user", session)',
    'CREATE INDEX consents_conversation_user ON consents (conversation, "user")',
    "CREATE INDEX consents_conversation_seq ON consents (conversation, seq)",
    "CREATE TABLE withdrawn (turn TEXT PRIMARY KEY NOT NULL)",
    """CREATE TABLE erasures (
        {seq}, "user" TEXT NOT NULL, session TEXT, turns BIGINT NOT NULL, versions TEXT NOT NULL, restored BIGINT,
        at DOUBLE PRECISION NOT NULL)""",
    """CREATE TABLE unjudged (
        seq {whole} PRIMARY KEY NOT NULL, turn TEXT NOT NULL UNIQUE,
        FOREIGN KEY (seq) REFERENCES next_states (seq) ON DELETE CASCADE)""",
    """CREATE TABLE untrained (
        seq {whole} PRIMARY KEY NOT NULL, sample TEXT NOT NULL UNIQUE,
        FOREIGN KEY (seq) REFERENCES samples (seq) ON DELETE CASCADE)""",
    """INSERT INTO unjudged (seq, turn)
        SELECT n.seq, n.turn FROM next_states n JOIN turns t ON t.id = n.turn
        WHERE t.kind = 'main' AND NOT EXISTS (SELECT 1 FROM judgements j WHERE j.turn = n.turn)""",
    """INSERT INTO untrained (seq, sample)
        SELECT s.seq, s.id FROM samples s WHERE NOT EXISTS (SELECT 1 FROM consumptions c WHERE c.sample = s.id)""",
]


def _told_once(table: str, *key: str) -> list[str]:
    """Remove repetitions but the first, and let none in any more."""
    columns = ", ".join(f'"{name}"' for name in key)
    return [
        f"DELETE FROM {table} WHERE seq NOT IN (SELECT min(seq) FROM {table} GROUP BY {columns})",
        f"CREATE UNIQUE INDEX {'_'.join((table, *key))} ON {table} ({columns})",
    ]


_TO_3 = [  # a repeated append is known by the time it tells
    *_told_once("version_events", "version", "state", "at"),
    *_told_once("swaps", "version", "replica", "at"),
    *_told_once("pins", "version", "at"),
    *_told_once("gate_decisions", "version", "stage", "at"),
    *_told_once("erasures", "user", "at"),
]

_TO_4 = [  # why a turn was classed so, what it goes on with, and whose a session is
    "ALTER TABLE turns ADD COLUMN reason TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE turns ADD COLUMN parent TEXT",
    'CREATE INDEX turns_session_user ON turns (session, "user")',
]

_TO_5 = [  # environments: how attempts ended, and groups of them
    'CREATE INDEX turns_group_seq ON turns ("group", seq)',
    """CREATE TABLE episodes (
        {seq}, session TEXT NOT NULL, source TEXT NOT NULL, "group" TEXT NOT NULL, task TEXT NOT NULL,
        group_size BIGINT NOT NULL, status TEXT NOT NULL, outcome DOUBLE PRECISION, rewards TEXT NOT NULL,
        reason TEXT NOT NULL, seconds DOUBLE PRECISION NOT NULL, at DOUBLE PRECISION NOT NULL)""",
    "CREATE UNIQUE INDEX episodes_session ON episodes (session)",
    'CREATE INDEX episodes_group ON episodes ("group")',
    """CREATE TABLE comparisons (
        {seq}, "group" TEXT NOT NULL, source TEXT NOT NULL, task TEXT NOT NULL, outcomes TEXT NOT NULL,
        samples BIGINT NOT NULL, at DOUBLE PRECISION NOT NULL)""",
    'CREATE UNIQUE INDEX comparisons_group ON comparisons ("group")',
    """CREATE TABLE uncompared (
        seq {whole} PRIMARY KEY NOT NULL, "group" TEXT NOT NULL UNIQUE,
        FOREIGN KEY (seq) REFERENCES episodes (seq) ON DELETE CASCADE)""",
]

_TO_6 = ["ALTER TABLE comparisons ADD COLUMN reward DOUBLE PRECISION"]  # what steps were worth, votes included

_TO_7 = [  # the teacher's likeliest tokens, as the divergence from it needs them
    f"ALTER TABLE samples ADD COLUMN teacher_top_{field} {{blob}}" for field in ("ids", "logprobs", "weights")
]

_TO_8 = [  # sessions teach: samples that wait for their end, and what was learnt from them
    "ALTER TABLE judgements ADD COLUMN deferred BOOLEAN DEFAULT FALSE NOT NULL",
    "CREATE TABLE lessons ({seq}, turn TEXT NOT NULL, text TEXT, error TEXT, at DOUBLE PRECISION NOT NULL)",
    "CREATE UNIQUE INDEX lessons_turn ON lessons (turn)",
    """CREATE TABLE undistilled (
        seq {whole} PRIMARY KEY NOT NULL, turn TEXT NOT NULL UNIQUE,
        FOREIGN KEY (seq) REFERENCES judgements (seq) ON DELETE CASCADE)""",
]

_TO_9 = [  # policies of single users: whose a version is, who learns from a sample, and who has learnt from it
    "ALTER TABLE versions ADD COLUMN scope TEXT DEFAULT '' NOT NULL",
    "ALTER TABLE samples ADD COLUMN policy_scope TEXT DEFAULT 'group' NOT NULL",
    """CREATE TABLE consumptions_of_both (
        sample TEXT NOT NULL, personal BOOLEAN NOT NULL, version BIGINT NOT NULL, PRIMARY KEY (sample, personal))""",
    "INSERT INTO consumptions_of_both (sample, personal, version) SELECT sample, FALSE, version FROM consumptions",
    "DROP TABLE consumptions",
    "ALTER TABLE consumptions_of_both RENAME TO consumptions",
    "CREATE INDEX ix_consumptions_version ON consumptions (version)",
]

STEPS: dict[int, list[str]] = dict(enumerate((_TO_2, _TO_3, _TO_4, _TO_5, _TO_6, _TO_7, _TO_8, _TO_9), 1))
"""Statements that lead from a schema to the next."""


def migrate(connection: Connection, schema: int, target: int) -> None:
    """Take every step from `schema` to `target`."""
    for number in range(schema, target):
        for statement in STEPS[number]:
            connection.execute(text(statement.format(**_DIALECT[connection.dialect.name])))
