"""Environments of their own for clients that do not fit beside clawrl's locked packages, Python's and npm's.

They are installed beside the tests that come before: that takes a minute or two, and is spent waiting for most of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lacking import lacking
from npm import OPENCLAW, SDKS, Npm

PACKAGES = ("langchain-openai==1.7.4", "litellm==1.110.2")
INSTALLING = pytest.StashKey[dict[str, "Future[Any]"]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to install what the selected tests ask for, one after the other."""
    asked = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    ways: dict[str, Callable[[pytest.TempPathFactory], Any]] = {
        "client_python": _virtual_environment,
        "npm": lambda folders: _installed(folders, SDKS),
        "openclaw": lambda folders: _installed(folders, OPENCLAW),
    }
    installing = ThreadPoolExecutor(1, "installing")
    folders: pytest.TempPathFactory = session.config._tmp_path_factory  # type: ignore[attr-defined]
    session.config.stash[INSTALLING] = {
        name: installing.submit(way, folders) for name, way in ways.items() if name in asked and not _listing(session)
    }
    installing.shutdown(wait=False)


def _listing(session: pytest.Session) -> bool:
    return bool(session.config.option.collectonly)


@pytest.fixture(scope="session")
def client_python(pytestconfig: pytest.Config) -> Path:
    """The interpreter of a fresh virtual environment that has them; skips where no package index can be reached."""
    return _ready(pytestconfig, "client_python")


@pytest.fixture(scope="session")
def npm(pytestconfig: pytest.Config) -> Npm:
    """Node.js with the SDKs; skips where npm cannot be reached."""
    return _ready(pytestconfig, "npm")


@pytest.fixture(scope="session")
def openclaw(pytestconfig: pytest.Config) -> Npm:
    """The same with OpenClaw."""
    return _ready(pytestconfig, "openclaw")


def _ready(config: pytest.Config, name: str) -> Any:
    """What was installed. A user may lack it; CI may not."""
    try:
        return config.stash[INSTALLING][name].result()
    except NotInstalled as reason:
        lacking(reason)


class NotInstalled(Exception):
    """Why it is not there."""


def _virtual_environment(folders: pytest.TempPathFactory) -> Path:
    folder = folders.mktemp("clients") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=300)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    ended = subprocess.run(install, capture_output=True, text=True, timeout=800)
    if ended.returncode != 0:
        raise NotInstalled(f"{', '.join(PACKAGES)} cannot be installed: {ended.stderr[-400:]}")
    return python


def _installed(folders: pytest.TempPathFactory, packages: Sequence[str]) -> Npm:
    """`CLAWRL_NPM_PREFIX` names a folder in which what npm installs (1 GB with OpenClaw) is kept from run to run."""
    kept = os.environ.get("CLAWRL_NPM_PREFIX")
    found = Npm(Path(kept) if kept else folders.getbasetemp() / "npm")
    found.prefix.mkdir(parents=True, exist_ok=True)
    if (reason := found.install(packages)) is not None:
        raise NotInstalled(reason)
    return found
