"""The journal's transactions and look-ups over one SQL database, synchronous; `actor` adds concurrency.

Knows how a commit becomes durable, which appends repeat an earlier one, and the queries of the program. Ignores Ray,
asyncio and who asks. One connection writes; readers have their own and are never blocked by it.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection, Select, TextClause, delete, func, insert, inspect, select, update

from clawrl.errors import JournalError, WithdrawnError
from clawrl.journal import erasure, queues
from clawrl.journal.database import insert_new, open_database, parse_url, refusing
from clawrl.journal.erasure import Content
from clawrl.journal.migrations import migrate
from clawrl.journal.tables import (
    CONSENTS,
    CONSUMPTIONS,
    EPISODES,
    FEEDBACK,
    JUDGEMENTS,
    LESSONS,
    META,
    METADATA,
    NEXT_STATES,
    RECORD_TABLES,
    SAMPLES,
    SCHEMA,
    SWAPS,
    TURNS,
    UNCOMPARED,
    UNDISTILLED,
    UNJUDGED,
    UNTRAINED,
    VERSIONS,
    WITHDRAWN,
    RecordTable,
)
from clawrl.types import (
    GROUP,
    Comparison,
    Consent,
    Episode,
    Erasure,
    Feedback,
    GateDecision,
    Judgement,
    Lesson,
    NextState,
    Pin,
    Sample,
    Swap,
    Turn,
    TurnKind,
    VersionEvent,
    WeightVersion,
)

Write = Callable[[Connection], None]
"""One caller's rows, written all or none, in a transaction that others may share."""

_IN_ONE_QUERY = 500  # ids; databases bound the number of parameters

_OF_A_TURN = (NEXT_STATES.c.turn, JUDGEMENTS.c.turn, LESSONS.c.turn, FEEDBACK.c.turn, SAMPLES.c.id)
"""What is said of a turn, by the column that names it."""

_COUNTED: dict[Any, list[tuple]] = {
    TURNS.c.seq: [("turns",), ("main_turns", TURNS.c.kind == "main")],
    NEXT_STATES.c.seq: [("next_states",)],
    JUDGEMENTS.c.seq: [
        ("judgements",),
        ("abstentions", JUDGEMENTS.c.score.is_(None)),
        ("hints", JUDGEMENTS.c.hints != "[]"),
    ],
    SAMPLES.c.seq: [
        ("samples",),
        ("held_out", SAMPLES.c.held_out.is_(True)),
        ("for_both", SAMPLES.c.held_out.is_(False), SAMPLES.c.policy_scope == "hierarchy"),
    ],
    CONSUMPTIONS.c.version: [("consumed",)],
    VERSIONS.c.seq: [("versions",)],
    SWAPS.c.seq: [("swaps",)],
    FEEDBACK.c.seq: [("feedback",)],
}
"""What `counts` counts, by the column that only grows from commit to commit."""


class JournalReader:
    """Reads a journal, beside the process that writes it too. Safe for any number of threads.

    `url` is SQLAlchemy's, such as `sqlite:////path/journal.sqlite`. Raises JournalError, with the remedy, if it cannot
    be opened or holds no journal of this clawrl's schema. Every method may raise JournalError.
    """

    _creates = False

    def __init__(self, url: str) -> None:
        parsed = parse_url(url)
        self.name = parsed.render_as_string(hide_password=True)
        self._counting, self._counts, self._marks = threading.Lock(), Counter(), {}
        with refusing(f"journal {self.name} cannot be opened"):
            self.database = open_database(parsed, create=self._creates)
            try:
                self._open(self._schema())
            except BaseException:
                self.close()
                raise

    def _schema(self) -> int:
        """The schema's number, 0 for an empty database. JournalError if it is newer than ours, or no journal."""
        with self.database.snapshot() as connection:
            tables, number = inspect(connection).get_table_names(), None
            if META.name in tables:
                number = connection.scalar(select(META.c.value).where(META.c.name == "schema"))
        if tables and number is None:
            raise JournalError(f"{self.name} holds another program's tables; name another file or database")
        if int(number or 0) > SCHEMA:
            raise JournalError(
                f"journal {self.name} has schema {number} and this clawrl knows {SCHEMA}; "
                "use the clawrl that wrote it, or name another file or database in journal.url"
            )
        return int(number or 0)

    def _open(self, schema: int) -> None:
        if schema == 0:
            raise JournalError(f"{self.name} holds no journal; check the URL")
        if schema < SCHEMA:
            raise JournalError(
                f"journal {self.name} has schema {schema} and this clawrl reads {SCHEMA}; "
                "`clawrl serve` brings it up to date"
            )

    def close(self) -> None:
        self.database.close()

    def turn(self, id: str) -> Turn | None:
        rows = self._rows(select(TURNS.table).where(TURNS.c.id == id))
        return TURNS.decode(rows[0]) if rows else None

    def open_turn(self, user: str, conversation: str) -> tuple[str, str, int] | None:
        """(id, session, index) of the user's newest main turn whose conversation has this digest."""
        query = select(TURNS.c.id, TURNS.c.session, TURNS.c.index)
        return self._newest_main_turn(query.where(TURNS.c.user == user, TURNS.c.conversation == conversation))

    def continued(
        self, user: str, conversations: Sequence[str], session: str | None = None
    ) -> tuple[str, str, int, int] | None:
        """(id, session, index, position) of the newest main turn of the first of the conversations that is known.

        The user's; in the session, if one is named.
        """
        query = select(TURNS.c.id, TURNS.c.session, TURNS.c.index).where(TURNS.c.user == user)
        if session is not None:
            # not by the session's index: it may have many turns, of which few say the same
            query = query.where(TURNS.c.session.concat("") == session)
        for at, conversation in enumerate(conversations):
            found = self._newest_main_turn(query.where(TURNS.c.conversation == conversation))
            if found is not None:
                return *found, at
        return None

    def last_turn(self, user: str, session: str) -> tuple[str, str, int, str] | None:
        """(id, session, index, conversation) of the newest main turn of a session."""
        query = select(TURNS.c.id, TURNS.c.session, TURNS.c.index, TURNS.c.conversation)
        return self._newest_main_turn(query.where(TURNS.c.user == user, TURNS.c.session == session))

    def keyed_turn(self, key: str) -> Turn | None:
        """The turn with this idempotency key, unless it was withdrawn."""
        query = select(TURNS.table).outerjoin(WITHDRAWN, WITHDRAWN.c.turn == TURNS.c.id)
        rows = self._rows(query.where(TURNS.c.key == key, WITHDRAWN.c.turn.is_(None)))
        return TURNS.decode(rows[0]) if rows else None

    def repeated_turn(
        self,
        user: str,
        request: str,
        since: float,
        kind: TurnKind = "main",
        source: str = "chat",
        group: str | None = None,
        session: str | None = None,
    ) -> Turn | None:
        """The user's newest turn started since then whose request had this digest, if nothing has followed it yet.

        One of the same kind, source and group, and of the session if one is named; none that was withdrawn.
        """
        query = (
            select(TURNS.table)
            .outerjoin(NEXT_STATES.table, NEXT_STATES.c.turn == TURNS.c.id)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == TURNS.c.id)
            .where(TURNS.c.user == user, TURNS.c.request == request, TURNS.c.started >= since)
            .where(TURNS.c.kind == kind, TURNS.c.source == source, TURNS.c.group.is_not_distinct_from(group))
            .where(NEXT_STATES.c.seq.is_(None), WITHDRAWN.c.turn.is_(None))
            .order_by(TURNS.c.seq.desc())
            .limit(1)
        )
        rows = self._rows(query if session is None else query.where(TURNS.c.session == session))
        return TURNS.decode(rows[0]) if rows else None

    def _newest_main_turn(self, query: Select) -> Any:
        rows = self._rows(query.where(TURNS.c.kind == "main").order_by(TURNS.c.seq.desc()).limit(1))
        return tuple(rows[0].values()) if rows else None

    def pairs_to_judge(self, after: int, limit: int) -> list[tuple[int, Turn, NextState]]:
        """Main turns with a next state and no judgement, in the order of the next states' seq, beyond `after`."""
        query = (
            select(NEXT_STATES.table, TURNS.table)
            .select_from(UNJUDGED)
            .join(NEXT_STATES.table, NEXT_STATES.c.seq == UNJUDGED.c.seq)
            .join(TURNS.table, TURNS.c.id == NEXT_STATES.c.turn)
            .where(UNJUDGED.c.seq > after)
            .order_by(UNJUDGED.c.seq)
            .limit(limit)
        )
        return [(row[NEXT_STATES.c.seq], TURNS.decode(row), NEXT_STATES.decode(row)) for row in self._rows(query)]

    def samples_to_train(self, after: int, limit: int) -> list[tuple[int, Sample, tuple[str, ...]]]:
        """Samples that are not held out and not consumed yet by all that are to learn from them, and by whom not.

        In the order of seq, beyond `after`. That is GROUP, the sample's user, or both.
        """
        query = (
            select(SAMPLES.table, CONSUMPTIONS.c.personal)
            .select_from(UNTRAINED)
            .join(SAMPLES.table, SAMPLES.c.seq == UNTRAINED.c.seq)
            .outerjoin(CONSUMPTIONS, CONSUMPTIONS.c.sample == UNTRAINED.c.sample)  # of two at most one is done
            .where(UNTRAINED.c.seq > after)
            .order_by(UNTRAINED.c.seq)
            .limit(limit)
        )
        found = [(row[SAMPLES.c.seq], SAMPLES.decode(row), row["personal"]) for row in self._rows(query)]
        return [(seq, sample, _learners(sample, personal)) for seq, sample, personal in found]

    def groups_to_compare(self, after: int, limit: int) -> list[tuple[int, str]]:
        """Groups all of whose attempts have ended, in the order in which they did, beyond `after`."""
        query = select(UNCOMPARED).where(UNCOMPARED.c.seq > after).order_by(UNCOMPARED.c.seq).limit(limit)
        return [tuple(row.values()) for row in self._rows(query)]

    def group(self, group: str) -> tuple[list[Episode], list[Turn]]:
        """The attempts of a group in the order in which they ended, and their main turns; without those withdrawn."""
        episodes = select(EPISODES.table).where(EPISODES.c.group == group).order_by(EPISODES.c.seq)
        turns = (
            select(TURNS.table)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == TURNS.c.id)
            .where(TURNS.c.group == group, TURNS.c.kind == "main", WITHDRAWN.c.turn.is_(None))
            .order_by(TURNS.c.seq)
        )
        return [EPISODES.decode(row) for row in self._rows(episodes)], [TURNS.decode(row) for row in self._rows(turns)]

    def steps(self, group: str) -> list[tuple[NextState, Judgement | None]]:
        """What followed each main turn of a group, and how it was judged; without those withdrawn."""
        query = (
            select(NEXT_STATES.table, JUDGEMENTS.table)
            .join(TURNS.table, TURNS.c.id == NEXT_STATES.c.turn)
            .outerjoin(JUDGEMENTS.table, JUDGEMENTS.c.turn == NEXT_STATES.c.turn)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == NEXT_STATES.c.turn)
            .where(TURNS.c.group == group, TURNS.c.kind == "main", WITHDRAWN.c.turn.is_(None))
            .order_by(NEXT_STATES.c.seq)
        )
        return [(NEXT_STATES.decode(row), JUDGEMENTS.decode(row)) for row in self._rows(query)]

    def comparisons(self) -> list[Comparison]:
        return self._all(Comparison)

    def sessions_to_distil(self, before: float, limit: int) -> list[tuple[str, str]]:
        """(user, session) of those with turns whose samples wait for their end, and that have ended.

        Ended says the client, or that nothing was said in it since `before` (seconds since the epoch).
        """
        query = queues.SESSIONS_TO_DISTIL.bindparams(before=before, number=limit)
        return [(row["user"], row["session"]) for row in self._rows(query)]

    def exchanges(self, user: str, session: str) -> list[tuple[Turn, NextState | None, Judgement | None, bool]]:
        """A session's main turns, what followed each, how it was judged, and whether its sample waits for the end.

        Oldest first, without those withdrawn.
        """
        query = (
            select(TURNS.table, NEXT_STATES.table, JUDGEMENTS.table, UNDISTILLED.c.turn.label("waits"))
            .outerjoin(NEXT_STATES.table, NEXT_STATES.c.turn == TURNS.c.id)
            .outerjoin(JUDGEMENTS.table, JUDGEMENTS.c.turn == TURNS.c.id)
            .outerjoin(UNDISTILLED, UNDISTILLED.c.turn == TURNS.c.id)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == TURNS.c.id)
            .where(TURNS.c.user == user, TURNS.c.session == session)
            .where(TURNS.c.kind == "main", WITHDRAWN.c.turn.is_(None))
            .order_by(TURNS.c.seq)
        )
        return [
            (TURNS.decode(row), NEXT_STATES.decode(row), JUDGEMENTS.decode(row), row["waits"] is not None)
            for row in self._rows(query)
        ]

    def lesson(self, turn: str) -> Lesson | None:
        """What the turn's session taught it."""
        rows = self._rows(select(LESSONS.table).where(LESSONS.c.turn == turn))
        return LESSONS.decode(rows[0]) if rows else None

    def held_out(self, limit: int, scope: str = GROUP) -> list[tuple[Sample, int | None]]:
        """The newest held-out samples, of everyone or one user, newest first, and how their turns were judged."""
        query = (
            select(SAMPLES.table, JUDGEMENTS.c.score)
            .join(JUDGEMENTS.table, JUDGEMENTS.c.turn == SAMPLES.c.id)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == SAMPLES.c.id)
            .where(SAMPLES.c.held_out.is_(True), WITHDRAWN.c.turn.is_(None))
            .order_by(SAMPLES.c.seq.desc())
            .limit(limit)
        )
        if scope != GROUP:
            query = query.where(SAMPLES.c.user == scope)
        return [(SAMPLES.decode(row), row[JUDGEMENTS.c.score]) for row in self._rows(query)]

    def judged_turns(self, after: int | None, limit: int) -> list[tuple[int, Turn, Judgement]]:
        """People's turns with their judgements in the order of the latter's seq: beyond `after`, or the newest."""
        query = select(JUDGEMENTS.table, TURNS.table).join(TURNS.table, TURNS.c.id == JUDGEMENTS.c.turn)
        query = query.where(TURNS.c.source == "chat").limit(limit)
        if after is None:
            rows = self._rows(query.order_by(JUDGEMENTS.c.seq.desc()))[::-1]
        else:
            rows = self._rows(query.where(JUDGEMENTS.c.seq > after).order_by(JUDGEMENTS.c.seq))
        return [(row[JUDGEMENTS.c.seq], TURNS.decode(row), JUDGEMENTS.decode(row)) for row in rows]

    def recent_scores(self, user: str, limit: int) -> list[int]:
        """Scores of the user's newest judged turns in the order they were judged; abstentions have none.

        Without steps of environments, whose votes say nothing of what a person likes.
        """
        query = (
            select(JUDGEMENTS.c.seq, JUDGEMENTS.c.score)
            .join(TURNS.table, TURNS.c.id == JUDGEMENTS.c.turn)
            .where(TURNS.c.user == user, TURNS.c.group.is_(None), JUDGEMENTS.c.score.is_not(None))
            .order_by(TURNS.c.seq.desc())
            .limit(limit)
        )
        return [score for _, score in sorted(tuple(row.values()) for row in self._rows(query))]

    def unrecorded(self, user: str, conversations: Sequence[str]) -> str | None:
        """The session in which one of the user's conversations was last served, unrecorded; None: none was."""
        rows = self._rows(erasure.unrecorded_session(user, conversations))
        return rows[0]["session"] if rows else None

    def consents(self, after: int, limit: int) -> list[tuple[int, Consent]]:
        """Words of users and sessions in the order of seq, beyond `after`."""
        return [(row[CONSENTS.c.seq], CONSENTS.decode(row)) for row in self._rows(erasure.consents(after, limit))]

    def withdrawals(self) -> int:
        """A number that grows with every turn that is withdrawn, and every erasure."""
        return self._rows(erasure.withdrawals())[0]["number"]

    def feedback(self, turn: str) -> list[Feedback]:
        """What was said of a turn, oldest first."""
        query = select(FEEDBACK.table).where(FEEDBACK.c.turn == turn).order_by(FEEDBACK.c.seq)
        return [FEEDBACK.decode(row) for row in self._rows(query)]

    def labelled(self) -> list[tuple[Judgement, Feedback]]:
        """Judged turns of which something was said explicitly, once for each time, oldest first; none withdrawn."""
        query = (
            select(JUDGEMENTS.table, FEEDBACK.table)
            .join(FEEDBACK.table, FEEDBACK.c.turn == JUDGEMENTS.c.turn)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == JUDGEMENTS.c.turn)
            .where(WITHDRAWN.c.turn.is_(None))
            .order_by(FEEDBACK.c.seq)
        )
        return [(JUDGEMENTS.decode(row), FEEDBACK.decode(row)) for row in self._rows(query)]

    def scored_turns(self, after: int, limit: int) -> list[tuple[int, Turn, int]]:
        """Turns whose latest explicit score is -1 or +1, with it, in the order of the turns' seq beyond `after`.

        Judged or not, of any kind; none withdrawn. Feedback in words alone leaves the score as it was.
        """
        latest = FEEDBACK.table.alias()
        newest = (
            select(func.max(latest.c.seq))
            .where(latest.c.turn == TURNS.c.id, latest.c.score.is_not(None))
            .correlate(TURNS.table)
            .scalar_subquery()
        )
        query = (
            select(TURNS.table, FEEDBACK.c.score)
            .join(FEEDBACK.table, FEEDBACK.c.turn == TURNS.c.id)
            .outerjoin(WITHDRAWN, WITHDRAWN.c.turn == TURNS.c.id)
            .where(TURNS.c.seq > after, FEEDBACK.c.score != 0, FEEDBACK.c.seq == newest, WITHDRAWN.c.turn.is_(None))
            .order_by(TURNS.c.seq)
            .limit(limit)
        )
        return [(row[TURNS.c.seq], TURNS.decode(row), row[FEEDBACK.c.score]) for row in self._rows(query)]

    def unanswered_feedback(self, after: int, before: float, limit: int) -> tuple[int, list[str]]:
        """Main turns that nothing followed, of which something was said before `before` (seconds since the epoch).

        Among the next `limit` feedbacks beyond seq `after`; with the seq to go on from.
        """
        query = (
            select(FEEDBACK.c.seq, FEEDBACK.c.turn, FEEDBACK.c.at, TURNS.c.kind, NEXT_STATES.c.done)
            .outerjoin(TURNS.table, TURNS.c.id == FEEDBACK.c.turn)
            .outerjoin(NEXT_STATES.table, NEXT_STATES.c.turn == FEEDBACK.c.turn)
            .where(FEEDBACK.c.seq > after)
            .order_by(FEEDBACK.c.seq)
            .limit(limit)
        )
        turns: dict[str, None] = {}
        for row in self._rows(query):
            if row["at"] > before:
                break
            after = row["seq"]
            if row["kind"] == "main" and row["done"] is None:
                turns[row["turn"]] = None
        return after, list(turns)

    def outline(self, limit: int, user: str | None = None, session: str | None = None) -> list[dict[str, Any]]:
        """The newest turns, oldest first, without a word of them: where each stands, why, and what became of it."""
        columns = ("id", "user", "session", "index", "kind", "source", "parent", "reason", "finish_reason", "started")
        query = (
            select(*(TURNS.c[name] for name in columns), NEXT_STATES.c.role, NEXT_STATES.c.done, JUDGEMENTS.c.score)
            .outerjoin(NEXT_STATES.table, NEXT_STATES.c.turn == TURNS.c.id)
            .outerjoin(JUDGEMENTS.table, JUDGEMENTS.c.turn == TURNS.c.id)
            .order_by(TURNS.c.seq.desc())
            .limit(limit)
        )
        if user is not None:
            query = query.where(TURNS.c.user == user)
        if session is not None:
            query = query.where(TURNS.c.session == session)
        return [dict(row) for row in reversed(self._rows(query))]

    def owners(self, session: str) -> list[str]:
        """Users who have a session of this name."""
        return [row["user"] for row in self._rows(select(TURNS.c.user).where(TURNS.c.session == session).distinct())]

    def content(self, user: str, session: str | None) -> Content:
        """What an erasure would find."""
        with refusing(f"journal {self.name} cannot be read"), self.database.snapshot() as connection:
            return erasure.content(connection, user, session)

    def erasures(self) -> list[Erasure]:
        return self._all(Erasure)

    def versions(self) -> list[WeightVersion]:
        return self._all(WeightVersion)

    def version_events(self) -> list[VersionEvent]:
        return self._all(VersionEvent)

    def pins(self) -> list[Pin]:
        return self._all(Pin)

    def gate_decisions(self) -> list[GateDecision]:
        return self._all(GateDecision)

    def authors(self, turns: Sequence[str]) -> list[tuple[str, str, str]]:
        """(id, user, session) of those of the turns that are there."""
        found: list[tuple[str, str, str]] = []
        for start in range(0, len(turns), _IN_ONE_QUERY):
            ids = turns[start : start + _IN_ONE_QUERY]
            query = select(TURNS.c.id, TURNS.c.user, TURNS.c.session).where(TURNS.c.id.in_(ids))
            found += [(row["id"], row["user"], row["session"]) for row in self._rows(query)]
        return found

    def swaps(self) -> list[Swap]:
        return self._all(Swap)

    def counts(self) -> dict[str, int]:
        """How many of each; `hints` counts judgements that carry one, `abstentions` those without a score.

        Each call counts only what came since the one before.
        """
        with refusing(f"journal {self.name} cannot be read"), self._counting:
            self.database.through_outages(self._count_new)
            return dict(self._counts)

    def recount(self) -> None:
        """Rows were deleted: the next call of `counts` counts all."""
        with self._counting:
            self._counts, self._marks = Counter(), {}

    def _count_new(self) -> None:
        new, marks = Counter(), dict(self._marks)
        with self.database.snapshot() as connection:
            for mark, kinds in _COUNTED.items():
                numbers = [func.count().filter(*conditions).label(name) for name, *conditions in kinds]
                query = select(func.max(mark).label("mark"), *numbers)
                if mark in marks:  # not asked for at first: the smallest index will do then
                    query = query.where(mark > marks[mark])
                found = dict(connection.execute(query).mappings().one())
                newest = found.pop("mark")
                if newest is not None:
                    marks[mark] = newest
                new.update(found)
        self._counts.update(new)
        self._marks = marks

    def _all(self, kind: type) -> list[Any]:
        records = RECORD_TABLES[kind]
        return [records.decode(row) for row in self._rows(select(records.table).order_by(records.c.seq))]

    def _rows(self, query: Select | TextClause) -> list[Any]:
        def read() -> list[Any]:
            with self.database.reader.connect() as connection:
                return list(connection.execute(query).mappings())

        with refusing(f"journal {self.name} cannot be read"):
            return self.database.through_outages(read)


class JournalStore(JournalReader):
    """Appends records too. Safe for one writing thread and any number of reading ones; no other process may write.

    Makes the tables in an empty database and migrates an older journal; a database that it refuses stays as it was.
    """

    _creates = True

    def _open(self, schema: int) -> None:
        with self.database.writer.begin() as connection:
            schema = self._schema()  # again: another process may have migrated it before it let the lock go
            if schema == 0:
                METADATA.create_all(connection, checkfirst=False)
                connection.execute(insert(META).values(name="schema", value=str(SCHEMA)))
            else:
                migrate(connection, schema, SCHEMA)
                # proves that it can be written to, even where nothing changes
                connection.execute(update(META).where(META.c.name == "schema").values(value=str(SCHEMA)))

    def append(self, *records: Any) -> None:
        """Store records of any mix of types in one transaction; a record already there is left as it was."""
        self.write(self.appending(*records))

    def record_version(self, version: WeightVersion, event: VersionEvent | None) -> None:
        """Store a version, the consumption of its samples and its event in one transaction; a repetition is ignored.

        Raises JournalError if another version consumed one of the samples, or has the same number.
        """
        self.write(self.recording(version, event))

    def appending(self, *records: Any) -> Write:
        """The write of records of any mix of types; JournalError if one is of no type the journal stores."""
        rows: defaultdict[RecordTable, list[dict[str, Any]]] = defaultdict(list)
        for record in records:
            with refusing(f"a {type(record).__name__} cannot be stored"):
                table = RECORD_TABLES[type(record)]
                rows[table].append(table.encode(record))

        def write(connection: Connection) -> None:
            for table, several in rows.items():
                admitted = erasure.admitted(connection, table, several)
                if table is TURNS:
                    admitted = _keyed_once(connection, admitted)
                if admitted:
                    connection.execute(insert_new(connection, table.table), admitted)
            queues.follow(connection, records)

        return write

    def recording(self, version: WeightVersion, event: VersionEvent | None) -> Write:
        """The write of a version with the consumption of its samples and its event."""
        append = self.appending(version, *([] if event is None else [event]))

        def write(connection: Connection) -> None:
            query = select(VERSIONS.c.samples).where(VERSIONS.c.number == version.number)
            recorded = connection.scalar(query)
            if recorded is not None:
                if recorded != VERSIONS.encode(version)["samples"]:
                    raise JournalError(f"version {version.number} was recorded before with other samples; number anew")
                return
            personal = version.scope != GROUP
            query = select(CONSUMPTIONS).where(CONSUMPTIONS.c.sample.in_(version.samples))
            query = query.where(CONSUMPTIONS.c.personal.is_(personal))
            taken = connection.execute(query.limit(1)).first()
            if taken is not None:
                raise JournalError(
                    f"version {version.number} would learn again from sample {taken.sample}, which version "
                    f"{taken.version} consumed; go on from the newest version"
                )
            others = select(SAMPLES.c.user).where(SAMPLES.c.id.in_(version.samples), SAMPLES.c.user != version.scope)
            if personal and connection.scalar(others.limit(1)) is not None:
                raise JournalError(
                    f"version {version.number} of one user would learn from another's samples; a batch is of one user"
                )
            if gone := erasure.withdrawn(connection, version.samples):
                raise WithdrawnError(
                    f"version {version.number} learnt from {len(gone)} samples that were withdrawn meanwhile; "
                    "train the step again without them"
                )
            append(connection)
            rows = [{"sample": sample, "personal": personal, "version": version.number} for sample in version.samples]
            if rows:
                connection.execute(insert(CONSUMPTIONS), rows)
                queues.trained(connection, version.samples)

        return write

    def taking_feedback(self, feedback: Feedback, taken: list[tuple[str, bool]]) -> Write:
        """The write of what a user says of a turn; the same again is ignored.

        A turn that was judged without a sample coming of it is judged anew. `taken` gets the id of what is stored, and
        whether that is so.
        """
        row = FEEDBACK.encode(feedback)

        def write(connection: Connection) -> None:
            last = select(FEEDBACK.c.id, FEEDBACK.c.score, FEEDBACK.c.text)
            last = last.where(FEEDBACK.c.turn == feedback.turn, FEEDBACK.c.user == feedback.user)
            found = connection.execute(last.order_by(FEEDBACK.c.seq.desc()).limit(1)).first()
            if found is not None and (found.score, found.text) == (feedback.score, feedback.text):
                taken.append((found.id, False))
                return
            if admitted := erasure.admitted(connection, FEEDBACK, [row]):
                connection.execute(insert_new(connection, FEEDBACK.table), admitted)
            taken.append((feedback.id, queues.judge_again(connection, feedback.turn)))

        return write

    def taking_word(self, consent: Consent) -> Write:
        """The write of a user's or session's word; an opt-out withdraws their turns from training."""
        return lambda connection: erasure.take_word(connection, consent)

    def erasing(self, record: Erasure, others: Sequence[VersionEvent | Pin]) -> Write:
        """The write that deletes the content and takes other records; what rejected versions consumed is free again."""
        events = [other for other in others if isinstance(other, VersionEvent)]
        rejected = [event.version for event in events if event.state == "rejected"]
        append = self.appending(*others)

        def write(connection: Connection) -> None:
            erasure.erase(connection, record, rejected)
            append(connection)

        return write

    def consent(self, consent: Consent) -> None:
        """Record a user's or session's word."""
        self.write(self.taking_word(consent))

    def erase(self, record: Erasure, others: Sequence[VersionEvent | Pin] = ()) -> None:
        """Delete a user's or session's content, see `erasing`; its bytes are on disk until `scrub`."""
        self.write(self.erasing(record, others))
        self.recount()

    def scrub(self) -> None:
        """Leave nothing of what was deleted in the database's files; nobody writes meanwhile. May be repeated."""
        with refusing(f"journal {self.name} cannot be rewritten"):
            self.database.scrub()

    def commit(self, writes: list[Write]) -> list[JournalError | None]:
        """Make all writes durable in one transaction; if that fails, in one each, so that only the guilty are refused.

        Returns one outcome per write; None says that it is on disk.
        """
        outcome = self._attempt(writes)
        if outcome is None or len(writes) == 1 or self.database.is_outage(outcome.__cause__):
            return [outcome] * len(writes)
        return [self._attempt([write]) for write in writes]

    def _attempt(self, writes: list[Write]) -> JournalError | None:
        tickets: list[Any] = []  # of attempts that broke off, perhaps after the server had committed

        def transact() -> None:
            with self.database.writer.begin() as connection:
                if tickets and self.database.committed(connection, tickets[-1]):
                    return
                for write in writes:
                    write(connection)
                tickets.append(self.database.ticket(connection))

        try:
            with refusing(f"journal {self.name} refused a record"):
                self.database.through_outages(transact)
        except JournalError as error:
            return error
        return None

    def write(self, write: Write) -> None:
        """Make one write durable, or raise."""
        [outcome] = self.commit([write])
        if outcome is not None:
            raise outcome

    def expire(self, before: float, after: int, limit: int) -> int | None:
        """Delete old turns among the next `limit` ones beyond seq `after`, with all that was said about them.

        Old ended before `before` (seconds since the epoch). One that waits for the judge or the trainer stays; a
        sample that training has passed over (later ones were trained on: it was too old by then) waits no longer.
        Returns the seq to go on from; None when the young turns are reached. An erasure later can no longer tell which
        versions learnt from what has gone.
        """
        query = select(TURNS.c.seq, TURNS.c.id, TURNS.c.ended).where(TURNS.c.seq > after).order_by(TURNS.c.seq)
        found = self._rows(query.limit(limit))
        old = [row["id"] for row in found if row["ended"] < before]
        if not old:
            return None

        def write(connection: Connection) -> None:
            waiting = queues.waiting(connection, old)
            doomed = [id for id in old if id not in waiting]
            for key in (*_OF_A_TURN, TURNS.c.id):
                connection.execute(delete(key.table).where(key.in_(doomed)))

        self.write(write)
        return found[-1]["seq"]

    def shrink(self) -> None:
        """Give space of deleted rows back to the file system."""
        with refusing(f"journal {self.name} cannot shrink"):
            self.database.shrink()


def _learners(sample: Sample, personal: bool | None) -> tuple[str, ...]:
    """Whose policies are still to learn from a sample; `personal` says which of two has."""
    both = {"group": (GROUP,), "user": (sample.user,), "hierarchy": (GROUP, sample.user)}[sample.policy_scope]
    return both if personal is None else tuple(scope for scope in both if (scope != GROUP) is not personal)


def _keyed_once(connection: Connection, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, without a key that another one has: both were answered, so both are kept."""
    keys = {turn["key"] for turn in turns} - {None}
    if not keys:
        return turns
    holders = dict(connection.execute(select(TURNS.c.key, TURNS.c.id).where(TURNS.c.key.in_(keys))).all())
    return [
        {**turn, "key": turn["key"] if holders.setdefault(turn["key"], turn["id"]) == turn["id"] else None}
        for turn in turns
    ]
