"""Consent and erasure: what may not enter the journal, what may no longer train, and how content leaves it for good.

Knows the tables that hold what people said, and that a withdrawn turn neither trains again nor takes up anything that
comes late about it. Ignores whose transaction it works in (`store`), how bytes are wiped from disk (`database`) and
which versions an erasure rejects (`training/forgetting`).

    opt-out ──► no later turn of the user or session enters; those already here are withdrawn
    erasure ──► content deleted; the turns' ids stay, withdrawn, so that exactly-once holds and nothing comes back late

What was said while opted out stays out for good: the digest of such a conversation is kept, so that its continuation
is known and stays out too, even after the user opted in again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, and_, delete, exists, func, insert, or_, select
from sqlalchemy.sql import ColumnElement

from clawrl.journal import queues
from clawrl.journal.database import insert_new
from clawrl.journal.tables import (
    CONSENTS,
    CONSUMPTIONS,
    ERASURES,
    FEEDBACK,
    JUDGEMENTS,
    LESSONS,
    NEXT_STATES,
    PINS,
    SAMPLES,
    TURNS,
    WITHDRAWN,
    RecordTable,
)
from clawrl.types import Consent, Erasure

CONTENT = (NEXT_STATES, JUDGEMENTS, LESSONS, SAMPLES, FEEDBACK, TURNS)
"""Tables that hold words of people or models, or their tokens."""

_TURN_OF = {NEXT_STATES: "turn", JUDGEMENTS: "turn", LESSONS: "turn", FEEDBACK: "turn", SAMPLES: "id"}
_ROWS = 500
"""Ids in one statement; SQLite takes some thousands of parameters."""


@dataclass(frozen=True, slots=True)
class Content:
    """What the journal holds of a user or session."""

    turns: int
    samples: int
    versions: tuple[int, ...]  # those that learnt from it, whatever their state
    pinned: tuple[int, ...]  # all versions whose latest pin holds
    unknown: int = 0  # samples of anybody's that versions learnt from and that expired: whose they were is not known


# -- entering ----------------------------------------------------------------------------------------------------------


def admitted(connection: Connection, table: RecordTable, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the rows that may be stored; of a turn that may not, for want of consent, the digest is."""
    if table is TURNS:
        return [row for row in rows if _may_enter(connection, row)]
    if table in _TURN_OF:
        key = _TURN_OF[table]
        gone = withdrawn(connection, {row[key] for row in rows})
        return [row for row in rows if row[key] not in gone]
    return rows


def _may_enter(connection: Connection, turn: dict[str, Any]) -> bool:
    user, session = turn["user"], turn["session"]
    if opted_out(connection, user, session):
        mark = Consent(user, session, False, turn["ended"], turn["conversation"])
        connection.execute(insert(CONSENTS.table), CONSENTS.encode(mark))
        return False
    late = select(ERASURES.c.seq).where(
        ERASURES.c.user == user,
        or_(ERASURES.c.session.is_(None), ERASURES.c.session == session),
        ERASURES.c.at >= turn["started"],
    )
    return connection.execute(late.limit(1)).first() is None


def opted_out(connection: Connection, user: str, session: str | None) -> bool:
    """Whether the user's latest word, or the session's, is no."""
    return any(_word(connection, user, whose) is False for whose in {None, session})


def _word(connection: Connection, user: str, session: str | None) -> bool | None:
    """The latest consent of exactly this user or session; None: none was given."""
    whose = CONSENTS.c.session.is_(None) if session is None else CONSENTS.c.session == session
    words = select(CONSENTS.c.train).where(CONSENTS.c.user == user, CONSENTS.c.conversation.is_(None), whose)
    return connection.scalar(words.order_by(CONSENTS.c.seq.desc()).limit(1))


def withdrawn(connection: Connection, turns: Iterable[str]) -> set[str]:
    """Those of the turns that never train again."""
    found: set[str] = set()
    for some in _batched(turns):
        found.update(connection.scalars(select(WITHDRAWN.c.turn).where(WITHDRAWN.c.turn.in_(some))))
    return found


# -- consent -----------------------------------------------------------------------------------------------------------


def take_word(connection: Connection, consent: Consent) -> None:
    """Record a consent; an opt-out withdraws the turns there are. What was said already changes nothing."""
    if _word(connection, consent.user, consent.session) == consent.train:
        return
    connection.execute(insert(CONSENTS.table), CONSENTS.encode(consent))
    if not consent.train:
        _withdraw(connection, _turns(connection, consent.user, consent.session))


def consents(after: int, limit: int) -> Select:
    """Words of users in the order of seq, beyond `after`, without marks of conversations."""
    query = select(CONSENTS.table).where(CONSENTS.c.seq > after, CONSENTS.c.conversation.is_(None))
    return query.order_by(CONSENTS.c.seq).limit(limit)


def withdrawals() -> Select:
    """A number that grows with every turn that is withdrawn, and every erasure."""
    numbers = [select(func.count()).select_from(table).scalar_subquery() for table in (WITHDRAWN, ERASURES.table)]
    return select((numbers[0] + numbers[1]).label("number"))


def unrecorded_session(user: str, conversations: Sequence[str]) -> Select:
    """The session of the newest of the conversations that was served unrecorded, and not recorded after that.

    Where people share a name, one's opening words, and the reply, may be another's too: the newer one goes on.
    """
    newer = exists().where(
        TURNS.c.user == user,
        TURNS.c.conversation == CONSENTS.c.conversation,
        TURNS.c.kind == "main",
        TURNS.c.ended > CONSENTS.c.at,
    )
    query = select(CONSENTS.c.session).where(
        CONSENTS.c.user == user, CONSENTS.c.conversation.in_(conversations), ~newer
    )
    return query.order_by(CONSENTS.c.seq.desc()).limit(1)


def _withdraw(connection: Connection, turns: Sequence[str]) -> None:
    for some in _batched(turns):
        connection.execute(insert_new(connection, WITHDRAWN), [{"turn": turn} for turn in some])
    queues.withdrawn(connection, turns)


def _turns(connection: Connection, user: str, session: str | None) -> list[str]:
    return list(connection.scalars(select(TURNS.c.id).where(_of(TURNS, user, session))))


def _of(table: RecordTable, user: str, session: str | None) -> ColumnElement[bool]:
    whole = table.c.user == user
    return whole if session is None else and_(whole, table.c.session == session)


# -- erasure -----------------------------------------------------------------------------------------------------------


def content(connection: Connection, user: str, session: str | None) -> Content:
    """What an erasure would find."""
    turns = _turns(connection, user, session)
    samples, versions = 0, set()
    for some in _batched(turns):
        samples += len(connection.scalars(select(SAMPLES.c.id).where(SAMPLES.c.id.in_(some))).all())
        query = select(CONSUMPTIONS.c.version).where(CONSUMPTIONS.c.sample.in_(some)).distinct()
        versions.update(connection.scalars(query))
    newest = select(PINS.c.version, PINS.c.pinned).order_by(PINS.c.seq)
    pins = {row.version: row.pinned for row in connection.execute(newest)}  # the latest of each holds
    pinned = tuple(sorted(version for version, held in pins.items() if held))
    return Content(len(turns), samples, tuple(sorted(versions)), pinned, connection.scalar(_expired()) or 0)


def _expired() -> Select:
    """How many consumed samples have nothing left that says whose they were, without erased ones."""
    query = select(func.count(CONSUMPTIONS.c.sample.distinct()))
    for id in (TURNS.c.id, SAMPLES.c.id, WITHDRAWN.c.turn):
        query = query.where(~exists().where(id == CONSUMPTIONS.c.sample))
    return query


def erase(connection: Connection, erasure: Erasure, rejected: Sequence[int]) -> None:
    """Delete the content and record that; samples that only the rejected versions learnt from may train again.

    Ids stay: in `withdrawn`, in the consumptions, and in the versions' lists. A repetition changes nothing: what was
    said since the first time is not meant.
    """
    told = select(ERASURES.c.seq).where(ERASURES.c.user == erasure.user, ERASURES.c.at == erasure.at)
    if connection.execute(told).first() is not None:
        return
    turns = _turns(connection, erasure.user, erasure.session)
    _withdraw(connection, turns)
    for some in _batched(turns):
        for table in CONTENT:
            connection.execute(delete(table.table).where(table.c[_TURN_OF.get(table, "id")].in_(some)))
    if erasure.session is None:  # also what belongs to no turn that is here
        for table in (SAMPLES, FEEDBACK):
            connection.execute(delete(table.table).where(table.c.user == erasure.user))
    _release(connection, rejected)
    connection.execute(insert(ERASURES.table), ERASURES.encode(erasure))


def _release(connection: Connection, versions: Sequence[int]) -> None:
    """Samples that these versions consumed may train again, except for withdrawn ones."""
    theirs = CONSUMPTIONS.c.version.in_(versions)
    consumed = connection.scalars(select(CONSUMPTIONS.c.sample).where(theirs)).all()
    free = sorted(set(consumed) - withdrawn(connection, consumed))
    for some in _batched(free):
        connection.execute(delete(CONSUMPTIONS).where(CONSUMPTIONS.c.sample.in_(some), theirs))
    queues.released(connection, free)


def _batched(ids: Iterable[str]) -> Iterator[list[str]]:
    every = list(ids)
    return (every[start : start + _ROWS] for start in range(0, len(every), _ROWS))
