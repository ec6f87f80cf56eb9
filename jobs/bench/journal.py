"""Whether the journal stays as fast as it began: one turn's work on a small journal and on a large one.

Knows what a turn asks of the journal: whose continuation it is, its next state stored, the turn stored, its judgement
and its sample. Works on the store itself, without Ray. The large journal is filled through the tables' own rows, with
indexes in place, as years of use would have left it: all judged and trained on.
"""

from __future__ import annotations

import hashlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import create_engine, insert
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.schema import CreateSchema, DropSchema

from clawrl.journal.database import parse_url, refusing
from clawrl.journal.store import JournalStore
from clawrl.journal.tables import CONSUMPTIONS, RECORD_TABLES
from clawrl.types import Capture, Judgement, NextState, Sample, Turn, VersionSpan, WeightVersion
from jobs.bench.figures import Figure

SESSION_TURNS = 10
_CHUNK = 10_000
_ROUNDS = 20
_MEASURED = 1_000_000  # measured turns have numbers that no filled one has
_TOKENS = np.arange(8, dtype=np.int32)
_TOP = np.zeros((8, 4), np.float32)
_CAPTURE = Capture(_TOKENS, _TOKENS, _TOP[:, 0], _TOP.astype(np.int32), _TOP, (VersionSpan(0, 0, 8),))


def measure(url: str | None, *, small: int, large: int, turns: int) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of a journal of `small` and one of `large` turns, each the median over rounds of `turns` turns in all.

    Both are measured in turn, so that what else the machine does touches them alike. They are temporary: two SQLite
    files, or two schemas in the PostgreSQL database that `url` names.
    """
    with _journal(url, "small") as beginning, _journal(url, "large") as store:
        _fill(beginning, small)
        filled = _fill(store, large)
        times = _side_by_side({small: beginning, large: store}, turns)
        size = store.database.size()
    ours, before = times[large], times[small]
    figures = [
        Figure(
            f"{what}: ratio at {large:.0e} to {small:.0e}",
            statistics.median(ours[what]) / statistics.median(before[what]),
            at_most=1.5 if what == "turn" else None,
        )
        for what in ours
    ]
    figures += [
        Figure(f"{what} at {number:.0e} turns", 1e3 * statistics.median(times[number][what]), "ms")
        for what in ours
        for number in times
    ]
    figures += [Figure("size", size / 2**20, "MiB"), Figure("filled in", filled, "s")]
    return figures, {"seconds": {str(number): found for number, found in times.items()}}


@contextmanager
def _journal(url: str | None, name: str) -> Iterator[JournalStore]:
    """An empty journal that is gone afterwards."""
    with ExitStack() as stack:
        if url is None:
            Path("runs").mkdir(exist_ok=True)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-journal-", dir="runs"))
            url = f"sqlite:///{Path(folder).resolve()}/journal.sqlite"
        else:
            parsed, schema = parse_url(url), f"clawrl_bench_{name}"
            engine = create_engine(parsed, isolation_level="AUTOCOMMIT")
            stack.callback(engine.dispose)
            drop = DropSchema(schema, cascade=True, if_exists=True)
            with refusing(f"{parsed.render_as_string()} cannot be measured"):
                connection = stack.enter_context(engine.connect())
                connection.execute(drop)  # of a bench that was killed
                connection.execute(CreateSchema(schema))
            stack.callback(connection.execute, drop)
            url = parsed.update_query_dict({"options": f"-csearch_path={schema}"}).render_as_string(hide_password=False)
        yield stack.enter_context(closing(JournalStore(url)))


def _side_by_side(journals: dict[int, JournalStore], turns: int) -> dict[int, dict[str, list[float]]]:
    """Seconds per turn of each round, by size and by what was done."""
    times: dict[int, dict[str, list[float]]] = {size: {} for size in journals}
    for size, store in journals.items():  # what only the first call pays
        _round(store, _MEASURED * size, SESSION_TURNS)
    each = max(SESSION_TURNS, turns // _ROUNDS)
    for number in range(_ROUNDS):
        for size, store in journals.items():
            for what, seconds in _round(store, _MEASURED * size + SESSION_TURNS + number * each, each).items():
                times[size].setdefault(what, []).append(seconds / each)
    return times


def _round(store: JournalStore, first: int, number: int) -> dict[str, float]:
    """The work of `number` turns as gateway, collector and buffer give it to the journal, timed by part."""
    parts = ("turn", "append", "open_turn and last_turn", "judging and training", "counts")
    spent: dict[str, float] = dict.fromkeys(parts, 0.0)

    def timed(what: str, act: Any, *arguments: Any) -> Any:
        started = time.perf_counter()
        found = act(*arguments)
        seconds = time.perf_counter() - started
        spent[what] += seconds
        if what in ("append", "open_turn and last_turn"):
            spent["turn"] += seconds
        return found

    for at in range(first, first + number):
        turn, earlier = _turn(at), _turn(at - 1)
        opened = timed("open_turn and last_turn", store.open_turn, turn.user, earlier.conversation)
        timed("open_turn and last_turn", store.last_turn, turn.user, turn.session)
        if opened is not None:
            timed("append", store.append, _next_state(at - 1))
        timed("append", store.append, turn)
        for _, found, _ in timed("judging and training", store.pairs_to_judge, 0, 8):
            timed("judging and training", store.append, _judgement(found.id), _sample(found.id))
        timed("judging and training", store.samples_to_train, 0, 8)
        timed("counts", store.counts)
    return spent


def _fill(store: JournalStore, turns: int) -> float:
    """Rows of so many turns with all that follows them, indexes made afterwards; the seconds it took."""
    started = time.perf_counter()
    encoded = {
        RECORD_TABLES[type(record)]: RECORD_TABLES[type(record)].encode(record)
        for record in (_turn(0), _next_state(0), _judgement(""), _sample(""))
    }
    indexes = [index for records in encoded for index in records.table.indexes]
    with store.database.writer.begin() as connection:
        for index in indexes:
            index.drop(connection)
    for low in range(0, turns, _CHUNK):
        with store.database.writer.begin() as connection:
            for records, row in encoded.items():
                rows = [{**row, **_changed(records.record, number)} for number in range(low, min(low + _CHUNK, turns))]
                connection.execute(insert(records.table), rows)
    with store.database.writer.begin() as connection:
        for index in indexes:
            index.create(connection)
        for low in range(0, turns, _CHUNK):
            ids = [_id(number) for number in range(low, min(low + _CHUNK, turns))]
            number = low + 1
            version = WeightVersion(number, None, "full", None, tuple(ids), {}, 0.0)
            connection.execute(insert(RECORD_TABLES[WeightVersion].table), RECORD_TABLES[WeightVersion].encode(version))
            connection.execute(
                insert(CONSUMPTIONS), [{"sample": id, "personal": False, "version": number} for id in ids]
            )
    if store.database.writer.dialect.name == "postgresql":  # what the server would do by itself, in time
        with store.database.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
            with suppress(ProgrammingError):  # a role that may not has the filling written out while it measures
                connection.exec_driver_sql("CHECKPOINT")
    return time.perf_counter() - started


def _changed(kind: type, number: int) -> dict[str, Any]:
    """What is another in each turn's row of a table."""
    if kind is not Turn:
        return {"id" if kind is Sample else "turn": _id(number)}
    turn = _turn(number)
    names = ("id", "user", "session", "index", "conversation", "request", "started", "ended")
    return {name: getattr(turn, name) for name in names}


def _digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()  # as scattered over an index as real ones


def _id(number: int) -> str:
    return f"chatcmpl-{_digest(number)[:32]}"


def _turn(number: int) -> Turn:
    return Turn(
        _id(number),
        f"user-{number // (10 * SESSION_TURNS)}",
        f"session-{number // SESSION_TURNS}",
        number % SESSION_TURNS,
        "main",
        "chat",
        None,
        ({"role": "user", "content": "What is seven times eight? Please answer in one short sentence."},),
        (),
        {},
        {"role": "assistant", "content": "Seven times eight is fifty-six."},
        "stop",
        _digest(number),
        _CAPTURE,
        float(number),
        float(number),
        _digest(-number),
    )


def _next_state(number: int) -> NextState:
    return NextState(_id(number), "user", ({"role": "user", "content": "Thank you."},), False, float(number))


def _judgement(turn: str) -> Judgement:
    return Judgement(turn, (1, 1, 1), 1, ("Answer in one short sentence.",), 0, 0.1, None, 0.0)


def _sample(turn: str) -> Sample:
    values = np.zeros(8, np.float32)
    return Sample(turn, "ann", "chat", _TOKENS, _TOKENS >= 4, values, values, None, values, 0, 0, 1.0, 0.0)
