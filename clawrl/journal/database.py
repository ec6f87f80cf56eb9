"""Opening the database, and all that is particular to SQLite or PostgreSQL; the rest of the package is common SQL.

Knows pragmas and session settings, ON CONFLICT, the writer's lock, what an outage looks like and which failure asks
for which remedy. Ignores records and queries.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Insert, Table, create_engine, event, inspect
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import InterfaceError, OperationalError

from clawrl.errors import JournalError

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

READERS = 4
"""Connections that read side by side."""

OUTAGE_S = 60.0
"""How long reads and commits wait for a server that restarts."""

_RETRY_S = 0.2
_LOCK_WAIT_S = 5.0
_BUSY = "another process writes to this journal; end it, or name another database in journal.url"
_REMEDIES = {
    "unable to open": "check that its folder exists and is writable",
    "No such file": "make its folder first",
    "Permission denied": "give this user write access to the file and its folder",
    "readonly database": "give this user write access to the file and its folder",
    "database or disk is full": "free disk space",
    "disk I/O error": "check the disk's space and health",
    "database is locked": "end the other program that writes to it",
    "not a database": "name another file in journal.url; this one was left as it is",
    "malformed": "restore it from a backup, or name another file in journal.url",
    "Connection refused": "start PostgreSQL, or correct host and port in journal.url",
    "could not translate host name": "correct the host in journal.url",
    "failed to resolve host": "correct the host in journal.url",
    "authentication failed": "correct user and password in journal.url",
    "no password supplied": "put the password into journal.url, or into ~/.pgpass",
    "does not exist": "create it first (createuser, createdb), or correct journal.url",
    "read-only transaction": "connect to the primary server, as a role that may write",
    "permission denied": "grant this role CREATE on the schema and ownership of its tables",
    "No space left": "free disk space on the database's server",
    "index row": "shorten the name of the user or session",
}


def parse_url(url: str) -> URL:
    """SQLAlchemy's URL of a database that can hold a journal; JournalError for any other, without its password."""
    advice = "use sqlite:////folder/journal.sqlite or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url)
    except Exception:
        raise JournalError(f"journal.url is not a database URL; {advice}") from None
    if parsed.drivername in ("postgresql", "postgresql+psycopg") and parsed.database:
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise JournalError(f"journal.url={parsed.render_as_string()} cannot hold a journal; {advice}")
    return parsed


def open_database(url: URL, *, create: bool) -> Database:
    """The database of a URL from `parse_url`, not yet connected. `create` makes SQLite's file, or it must be there."""
    return _Sqlite(url, create) if url.get_backend_name() == "sqlite" else _Postgres(url)


class Database(ABC):
    """One database: a single connection writes and locks out other writers, several read side by side.

    Statements' parameters are users' words and stay out of error messages.
    """

    def __init__(self, url: URL, **options: Any) -> None:
        options = {**options, "hide_parameters": True}
        self.reader: Engine = create_engine(url, isolation_level="AUTOCOMMIT", pool_size=READERS, **options)
        self.writer: Engine = create_engine(url, pool_size=1, max_overflow=0, **options)
        event.listen(self.reader, "connect", lambda connection, _: self._prepare_reader(connection))
        event.listen(self.writer, "connect", lambda connection, _: self._prepare_writer(connection))

    def close(self) -> None:
        self.reader.dispose()
        self.writer.dispose()

    def through_outages(self, act: Callable[[], _Answer]) -> _Answer:
        """What `act` returns, repeated while the server is away, for OUTAGE_S at most."""
        deadline = time.monotonic() + OUTAGE_S
        while True:
            try:
                return act()
            except Exception as error:
                if not self.is_outage(error) or time.monotonic() > deadline:
                    raise
                log.warning("event=database_away error=%s retry_s=%g", type(error).__name__, _RETRY_S)
            time.sleep(_RETRY_S)

    def is_outage(self, error: BaseException | None) -> bool:
        """Whether the same may succeed a little later, over a new connection."""
        return False

    def ticket(self, connection: Connection) -> Any:
        """What names the open transaction after its connection broke."""
        return None

    def committed(self, connection: Connection, ticket: Any) -> bool:
        """Whether the transaction of this ticket, of an earlier connection of this process, is durable."""
        return False

    @contextmanager
    @abstractmethod
    def snapshot(self) -> Iterator[Connection]:
        """A connection whose queries all see the same moment; it writes nothing and blocks nobody."""

    @abstractmethod
    def size(self) -> int:
        """Bytes on disk."""

    @abstractmethod
    def problems(self) -> list[str]:
        """What the database itself finds broken in its files."""

    @abstractmethod
    def shrink(self) -> None:
        """Give some of the space of deleted rows back, in a moment."""

    @abstractmethod
    def scrub(self) -> None:
        """Rewrite what holds content so that no deleted byte is left in the database's own files.

        Needs as much free disk as they take, and nobody writes meanwhile. Backups, archived logs, and blocks that the
        file system has given back are out of its reach.
        """

    @abstractmethod
    def _prepare_reader(self, connection: Any) -> None: ...

    @abstractmethod
    def _prepare_writer(self, connection: Any) -> None: ...


class _Sqlite(Database):
    """A private file in WAL mode (readers never wait), fsync at each commit, a lock file beside it."""

    def __init__(self, url: URL, create: bool) -> None:
        super().__init__(url)
        self._path = str(url.database)
        if create and not self._path.startswith("file:"):
            Path(self._path).touch(mode=0o600)
        elif not create and not Path(self._path).is_file():
            raise JournalError(f"there is no journal {self._path}; check the path")
        self._lock: int | None = None
        event.listen(self.writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))

    def close(self) -> None:
        super().close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        with self.reader.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
            finally:
                connection.exec_driver_sql("ROLLBACK")

    def size(self) -> int:
        return sum(path.stat().st_size for end in ("", "-wal") if (path := Path(self._path + end)).exists())

    def problems(self) -> list[str]:
        with self.reader.connect() as connection:
            found = [*connection.exec_driver_sql("PRAGMA integrity_check").scalars()]
            orphans = [*connection.exec_driver_sql("PRAGMA foreign_key_check")]
        return [line for line in found if line != "ok"] + [f"{row[0]} refers to a missing row" for row in orphans]

    def shrink(self) -> None:
        with self.writer.begin() as connection:
            free = connection.exec_driver_sql("PRAGMA freelist_count").scalar_one()
            for _ in range(min(free, 1000)):  # Python's driver takes one step of a statement without columns: one page
                connection.exec_driver_sql("PRAGMA incremental_vacuum")

    def scrub(self) -> None:
        connection = self.writer.raw_connection()
        try:
            cursor = connection.cursor()
            cursor.execute("VACUUM")  # a page that was split keeps bytes of the rows that moved away
            deadline = time.monotonic() + _LOCK_WAIT_S
            while cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()[0][0]:  # a reader still looks into it
                if time.monotonic() > deadline:
                    raise JournalError("a reader holds the write-ahead log, where deleted content may be")
                time.sleep(_RETRY_S)
        finally:
            connection.close()

    def _prepare_reader(self, connection: Any) -> None:
        connection.isolation_level = None  # or the driver begins transactions by itself
        connection.execute(f"PRAGMA busy_timeout={_LOCK_WAIT_S * 1000:.0f}")
        connection.execute("PRAGMA query_only=ON")

    def _prepare_writer(self, connection: Any) -> None:
        self._take_lock()
        connection.isolation_level = None
        for setting in (
            f"busy_timeout={_LOCK_WAIT_S * 1000:.0f}",
            "auto_vacuum=INCREMENTAL",  # of effect in a new file only
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "secure_delete=ON",
        ):
            connection.execute(f"PRAGMA {setting}")

    def _take_lock(self) -> None:
        if self._lock is not None or self._path.startswith("file:"):
            return
        lock = os.open(f"{self._path}-lock", os.O_CREAT | os.O_RDWR, 0o600)
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise JournalError(f"{self._path}: {_BUSY}") from None
                time.sleep(0.05)
            else:
                self._lock = lock
                return


class _Postgres(Database):
    """A schema of a PostgreSQL database (the first of the search path), an advisory lock against other writers."""

    def __init__(self, url: URL) -> None:
        super().__init__(url, pool_pre_ping=True)  # a connection from before a restart is replaced unseen
        self._name = url.render_as_string()

    def is_outage(self, error: BaseException | None) -> bool:
        if not isinstance(error, OperationalError | InterfaceError):
            return False
        state = getattr(error.orig, "sqlstate", None)  # none: no connection; 08, 57P: the server goes, or comes
        return state is None or state.startswith(("08", "57P"))

    def ticket(self, connection: Connection) -> int:
        return connection.exec_driver_sql("SELECT txid_current()").scalar_one()

    def committed(self, connection: Connection, ticket: int) -> bool:
        """Never "in progress": the writer's lock is ours, so the session of that transaction has ended."""
        return connection.exec_driver_sql("SELECT txid_status(%s)", (ticket,)).scalar() == "committed"

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        with self.reader.connect() as connection:
            yield connection.execution_options(isolation_level="REPEATABLE READ")

    def size(self) -> int:
        query = (
            "SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = current_schema()::regnamespace"
        )
        with self.reader.connect() as connection:
            return int(connection.exec_driver_sql(query).scalar_one())

    def problems(self) -> list[str]:
        return []  # checksums and constraints are the server's to watch

    def shrink(self) -> None:
        """Autovacuum does it."""

    def scrub(self) -> None:
        """New files for every table; what the server archived or sent to replicas before is theirs."""
        with self.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in inspect(connection).get_table_names():
                connection.exec_driver_sql(f"VACUUM FULL {table}")

    def _prepare_reader(self, connection: Any) -> None:
        self._set(connection, "default_transaction_read_only = on")

    def _prepare_writer(self, connection: Any) -> None:
        import psycopg

        # A machine that died is noticed within a minute, so that its lock is free.
        self._set(connection, "synchronous_commit = on", "tcp_keepalives_idle = 30", "tcp_keepalives_interval = 10")
        self._set(connection, f"lock_timeout = {_LOCK_WAIT_S * 1000:.0f}")
        try:
            connection.execute("SELECT pg_advisory_lock(hashtextextended('clawrl ' || current_schema(), 0))")
        except psycopg.errors.LockNotAvailable:
            connection.close()
            raise JournalError(f"{self._name}: {_BUSY}") from None
        connection.commit()

    def _set(self, connection: Any, *settings: str) -> None:
        for setting in settings:
            connection.execute(f"SET {setting}")
        connection.commit()


def insert_new(connection: Connection, table: Table) -> Insert:
    """Insert rows, leaving alone those whose unique key is there already."""
    return _insert_new(connection.dialect.name, table)


@cache
def _insert_new(dialect: str, table: Table) -> Insert:
    module = sqlite if dialect == "sqlite" else postgresql
    return module.insert(table).on_conflict_do_nothing()


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Any failure becomes a JournalError that says what it was and what to do."""
    try:
        yield
    except JournalError:
        raise
    except Exception as error:
        cause = getattr(error, "orig", None) or error
        # PostgreSQL's full message repeats the row
        said = getattr(getattr(cause, "diag", None), "message_primary", None) or str(cause)
        remedy = next((f"; {remedy}" for words, remedy in _REMEDIES.items() if words in said), "")
        raise JournalError(f"{what}: {type(cause).__name__}: {said}{remedy}") from error
