"""Opening the database, and all that is particular to SQLite; the rest of the package is SQL that any database knows.

Knows pragmas, ON CONFLICT, and which failure asks for which remedy. Ignores records and queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, Insert, Table, create_engine, event
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL, make_url

from clawrl.errors import JournalError

READERS = 4
"""Connections that read side by side."""

_LOCK_WAIT_MS = 5000
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
}


def parse_url(url: str) -> URL:
    """SQLAlchemy's URL of a database that can hold a journal; JournalError for any other, without its password."""
    advice = "use sqlite:////folder/journal.sqlite"
    try:
        parsed = make_url(url)
    except Exception:
        raise JournalError(f"journal.url is not a database URL; {advice}") from None
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise JournalError(f"journal.url={parsed.render_as_string()} cannot hold a journal; {advice}")
    return parsed


def connect(url: URL) -> tuple[Engine, Engine]:
    """(readers, writer). Statements' parameters are users' words and stay out of error messages."""
    reader = create_engine(url, hide_parameters=True, isolation_level="AUTOCOMMIT", pool_size=READERS)
    writer = create_engine(url, hide_parameters=True, pool_size=1, max_overflow=0)
    _prepare_sqlite(str(url.database), reader, writer)
    return reader, writer


def _prepare_sqlite(path: str, reader: Engine, writer: Engine) -> None:
    """A private file, WAL (readers never wait), fsync at each commit, the write lock at each transaction's begin."""
    if not path.startswith("file:"):
        Path(path).touch(mode=0o600)

    def pragmas(*settings: str) -> Callable[[Any, Any], None]:
        def on_connect(connection: Any, _: Any) -> None:
            connection.isolation_level = None  # or the driver begins transactions by itself
            for setting in settings:
                connection.execute(f"PRAGMA {setting}")

        return on_connect

    wait = f"busy_timeout={_LOCK_WAIT_MS}"
    event.listen(reader, "connect", pragmas(wait, "query_only=ON"))
    event.listen(writer, "connect", pragmas(wait, "journal_mode=WAL", "synchronous=FULL"))
    event.listen(writer, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))


@cache
def insert_new(table: Table) -> Insert:
    """Insert rows, leaving alone those whose unique key is there already."""
    return sqlite.insert(table).on_conflict_do_nothing()


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Any failure becomes a JournalError that says what it was and what to do."""
    try:
        yield
    except JournalError:
        raise
    except Exception as error:
        cause = getattr(error, "orig", None) or error
        remedy = next((f"; {remedy}" for words, remedy in _REMEDIES.items() if words in str(cause)), "")
        raise JournalError(f"{what}: {type(cause).__name__}: {cause}{remedy}") from error
