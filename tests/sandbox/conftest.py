"""The backends that the conformance suite runs on, with folders, a docker daemon and a plain user of its own."""

import os
import secrets
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import docker_daemon
import pytest
from lacking import lacking
from plain_user import Package, Remote

from envs.sandbox import SandboxSpec
from envs.sandbox.labels import remove_tree
from envs.sandbox.mapped import missing as no_namespaces
from envs.sandbox.namespaces import missing_bwrap

BACKENDS = ("bwrap", "bwrap-user", "docker", "unshare")
PLAIN_USER = 64321
MIB = 1 << 20
SECRET = f"secret-{secrets.token_hex(8)}"
"""In this process's environment, and in files of this machine; never to be seen inside."""


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A short path that everybody may pass through, as sandboxes of another user need it."""
    path = Path(tempfile.mkdtemp(prefix="clawrl-sandbox-", dir="/tmp"))
    path.chmod(0o755)
    yield path
    remove_tree(path)


@pytest.fixture(scope="session")
def home(folder: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLAWRL_SANDBOX_HOME", str(folder / "home"))
        patch.setenv("CLAWRL_TEST_SECRET", SECRET)
        patch.delenv("DOCKER_HOST", raising=False)
        yield folder / "home"
        left = list((folder / "home" / "boxes").glob("*"))
    assert not left, "sandboxes were left behind"


@pytest.fixture(scope="session")
def dockerd(folder: Path, home: Path) -> Iterator[str]:
    if why := docker_daemon.missing():
        lacking(why)
    (folder / "docker").mkdir()
    with docker_daemon.daemon(folder / "docker") as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", address)
        yield address


@pytest.fixture(scope="session")
def plain_user(folder: Path, home: Path) -> Iterator[Remote]:
    """The package in a process of a plain user, where this one is root's."""
    place = folder / "user"
    place.mkdir()
    place.chmod(0o777)
    environment = {**os.environ, "CLAWRL_SANDBOX_HOME": str(folder / "user-home"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, str(Path(__file__).with_name("plain_user.py")), str(place / "socket"), str(PLAIN_USER)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"serving\n"
        yield Remote(str(place / "socket"))
        process.kill()
    assert not list((folder / "user-home" / "boxes").glob("*")), "sandboxes were left behind"


class Backend:
    """Opens sandboxes of one backend; all are closed at the end."""

    def __init__(self, name: str, package: Any, folder: Path) -> None:
        self.name, self.package, self._folder = name, package, folder
        self._stack = ExitStack()

    @property
    def enforces(self) -> bool:
        """Whether every limit holds for the sandbox as a whole."""
        return self.name != "bwrap-user" and os.getuid() == 0

    def open(self, image: str = "base", run: str = "tests", **limits: Any) -> Any:
        given = {"memory": 256 * MIB, "pids": 64, "cpus": 1.0, "disk": 64 * MIB, "timeout": 30.0, **limits}
        given.setdefault("limits", "enforce" if self.enforces else "best_effort")
        sandbox = self.package.open_sandbox(SandboxSpec(image, **given), self.name.removesuffix("-user"), run)
        self._stack.callback(sandbox.close)
        return sandbox

    def place(self) -> Path:
        """A new folder of the host that this backend's user may write."""
        path = Path(tempfile.mkdtemp(dir=self._folder))
        path.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
        return path

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def backend_of(request: pytest.FixtureRequest, folder: Path, home: Path) -> Callable[[str], Backend]:
    def make(name: str) -> Backend:
        if name == "docker":
            request.getfixturevalue("dockerd")
            return Backend(name, Package(), folder)
        if name.startswith("bwrap") and (why := missing_bwrap()):
            lacking(why)
        if why := no_namespaces():
            lacking(why)
        if os.getuid() == 0 and name == "bwrap-user":
            return Backend(name, request.getfixturevalue("plain_user"), folder)
        if os.getuid() != 0 and name == "bwrap":
            pytest.skip("this is not root; bwrap-user shows the rest")
        return Backend(name, Package(), folder)

    return make


@pytest.fixture(scope="module", params=BACKENDS)
def shared(request: pytest.FixtureRequest, backend_of: Callable[[str], Backend]) -> Iterator[Backend]:
    """One after the other, each with all tests of a module."""
    backend = backend_of(request.param)
    yield backend
    backend.close()


@pytest.fixture
def backend(shared: Backend) -> Iterator[Backend]:
    """The backend; what a test opens of it is closed after the test."""
    own = Backend(shared.name, shared.package, shared._folder)
    yield own
    own.close()


@pytest.fixture(scope="module")
def sandbox(shared: Backend) -> Any:
    """One for all tests that leave nothing behind that matters."""
    return shared.open()
