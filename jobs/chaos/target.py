"""The clawrl that faults are injected into: a `clawrl serve` of its own, its processes by their parts, its status.

Knows the command line, `/status`, and what a system may stand on: a small disk, a clock of its own, a cluster. Ends
only what it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from jobs import free_port
from jobs.bench import processes
from jobs.chaos.clock import Clock
from jobs.chaos.cluster import Cluster, local_cluster
from jobs.chaos.postgres import Postgres, Schemas

READY_S = 240.0
BATCH = 8
OVERRIDES = ("gateway.replicas=2", f"buffer.batch_size={BATCH}", "trainer.learning_rate=1e-4")
"""Two doors, so that a request has somewhere to go when one dies; small batches, so that versions come quickly."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a system that is to suffer faults runs on; faults of the same setting are done to one system."""

    name: str = "shared system"
    overrides: tuple[str, ...] = ()
    disk_mib: int | None = None  # a file system of its own
    own_clock: bool = False
    nodes: int = 0  # of a Ray cluster on this machine that it joins; 0: it starts Ray itself


@contextmanager
def prepared(setting: Setting, folder: Path, database: Postgres | Schemas | None) -> Iterator[Target]:
    """A system of this setting, not started yet; what it stands on is gone afterwards."""
    root = folder / setting.name.replace(" ", "-")
    with ExitStack() as stack:
        if setting.disk_mib is not None:
            stack.enter_context(small_disk(root, setting.disk_mib))
        cluster = None
        if setting.nodes:
            folder.mkdir(parents=True, exist_ok=True)
            cluster = stack.enter_context(local_cluster(setting.nodes, folder / f"{root.name}-ray.log"))
        yield Target(
            root, setting, database, cluster, Clock(folder / f"{root.name}-clock") if setting.own_clock else None
        )


class Target:
    """One system on `run_root`; `start` again goes on with the same run."""

    def __init__(
        self,
        run_root: Path,
        setting: Setting,
        database: Postgres | Schemas | None = None,
        cluster: Cluster | None = None,
        clock: Clock | None = None,
    ) -> None:
        """With a `database` the journal is in a schema of its own there, else in the run's folder."""
        self.run_root, self.database, self.cluster, self.clock = run_root, database, cluster, clock
        self._journal = None if database is None else database.fresh()
        self._overrides = [*OVERRIDES, *setting.overrides]
        if self._journal is not None:
            self._overrides.append(f"journal.url={self._journal}")
        self._environment = dict(os.environ)
        for surroundings in (cluster, clock):
            self._environment |= {} if surroundings is None else surroundings.environment
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen | None = None

    @property
    def run_directory(self) -> Path:
        return (self.run_root / "latest").resolve()

    @property
    def journal(self) -> str:
        """SQLAlchemy's URL of the run's journal."""
        return self._journal or f"sqlite:///{self.run_directory / 'journal.sqlite'}"

    def start(self) -> None:
        """`clawrl serve`; returns when chat is served. Raises RuntimeError with the end of its log if it is not."""
        self.run_root.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "clawrl.cli", "serve", f"gateway.port={self.port}"]
        command += [f"run_root={self.run_root}", *self._overrides]
        log = self.run_root.parent / f"{self.run_root.name}.log"
        with log.open("a") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=out, start_new_session=True, env=self._environment
            )
        deadline = time.monotonic() + READY_S
        while not self.healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"clawrl serve did not come up; {log} ends with:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ctrl-C, and SIGKILL for what is left after a while."""
        if self._process is None:
            return
        family = self._family()
        if self.cluster is not None:  # its nodes are not the program's
            family = [each for each in family if each[1] == "driver"]
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        _kill([process for process, _ in family])

    def kill_all(self) -> list[str]:
        """kill -9 of every process at once; returns the parts of those that had to be killed a second time."""
        family = self._family()
        _kill([process for process, _ in family])
        assert self._process is not None
        self._process.wait(10)
        return [name for process, name in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]

    def kill_program(self) -> None:
        """kill -9 of `clawrl serve` alone; what it started in a cluster goes on, or not, as Ray has it."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(10)

    def processes(self, part: str) -> list[psutil.Process]:
        """The processes of a part (see `bench.processes.role`) or with a title that begins so, oldest first."""
        found = [
            process
            for process, name in self._family()
            if name == part or (process.is_running() and " ".join(process.cmdline()).startswith(part))
        ]
        if not found:
            raise RuntimeError(f"no process of {part!r} runs")
        return sorted(found, key=lambda process: process.create_time())

    def parts(self, of: Iterable[psutil.Process]) -> tuple[str, ...]:
        """The parts of the system that these processes are, Ray's own left out."""
        known = {process.pid: name for process, name in self._family()}
        found = {known.get(process.pid, "ray") for process in of}
        return tuple(sorted(name for name in found if "ray" not in name.split()))

    def _family(self) -> list[tuple[psutil.Process, str]]:
        """The program and all that it started, with their parts; in a cluster, all that runs on its nodes."""
        assert self._process is not None
        roots = [] if self._process.poll() is not None else [(psutil.Process(self._process.pid), "driver")]
        if self.cluster is not None:
            roots += [(process, "ray") for process in self.cluster.processes()]
        return [member for root, name in roots for member in processes.family(root, name)]

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/healthz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def status(self) -> dict[str, Any] | None:
        """`/status`, or None while the gateway or one of those it asks does not answer."""
        try:
            status = httpx.get(f"{self.url}/status", timeout=5).raise_for_status().json()
        except (httpx.HTTPError, ValueError):
            return None
        return None if any("error" in facts for facts in status.values()) else status


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[None]:
    """A file system of its own on `folder` (tmpfs; needs root). Raises PermissionError where it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"cannot mount a tmpfs on {folder}: {done.stderr.strip()}; run as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)
