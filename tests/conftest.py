"""A private PostgreSQL of this test run's own, for all tests; nothing of the machine's is touched."""

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool


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
                    pytest.fail(f"PostgreSQL did not start:\n{(self._folder / 'log').read_text()[-2000:]}")
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


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server; it is missing on some users' machines, never in CI."""
    found = shutil.which("initdb") or next(iter(sorted(glob("/usr/lib/postgresql/*/bin/initdb"))[::-1]), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("no PostgreSQL here: no initdb in PATH")
    folder = Path(tempfile.mkdtemp(prefix="clawrl-pg-"))
    try:
        server = Postgres(str(Path(found).resolve().parent), folder)
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Each call gives the URL of an empty database of one kind; the test runs once per kind."""
    if request.param == "postgresql":
        return request.getfixturevalue("postgres").fresh
    names = (tmp_path / name for name in ("journal.sqlite", "another.sqlite", "third.sqlite"))
    return lambda: f"sqlite:///{next(names)}"


@pytest.fixture
def url(new_database: Callable[[], str]) -> str:
    """URL of an empty database of either kind."""
    return new_database()
