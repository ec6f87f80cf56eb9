"""The journal as a whole: its figures, its records as Parquet files and back, and whether they fit together.

Knows the files' columns, which are those of `tables` (documented in docs/journal.md). Ignores who asks. Reading is one
snapshot beside the process that writes; reading back is one transaction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import BigInteger, Boolean, Connection, LargeBinary, Table, Text, func, select, text

from clawrl.errors import JournalError
from clawrl.journal import queues
from clawrl.journal.database import insert_new, refusing
from clawrl.journal.store import JournalReader, JournalStore
from clawrl.journal.tables import (
    CONSUMPTIONS,
    ERASURES,
    EVENTS,
    PINS,
    RECORD_TABLES,
    SCHEMA,
    TURNS,
    UNJUDGED,
    UNTRAINED,
    VERSIONS,
    WITHDRAWN,
    Real,
)
from clawrl.types import GROUP

TABLES: list[Table] = [*(records.table for records in RECORD_TABLES.values()), CONSUMPTIONS, WITHDRAWN]
_BATCH = 500
_SCHEMA_KEY = b"clawrl.journal.schema"
_KINDS = [(Text, pa.string()), (BigInteger, pa.int64()), (Real, pa.float64()), (Boolean, pa.bool_())]
_KINDS.append((LargeBinary, pa.binary()))


def stats(journal: JournalReader) -> dict[str, Any]:
    """Counts, users, sessions, what waits, bytes on disk, schema, and when the first and last turns were (epoch s)."""
    counts = journal.counts()
    ended = select(TURNS.c.ended).limit(1)
    with refusing(f"journal {journal.name} cannot be read"), journal.database.snapshot() as connection:
        return {
            **counts,
            "users": connection.scalar(select(func.count(TURNS.c.user.distinct()))),
            "unjudged": connection.scalar(select(func.count()).select_from(UNJUDGED)),
            "untrained": connection.scalar(select(func.count()).select_from(UNTRAINED)),
            "oldest": connection.scalar(ended.order_by(TURNS.c.seq)),
            "newest": connection.scalar(ended.order_by(TURNS.c.seq.desc())),
            "schema": SCHEMA,
            "bytes": journal.database.size(),
        }


def schema(table: Table) -> pa.Schema:
    """A file's columns: the table's, in their order."""
    columns = [
        pa.field(column.name, next(arrow for kind, arrow in _KINDS if isinstance(column.type, kind)), column.nullable)
        for column in table.columns
    ]
    return pa.schema(columns, {_SCHEMA_KEY: str(SCHEMA).encode()})


def export(journal: JournalReader, folder: Path) -> dict[str, int]:
    """Write `<table>.parquet` for every table into a new folder; rows by table."""
    if folder.exists() and any(folder.iterdir()):
        raise JournalError(f"{folder} is not empty; name a new folder")
    with refusing(f"journal {journal.name} cannot be exported to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with journal.database.snapshot() as connection:
            return {table.name: _export(connection, table, folder / f"{table.name}.parquet") for table in TABLES}


def _export(connection: Connection, table: Table, path: Path) -> int:
    columns, rows = schema(table), 0
    found = connection.execution_options(yield_per=_BATCH).execute(select(table).order_by(*table.primary_key))
    with pq.ParquetWriter(path, columns, compression="zstd") as writer:
        for part in found.partitions():
            arrays = [
                pa.array(values, field.type) for values, field in zip(zip(*part, strict=True), columns, strict=True)
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=columns))
            rows += len(part)
    return rows


def restore(journal: JournalStore, folder: Path) -> dict[str, int]:
    """Add the records of an export, all or none; those already there are left as they are. Rows added by table.

    Raises JournalError if a file is missing or of another schema, or if the journal holds another run's versions.
    """
    for table in TABLES:
        _require_file(folder / f"{table.name}.parquet", schema(table))
    added: dict[str, int] = {}

    def write(connection: Connection) -> None:
        _require_same_run(connection, folder)
        for table in TABLES:
            number = select(func.count()).select_from(table)
            before = connection.scalar(number) or 0
            _restore(connection, table, folder / f"{table.name}.parquet")
            added[table.name] = (connection.scalar(number) or 0) - before
        queues.fill(connection)

    journal.write(write)
    return added


def _require_file(path: Path, expected: pa.Schema) -> None:
    if not path.is_file():
        raise JournalError(f"{path} is missing; name a folder written by `clawrl journal export`")
    with refusing(f"{path} is no export of a journal"):
        found = pq.read_schema(path)
    number = (found.metadata or {}).get(_SCHEMA_KEY, b"none").decode()
    if number != str(SCHEMA) or not found.equals(expected):
        raise JournalError(
            f"{path} was exported with schema {number} and this clawrl knows {SCHEMA}; import it with the clawrl that "
            "exported it, and open the journal with this one"
        )


def _require_same_run(connection: Connection, folder: Path) -> None:
    there = dict(connection.execute(select(VERSIONS.c.number, VERSIONS.c.samples)).all())
    for row in _rows(folder / "versions.parquet"):
        if there.get(row["number"], row["samples"]) != row["samples"]:
            raise JournalError(f"the journal holds another run's version {row['number']}; import into an empty one")


def _restore(connection: Connection, table: Table, path: Path) -> None:
    """A table without a unique key of its own knows its rows by all they say."""
    names = [column.name for column in table.columns if column.name != "seq"]
    unique = table in (CONSUMPTIONS, WITHDRAWN) or any(index.unique for index in table.indexes)
    known = set() if unique else {repr(tuple(row)) for row in connection.execute(select(*(table.c[n] for n in names)))}
    batch: list[dict[str, Any]] = []
    for row in _rows(path):
        if repr(tuple(row[name] for name in names)) not in known:
            batch.append({name: row[name] for name in names})
        if len(batch) == _BATCH:
            connection.execute(insert_new(connection, table), batch)
            batch = []
    if batch:
        connection.execute(insert_new(connection, table), batch)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_BATCH):
            yield from batch.to_pylist()


def check(journal: JournalReader) -> list[str]:
    """What is wrong, one line each with its remedy or its place; empty if all fits together."""
    with refusing(f"journal {journal.name} cannot be read"):
        damage = journal.database.problems()
        if damage:
            return [f"{line}; restore the journal from a backup" for line in damage]
        with journal.database.snapshot() as connection:
            found = [*_unreadable(connection), *_orphans(connection), *_consumptions(connection)]
            lost = _lost_checkpoints(connection)
        if lost:  # or the program that runs beside this has served the next version, and deleted this one's, since
            with journal.database.snapshot() as connection:
                lost &= _lost_checkpoints(connection)
        return found + [
            f"version {number} has no checkpoint at {path}; restore the folder from a backup, or roll back"
            for number, path in sorted(lost)
        ]


def _unreadable(connection: Connection) -> Iterator[str]:
    for records in RECORD_TABLES.values():
        found = connection.execution_options(yield_per=_BATCH).execute(select(records.table).order_by(records.c.seq))
        for row in found.mappings():
            try:
                records.decode(row)
            except Exception as error:
                yield f"{records.table.name} seq={row[records.c.seq]} cannot be read: {type(error).__name__}"


def _orphans(connection: Connection) -> Iterator[str]:
    keys = {"next_states": "turn", "judgements": "turn", "lessons": "turn", "feedback": "turn", "samples": "id"}
    for name, key in keys.items():
        query = f"SELECT count(*) FROM {name} r WHERE NOT EXISTS (SELECT 1 FROM turns t WHERE t.id = r.{key})"
        if number := connection.scalar(text(query)):
            yield f"{number} {name} of turns that are not there"
    for name, number in queues.stale(connection).items():
        yield f"{number} wrong entries in the list `{name}`; import an export of this journal into an empty one"


@dataclass(frozen=True, slots=True)
class Uses:
    """What is wrong with what versions learnt from; all empty if each sample made at most one version of a scope."""

    twice: dict[str, tuple[int, ...]]  # sample -> the versions that learnt from it
    unmarked: dict[str, int]  # sample -> the version that learnt from it, without being marked as its consumer
    unlearnt: dict[str, int]  # sample -> the version that is marked as its consumer and does not list it


def uses(connection: Connection) -> Uses:
    """Versions' lists of samples against the marks of consumption.

    A rejected version counts like any other: what it learnt from stays consumed. Only an erasure gives samples back,
    those of the versions that it rejected itself, which its time tells; these may keep marks of erased samples.
    """
    versions = [VERSIONS.decode(row) for row in connection.execute(select(VERSIONS.table)).mappings()]
    taken_back = set(
        connection.scalars(
            select(EVENTS.c.version)
            .join(ERASURES.table, ERASURES.c.at == EVENTS.c.at)
            .where(EVENTS.c.state == "rejected")
        )
    )
    learnt: defaultdict[tuple[str, bool], list[int]] = defaultdict(list)
    for version in versions:
        for sample in version.samples if version.number not in taken_back else ():
            learnt[sample, version.scope != GROUP].append(version.number)
    listed = {(sample, version.scope != GROUP, version.number) for version in versions for sample in version.samples}
    consumed = {(row.sample, row.personal): row.version for row in connection.execute(select(CONSUMPTIONS))}
    return Uses(
        twice={use[0]: tuple(numbers) for use, numbers in learnt.items() if len(numbers) > 1},
        unmarked={use[0]: numbers[0] for use, numbers in learnt.items() if consumed.get(use) not in numbers},
        unlearnt={use[0]: number for use, number in consumed.items() if (*use, number) not in listed},
    )


def _consumptions(connection: Connection) -> Iterator[str]:
    found = uses(connection)
    for sample, (first, second, *_) in sorted(found.twice.items()):
        yield f"sample {sample} was trained on twice, by versions {first} and {second}"
    for sample, number in sorted(found.unmarked.items()):
        yield f"version {number} learnt from sample {sample}, which is not marked as consumed"
    known = set(connection.scalars(select(VERSIONS.c.number)))
    for number in sorted(set(found.unlearnt.values()) - known):
        yield f"samples were consumed by version {number}, which is not there"
    for sample, number in sorted(found.unlearnt.items()):
        if number in known:
            yield f"sample {sample} is marked as consumed by version {number}, which did not learn from it"


def _lost_checkpoints(connection: Connection) -> set[tuple[int, str]]:
    """Each scope's newest serving version and the pinned ones must be on disk, these are not; others go in time."""
    query = select(VERSIONS.c.scope, EVENTS.c.version).join(VERSIONS.table, VERSIONS.c.number == EVENTS.c.version)
    served = connection.execute(query.where(EVENTS.c.state == "serving").order_by(EVENTS.c.seq)).all()
    serving = {row.scope: row.version for row in served}  # the last of each
    pins = dict(connection.execute(select(PINS.c.version, PINS.c.pinned).order_by(PINS.c.seq)).all())
    kept = {*serving.values(), *(version for version, pinned in pins.items() if pinned)}
    query = select(VERSIONS.c.number, VERSIONS.c.checkpoint).where(VERSIONS.c.number.in_(kept))
    return {
        (number, checkpoint)
        for number, checkpoint in connection.execute(query)
        if checkpoint is not None and not Path(checkpoint).is_dir()
    }
