"""A private PostgreSQL of this test run's own, for all tests; nothing of the machine's is touched."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lacking import lacking

from jobs.chaos.postgres import Postgres, binaries, private_server

MEMORY = Path("/dev/shm")
"""Files in memory: a schema is a hundred of them, and the server, which syncs nothing, outlives no machine anyway."""


def pytest_configure() -> None:
    """What tests import stays until the end: the collector need not walk through a million objects time and again."""
    gc.disable()


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server; it is missing on some users' machines, never in CI."""
    if binaries() is None:
        lacking("no PostgreSQL here: no initdb in PATH")
    roomy = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 2 << 30
    with private_server(MEMORY if roomy else None) as server:
        yield server


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
