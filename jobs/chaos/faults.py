"""The faults: each is done to a running target under load and returns the moment it struck.

fault(target) ──► seconds since the epoch; the target heals by itself, or by what the fault does next
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jobs.chaos.target import Target


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done, and whether something of the same kind lives on meanwhile (then no new request may fail)."""

    name: str
    strike: Callable[[Target], float]
    survivor: bool = True
    overrides: tuple[str, ...] = ()  # of a system of its own
    small_disk: bool = False
    database: Literal["sqlite", "postgresql"] | None = None  # the only one it means something for

    @property
    def alone(self) -> bool:
        """Whether it needs a system of its own."""
        return bool(self.overrides) or self.small_disk


def kill(part: str, index: int = 0) -> Callable[[Target], float]:
    """kill -9 of the part's process number `index`, oldest first."""

    def strike(target: Target) -> float:
        process = target.processes(part)[index]
        process.kill()
        return time.time()

    return strike


def kill_application(target: Target) -> float:
    """kill -9 of everything, then a start on the same run."""
    target.kill_all()
    struck = time.time()
    target.start()
    return struck


def tear_last_page(target: Target) -> float:
    """As after a power cut in the middle of a write: half a page of noise behind the last whole frame of the WAL."""
    target.kill_all()
    struck = time.time()
    wal = target.run_directory / "journal.sqlite-wal"
    with wal.open("ab") as file:
        file.write(os.urandom(2048))
    target.start()
    return struck


def restart_database(target: Target) -> float:
    """PostgreSQL crashes (SIGQUIT: every connection cut, no clean shutdown) and starts again two seconds later."""
    assert target.database is not None
    target.database.stop(signal.SIGQUIT)
    struck = time.time()
    time.sleep(2)
    target.database.start()
    return struck


def hang_judge(target: Target) -> float:
    """The judge's engine stops for ever, alive but silent (SIGSTOP)."""
    process = target.processes("judge engine core")[0]
    process.send_signal(signal.SIGSTOP)
    return time.time()


def fill_disk(target: Target) -> float:
    """Not a byte left where the run is written, for ten seconds."""
    filler = target.run_root / "filler"
    struck = time.time()
    with filler.open("wb") as file:
        with suppress(OSError):  # no space left, which is what this is for
            while True:
                file.write(b"\0" * 2**16)
                file.flush()
        time.sleep(10)
    filler.unlink()
    return struck


@contextmanager
def small_disk(folder: Path, mib: int = 900) -> Iterator[Path]:
    """A file system of its own on `folder` (tmpfs; needs root). Raises PermissionError where it may not be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(f"cannot mount a tmpfs on {folder}: {done.stderr.strip()}; run as root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


FAULTS = {
    fault.name: fault
    for fault in (
        Fault("gateway replica", kill("gateway")),
        Fault("policy replica", kill("policy"), survivor=False),
        Fault("policy engine", kill("policy engine core"), survivor=False),
        Fault("judge replica", kill("judge")),
        Fault("judge engine", kill("judge engine core")),
        Fault("collector", kill("Collector")),
        Fault("journal", kill("Journal")),
        Fault("buffer", kill("ReplayBuffer")),
        Fault("weight store", kill("WeightStore")),
        Fault("trainer rank 0", kill("RayTrainWorker", 0)),
        Fault("trainer rank 1", kill("RayTrainWorker", 1)),
        Fault("train controller", kill("TrainController")),
        Fault("serve controller", kill("ray::ServeController")),
        Fault("application", kill_application, survivor=False),
        Fault("torn last page", tear_last_page, survivor=False, database="sqlite"),
        Fault("database restart", restart_database, database="postgresql"),
        Fault("judge hangs", hang_judge, overrides=("judge.timeout_s=5",)),
        Fault("disk full", fill_disk, survivor=False, small_disk=True, database="sqlite"),
    )
}
