"""PostgreSQL for tests and fault injection: a private server, or schemas for the time being in somebody's database.

The private server has its own folder and socket, nothing of the machine is touched.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from clawrl.journal.database import refusing


def binaries() -> str | None:
    """The folder of PostgreSQL's programs on this machine."""
    found = shutil.which("initdb") or next(iter(sorted(glob("/usr/lib/postgresql/*/bin/initdb"))[::-1]), None)
    return None if found is None else str(Path(found).resolve().parent)


@contextmanager
def private_server(above: Path | None = None) -> Iterator[Postgres]:
    """A running server in a temporary folder (`above`: below this one). FileNotFoundError where it is not installed."""
    programs = binaries()
    if programs is None:
        raise FileNotFoundError("no PostgreSQL here: no initdb in PATH; install Debian's `postgresql`")
    folder = Path(tempfile.mkdtemp(prefix="clawrl-pg-", dir=above))
    try:
        server = Postgres(programs, folder)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Schemas:
    """Empty schemas in a database that is there already, which `drop` removes again."""

    def __init__(self, url: URL) -> None:
        """Raises JournalError if it cannot be reached."""
        self._url, self._names = url, list[str]()
        self._engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        with refusing(f"{url.render_as_string()} cannot be used"):
            self._execute("SELECT 1")

    def fresh(self) -> str:
        """URL of an empty schema."""
        name = f"clawrl_chaos_{uuid.uuid4().hex[:8]}"
        with refusing(f"{self._url.render_as_string()} takes no schema"):
            self._execute(f"CREATE SCHEMA {name}")
        self._names.append(name)
        options = {"options": f"-csearch_path={name}"}
        return self._url.update_query_dict(options).render_as_string(hide_password=False)

    def drop(self) -> None:
        while self._names:
            self._execute(f"DROP SCHEMA {self._names.pop()} CASCADE")

    def _execute(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.execute(text(statement))


class Postgres:
    """A server that listens on a socket file in a temporary folder, and its schemas, one per test."""

    def __init__(self, binaries: str, folder: Path) -> None:
        self._binaries, self._folder = binaries, folder
        self._as = []  # the server refuses to run as root
        if os.getuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(folder, user.pw_uid, user.pw_gid)
            self._as = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        self._url = f"postgresql+psycopg://clawrl@/postgres?host={folder}"
        self._engine = create_engine(self._url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self._schemas = itertools.count()
        options = "--auth=trust --username=clawrl --encoding=UTF8 --locale=C --no-sync"
        self._run("initdb", *options.split(), "--pgdata", str(folder / "data")).check_returncode()

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [*self._as, f"{self._binaries}/{program}", *arguments]
        return subprocess.run(command, cwd=self._folder, capture_output=True, text=True, timeout=60)

    def start(self) -> None:
        command = [*self._as, f"{self._binaries}/postgres", "-D", str(self._folder / "data"), "-k", str(self._folder)]
        for setting in ("listen_addresses=", "fsync=off", "max_connections=50", "shared_buffers=16MB"):
            command += ["-c", setting]
        with (self._folder / "log").open("a") as log:
            self._process = subprocess.Popen(command, cwd=self._folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while True:
            try:
                return self._execute("SELECT 1")
            except OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "log").read_text()[-2000:]
                    raise RuntimeError(f"PostgreSQL did not start:\n{log}") from None
            time.sleep(0.05)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """SIGINT disconnects everybody and shuts down; SIGQUIT is a crash."""
        self._process.send_signal(number)
        self._process.wait(30)

    def fresh(self) -> str:
        """URL of an empty schema."""
        name = f"t{next(self._schemas)}"
        self._execute(f"CREATE SCHEMA {name}")
        return f"{self._url}&options=-csearch_path%3D{name}"

    def _execute(self, statement: str) -> None:
        with self._engine.connect() as connection:
            connection.execute(text(statement))
