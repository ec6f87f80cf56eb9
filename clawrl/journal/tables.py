"""How records become rows: one table per record type, derived from the dataclass by its annotations.

Knows the column each annotation gets, the unique keys that make appends idempotent, and the indexes that keep
look-ups flat. Ignores connections, transactions and queries. Plain fields are plain columns, a nested record is
flattened into `<field>_<its field>`, an array is one `.npy` blob (type and shape inside), anything else is JSON text.
None is NULL everywhere and comes back as None.
"""

from __future__ import annotations

import io
import json
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    Table,
    Text,
)
from sqlalchemy.types import TypeEngine, UserDefinedType

from clawrl.types import (
    NOT_KEPT,
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
    VersionEvent,
    WeightVersion,
)

SCHEMA = 9
"""Number of the layout below. A change to a table raises it and adds the step that brings an older journal here."""

METADATA = MetaData()
_Seq = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only in a column declared INTEGER
_Record = TypeVar("_Record")


class Real(UserDefinedType[float]):
    """Double precision that keeps NaN, which SQLite would turn into NULL: a broken measurement is not an absent one."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "DOUBLE PRECISION"

    def bind_processor(self, dialect: Any) -> Any:
        return (lambda value: "NaN" if value != value else value) if dialect.name == "sqlite" else None

    def result_processor(self, dialect: Any, coltype: Any) -> Any:
        return lambda value: None if value is None else float(value)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A field that is one column."""

    column: Column
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]

    def encode(self, value: Any, row: dict[str, Any]) -> None:
        row[self.column.name] = None if value is None else self.write(value)

    def decode(self, row: RowMapping) -> Any:
        stored = row[self.column]
        return None if stored is None else self.read(stored)


@dataclass(frozen=True, slots=True)
class Nest:
    """A record, or a field that is a record of its own; all columns NULL is an absent one."""

    record: type
    parts: dict[str, Leaf | Nest]

    def encode(self, value: Any, row: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.encode(None if value is None else getattr(value, name), row)

    def decode(self, row: RowMapping) -> Any:
        values = {name: part.decode(row) for name, part in self.parts.items()}
        return None if all(value is None for value in values.values()) else self.record(**values)


class RecordTable(Generic[_Record]):
    """The table of one record type. `seq` numbers rows in the order of their commits and is never used twice."""

    def __init__(
        self,
        name: str,
        record: type[_Record],
        *,
        unique: tuple[str, ...] = (),
        indexes: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        columns = [Column("seq", _Seq, primary_key=True)]
        self.record, self._shape = record, _nest(record, columns)
        self.table = Table(name, METADATA, *columns, sqlite_autoincrement=True)
        self.c = self.table.c
        if unique:
            Index("_".join((name, *unique)), *(self.c[key] for key in unique), unique=True)
        for keys in indexes:
            Index("_".join((name, *keys)), *(self.c[key] for key in keys))

    def encode(self, record: _Record) -> dict[str, Any]:
        row: dict[str, Any] = {}
        self._shape.encode(record, row)
        return row

    def decode(self, row: RowMapping) -> _Record:
        return self._shape.decode(row)


def _nest(record: type, columns: list[Column], prefix: str = "", absent: bool = False) -> Nest:
    """The shape of a record; its columns go to the end of `columns`, all nullable if the record may be absent."""
    hints, parts = get_type_hints(record), {}
    for item in fields(record):
        name, (annotation, optional) = prefix + item.name, _without_none(hints[item.name])
        if isinstance(annotation, type) and is_dataclass(annotation):
            parts[item.name] = _nest(annotation, columns, f"{name}_", absent or optional)
        else:
            kind, write, read = _column_kind(annotation)
            columns.append(Column(name, kind, nullable=absent or optional))
            parts[item.name] = Leaf(columns[-1], write, read)
    return Nest(record, parts)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); anything else -> (itself, False)."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, False
    [inner] = [member for member in get_args(annotation) if member is not NoneType]
    return inner, True


def _column_kind(annotation: Any) -> tuple[TypeEngine, Callable[[Any], Any], Callable[[Any], Any]]:
    """Column type, Python -> column, column -> Python. The writers also make plain values of numpy's scalars."""
    if get_origin(annotation) is Literal:
        annotation = type(get_args(annotation)[0])
    plain = {
        str: (Text(), _to_text, str),
        int: (BigInteger(), operator.index, int),
        float: (Real(), float, float),
        bool: (Boolean(), bool, bool),
        np.ndarray: (LargeBinary(), _to_npy, _from_npy),
    }
    return plain.get(annotation) or (Text(), _to_json, lambda text: _restore(annotation, json.loads(text)))


def _to_text(text: str) -> str:
    if "\x00" in text:
        raise ValueError("PostgreSQL stores no NUL character in a name or a text; leave it out")
    return str(text)


def _to_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)
    return stream.getvalue()


def _from_npy(stored: bytes) -> np.ndarray:
    return np.lib.format.read_array(io.BytesIO(stored), allow_pickle=False)


def _to_json(value: Any) -> str:
    """ASCII, so that every string a client can send survives, half a surrogate pair and NUL too."""
    return json.dumps(value, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else asdict(value)


def _restore(annotation: Any, value: Any) -> Any:
    """JSON's lists and objects back to the tuples and records that the annotation names."""
    if get_origin(annotation) is tuple:
        return tuple(_restore(get_args(annotation)[0], item) for item in value)
    return annotation(**value) if is_dataclass(annotation) and isinstance(annotation, type) else value


TURNS = RecordTable(
    "turns",
    Turn,
    unique=("id",),
    indexes=(
        ("conversation", "user", "kind", "seq"),
        ("user", "session", "kind", "seq"),
        ("user", "request", "seq"),
        ("user", "seq"),
        ("group", "seq"),
        ("session", "user"),
    ),
)
NO_TOKENS = _to_npy(NOT_KEPT.prompt_ids)
"""What `capture_prompt_ids` holds of a turn whose tokens are not kept."""
Index("turns_key", TURNS.c.key, unique=True)
NEXT_STATES = RecordTable("next_states", NextState, unique=("turn",))
JUDGEMENTS = RecordTable("judgements", Judgement, unique=("turn",))
LESSONS = RecordTable("lessons", Lesson, unique=("turn",))
SAMPLES = RecordTable("samples", Sample, unique=("id",), indexes=(("held_out", "seq"),))
VERSIONS = RecordTable("versions", WeightVersion, unique=("number",))
FEEDBACK = RecordTable("feedback", Feedback, unique=("id",), indexes=(("turn",),))
# What has no id of its own is told from a repetition by its time.
EVENTS = RecordTable("version_events", VersionEvent, unique=("version", "state", "at"))
SWAPS = RecordTable("swaps", Swap, unique=("version", "replica", "at"))
PINS = RecordTable("pins", Pin, unique=("version", "at"))
DECISIONS = RecordTable("gate_decisions", GateDecision, unique=("version", "stage", "at"))
CONSENTS = RecordTable(
    "consents", Consent, indexes=(("user", "session"), ("conversation", "user"), ("conversation", "seq"))
)
EPISODES = RecordTable("episodes", Episode, unique=("session",), indexes=(("group",),))
COMPARISONS = RecordTable("comparisons", Comparison, unique=("group",))
ERASURES = RecordTable("erasures", Erasure, unique=("user", "at"))
RECORD_TABLES: dict[type, RecordTable] = {
    table.record: table
    for table in (
        TURNS,
        NEXT_STATES,
        JUDGEMENTS,
        LESSONS,
        SAMPLES,
        VERSIONS,
        FEEDBACK,
        EVENTS,
        SWAPS,
        PINS,
        DECISIONS,
        CONSENTS,
        EPISODES,
        COMPARISONS,
        ERASURES,
    )
}
CONSUMPTIONS = Table(
    "consumptions",
    METADATA,
    Column("sample", Text, primary_key=True),
    Column("personal", Boolean, primary_key=True),  # one version of everyone's policy learns from it, one of its user's
    Column("version", BigInteger, nullable=False, index=True),
)
UNJUDGED = Table(  # what `pairs_to_judge` finds; see `queues`
    "unjudged",
    METADATA,
    Column("seq", _Seq, ForeignKey(NEXT_STATES.c.seq, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("turn", Text, nullable=False, unique=True),
)
UNTRAINED = Table(  # what `samples_to_train` finds
    "untrained",
    METADATA,
    Column("seq", _Seq, ForeignKey(SAMPLES.c.seq, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("sample", Text, nullable=False, unique=True),
)
UNDISTILLED = Table(  # turns whose samples wait for the end of their sessions, see `sessions_to_distil`
    "undistilled",
    METADATA,
    Column("seq", _Seq, ForeignKey(JUDGEMENTS.c.seq, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("turn", Text, nullable=False, unique=True),
)
WITHDRAWN = Table(
    "withdrawn",  # turns that never train again: opted out later, or erased; what comes late about them is ignored
    METADATA,
    Column("turn", Text, primary_key=True),
)
META = Table("meta", METADATA, Column("name", Text, primary_key=True), Column("value", Text, nullable=False))
UNCOMPARED = Table(  # what `groups_to_compare` finds
    "uncompared",
    METADATA,
    Column("seq", _Seq, ForeignKey(EPISODES.c.seq, ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("group", Text, nullable=False, unique=True),
)
