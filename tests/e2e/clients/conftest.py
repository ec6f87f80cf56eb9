"""Environments of their own for clients that do not fit beside clawrl's locked packages, Python's and npm's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from npm import OPENCLAW, SDKS, Npm

PACKAGES = ("langchain-openai==1.7.4", "litellm==1.110.2")


@pytest.fixture(scope="session")
def client_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh virtual environment that has them; skips where no package index can be reached."""
    folder = tmp_path_factory.mktemp("clients") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
    ended = subprocess.run(install, capture_output=True, text=True, timeout=500)
    if ended.returncode != 0:
        _without(f"{', '.join(PACKAGES)} cannot be installed: {ended.stderr[-400:]}")
    return python


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`CLAWRL_NPM_PREFIX` names a folder in which what npm installs (1 GB with OpenClaw) is kept from run to run."""
    kept = os.environ.get("CLAWRL_NPM_PREFIX")
    return Path(kept) if kept else tmp_path_factory.mktemp("npm")


@pytest.fixture(scope="session")
def npm(prefix: Path) -> Npm:
    """Node.js with the SDKs; skips where npm cannot be reached."""
    return _installed(prefix, SDKS)


@pytest.fixture(scope="session")
def openclaw(prefix: Path) -> Npm:
    """The same with OpenClaw."""
    return _installed(prefix, OPENCLAW)


def _installed(prefix: Path, packages: Sequence[str]) -> Npm:
    found = Npm(prefix)
    reason = found.install(packages)
    if reason is not None:
        _without(reason)
    return found


def _without(reason: str) -> NoReturn:
    """A user may lack it; CI may not."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
