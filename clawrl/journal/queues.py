"""What waits to be judged, compared and trained on, kept beside the records so that finding it never scans them.

Knows the waiting lists and how each append changes them, in its own transaction. Ignores who takes from them.
They are derived: `fill` makes them anew from the records, and a deleted record leaves them by itself (ON DELETE
CASCADE).

    NextState ──► unjudged ──Judgement──►        Sample ──► untrained ──WeightVersion──►
    Judgement, deferred ──► undistilled ──Lesson──►
    Episode, the last of its group ──► uncompared ──Comparison──►

A withdrawn turn (`erasure`) waits for nothing, and a turn whose tokens were not kept is not judged. Neither is one of a
group: its attempts are compared with one another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select, text

from clawrl.journal.tables import CONSUMPTIONS, NEXT_STATES, NO_TOKENS, SAMPLES, UNDISTILLED, UNJUDGED, UNTRAINED
from clawrl.types import Comparison, Episode, Judgement, Lesson, NextState, Sample, Turn

_UNJUDGED = f"""
    SELECT n.seq, n.turn FROM next_states n JOIN turns t ON t.id = n.turn
    WHERE t.kind = 'main' AND t."group" IS NULL AND length(t.capture_prompt_ids) > {len(NO_TOKENS)}
    AND NOT EXISTS (SELECT 1 FROM judgements j WHERE j.turn = n.turn)
    AND NOT EXISTS (SELECT 1 FROM withdrawn w WHERE w.turn = n.turn)"""
_TO_LEARN = """(SELECT count(*) FROM consumptions c WHERE c.sample = s.id)
    < CASE s.policy_scope WHEN 'hierarchy' THEN 2 ELSE 1 END"""
_UNTRAINED = f"""
    SELECT s.seq, s.id FROM samples s
    WHERE NOT s.held_out AND {_TO_LEARN}
    AND NOT EXISTS (SELECT 1 FROM withdrawn w WHERE w.turn = s.id)"""
_UNDISTILLED = """
    SELECT j.seq, j.turn FROM judgements j
    WHERE j.deferred AND NOT EXISTS (SELECT 1 FROM lessons l WHERE l.turn = j.turn)
    AND NOT EXISTS (SELECT 1 FROM withdrawn w WHERE w.turn = j.turn)"""
_UNCOMPARED = """
    SELECT max(e.seq) AS seq, e."group" FROM episodes e
    WHERE e.status <> 'lost' AND NOT EXISTS (SELECT 1 FROM comparisons c WHERE c."group" = e."group")
    {only} GROUP BY e."group" HAVING count(*) >= max(e.group_size)"""
LISTS = {
    "unjudged": ("seq, turn", _UNJUDGED),
    "untrained": ("seq, sample", _UNTRAINED),
    "undistilled": ("seq, turn", _UNDISTILLED),
    "uncompared": ('seq, "group"', _UNCOMPARED.format(only="")),
}
"""Each list's columns, and what it holds as the records tell it."""
_ADD_UNJUDGED = text(f"INSERT INTO unjudged (seq, turn) {_UNJUDGED} AND n.turn = :id ON CONFLICT DO NOTHING")
_ADD_UNTRAINED = text(f"INSERT INTO untrained (seq, sample) {_UNTRAINED} AND s.id = :id ON CONFLICT DO NOTHING")
_ADD_UNDISTILLED = text(f"INSERT INTO undistilled (seq, turn) {_UNDISTILLED} AND j.turn = :id ON CONFLICT DO NOTHING")
_ADD_UNCOMPARED = text(
    f"""INSERT INTO uncompared (seq, "group") {_UNCOMPARED.format(only='AND e."group" = :id')} ON CONFLICT DO NOTHING"""
)
_COMPARED = text('DELETE FROM uncompared WHERE "group" = :id')
_JUDGED = text("DELETE FROM unjudged WHERE turn = :id")
_DISTILLED = text("DELETE FROM undistilled WHERE turn = :id")
_FORGET_LESSON = text("DELETE FROM lessons WHERE turn = :id")
_UNDO = text(
    "DELETE FROM judgements WHERE turn = :id AND EXISTS (SELECT 1 FROM next_states n WHERE n.turn = :id) "
    "AND NOT EXISTS (SELECT 1 FROM withdrawn w WHERE w.turn = :id)"
)
_SAMPLED = text(
    "SELECT 1 WHERE EXISTS (SELECT 1 FROM samples WHERE id = :id) OR "
    "EXISTS (SELECT 1 FROM consumptions WHERE sample = :id)"
)
_TRAINED = text(
    f"""DELETE FROM untrained WHERE sample = :id
    AND NOT EXISTS (SELECT 1 FROM samples s WHERE s.id = :id AND {_TO_LEARN})"""
)
_UNTRAINABLE = text("DELETE FROM untrained WHERE sample = :id")


SESSIONS_TO_DISTIL = text(
    """SELECT t."user", t.session FROM undistilled u JOIN turns t ON t.id = u.turn
    WHERE NOT EXISTS (
        SELECT 1 FROM unjudged w JOIN turns x ON x.id = w.turn WHERE x."user" = t."user" AND x.session = t.session)
    AND EXISTS (
        SELECT 1 FROM turns x LEFT JOIN next_states n ON n.turn = x.id
        WHERE x.seq = (
            SELECT max(y.seq) FROM turns y WHERE y."user" = t."user" AND y.session = t.session AND y.kind = 'main')
        AND (n.done OR (x.ended < :before AND (n.at IS NULL OR n.at < :before))))
    GROUP BY t."user", t.session ORDER BY max(u.seq) LIMIT :number"""
)
"""(user, session) with undistilled turns, all judged that is to be judged: its newest turn ended it, or is old."""


def follow(connection: Connection, records: Iterable[Any]) -> None:
    """Bring the lists up to records that were just stored, in whatever order they came."""
    pairs = {record.id if isinstance(record, Turn) else record.turn for record in _of(records, Turn, NextState)}
    _each(connection, _ADD_UNJUDGED, pairs)
    judged = {record.turn for record in _of(records, Judgement)}
    _each(connection, _JUDGED, judged)
    _each(connection, _ADD_UNDISTILLED, judged)
    _each(connection, _DISTILLED, {record.turn for record in _of(records, Lesson)})
    _each(connection, _ADD_UNTRAINED, {record.id for record in _of(records, Sample)})
    _each(connection, _ADD_UNCOMPARED, {record.group for record in _of(records, Episode)})
    _each(connection, _COMPARED, {record.group for record in _of(records, Comparison)})


def judge_again(connection: Connection, turn: str) -> bool:
    """Forget a judgement that made no sample, so that the turn is judged with what was said since; whether it is.

    Its next state moves to the end: whoever reads in order has passed it.
    """
    if connection.scalar(_SAMPLED, {"id": turn}) or not connection.execute(_UNDO, {"id": turn}).rowcount:
        return False
    connection.execute(_FORGET_LESSON, {"id": turn})
    row = connection.execute(select(NEXT_STATES.table).where(NEXT_STATES.c.turn == turn)).mappings().one()
    connection.execute(delete(NEXT_STATES.table).where(NEXT_STATES.c.turn == turn))
    connection.execute(insert(NEXT_STATES.table), {name: value for name, value in row.items() if name != "seq"})
    _each(connection, _ADD_UNJUDGED, [turn])
    return True


def trained(connection: Connection, samples: Iterable[str]) -> None:
    """A version consumed these samples; another may still have to."""
    _each(connection, _TRAINED, samples)


def withdrawn(connection: Connection, turns: Iterable[str]) -> None:
    """These turns are neither judged nor trained on any more."""
    turns = list(turns)
    for statement in (_JUDGED, _DISTILLED, _UNTRAINABLE):
        _each(connection, statement, turns)


def released(connection: Connection, samples: Iterable[str]) -> None:
    """What consumed these samples was undone."""
    _each(connection, _ADD_UNTRAINED, samples)


def waiting(connection: Connection, turns: list[str]) -> set[str]:
    """Those of `turns` that wait for the judge or their session's end, or whose samples wait for a trainer that has not
    passed them over: what a user's own policy has not learnt from by then, for want of a batch, it never does."""
    newest = select(func.max(CONSUMPTIONS.c.version)).scalar_subquery()
    passed = (
        select(func.coalesce(func.max(SAMPLES.c.seq), 0))
        .join(CONSUMPTIONS, CONSUMPTIONS.c.sample == SAMPLES.c.id)
        .where(CONSUMPTIONS.c.version == newest)
        .scalar_subquery()
    )
    unjudged = select(UNJUDGED.c.turn).where(UNJUDGED.c.turn.in_(turns))
    undistilled = select(UNDISTILLED.c.turn).where(UNDISTILLED.c.turn.in_(turns))
    untrained = select(UNTRAINED.c.sample).where(UNTRAINED.c.sample.in_(turns), UNTRAINED.c.seq > passed)
    return {turn for each in (unjudged, undistilled, untrained) for turn in connection.scalars(each)}


def fill(connection: Connection) -> None:
    """Make the lists anew from the records."""
    for name, (columns, query) in LISTS.items():
        connection.execute(text(f"DELETE FROM {name}"))
        connection.execute(text(f"INSERT INTO {name} ({columns}) {query}"))


def stale(connection: Connection) -> dict[str, int]:
    """How many entries each list has too many or too few; none if all is well."""
    found = {}
    for name, (_, query) in LISTS.items():
        both = [f"SELECT seq FROM {name}", f"SELECT seq FROM ({query}) AS derived"]
        wrong = [text(f"SELECT count(*) FROM ({a} EXCEPT {b}) AS w") for a, b in (both, both[::-1])]
        if number := sum(connection.scalar(each) or 0 for each in wrong):
            found[name] = number
    return found


def _of(records: Iterable[Any], *kinds: type) -> list[Any]:
    return [record for record in records if isinstance(record, kinds)]


def _each(connection: Connection, statement: Any, ids: Iterable[str]) -> None:
    if rows := [{"id": id} for id in ids]:
        connection.execute(statement, rows)
