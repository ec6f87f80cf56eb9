"""The clawrl that faults are injected into: a `clawrl serve` of its own, its processes by their parts, its status.

Knows the command line and `/status`. Ends only what it started.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from jobs.bench import processes
from jobs.chaos.postgres import Postgres

READY_S = 240.0
BATCH = 8
OVERRIDES = ("gateway.replicas=2", f"buffer.batch_size={BATCH}", "trainer.learning_rate=1e-4")
"""Two doors, so that a request has somewhere to go when one dies; small batches, so that versions come quickly."""


class Target:
    """One system on `run_root`; `start` again goes on with the same run."""

    def __init__(self, run_root: Path, overrides: Sequence[str], database: Postgres | None = None) -> None:
        """With a `database` the journal is in a schema of its own there, else in the run's folder."""
        self.run_root, self.database = run_root, database
        self._journal = None if database is None else database.fresh()
        self._overrides = [*OVERRIDES, *overrides, *([] if database is None else [f"journal.url={self._journal}"])]
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
            self._process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
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

    def _family(self) -> list[tuple[psutil.Process, str]]:
        """The program and all that it started, with their parts."""
        assert self._process is not None
        return list(processes.family(psutil.Process(self._process.pid), "driver"))

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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
