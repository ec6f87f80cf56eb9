"""The faults: each is done to a running target under load and returns the moment it struck.

fault(target) ──► Struck: when, and what; the target heals by itself, or by what the fault does next
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

from jobs.chaos.audit import newest_ahead
from jobs.chaos.clock import wait_until_seen
from jobs.chaos.postgres import Postgres
from jobs.chaos.target import Setting, Target

SHARED = Setting()
HANGING_JUDGE = Setting("hanging judge", overrides=("judge.timeout_s=5",))
SMALL_DISK = Setting("small disk", disk_mib=900)
OWN_CLOCK = Setting("clock of its own", own_clock=True)
TWO_NODES = Setting(
    "two nodes", overrides=("policy.replicas=2", "judge.votes=1", "buffer.max_lag=1000"), nodes=2
)  # a second policy leaves the judge little of a small machine: it votes once, and what waited for it still trains


@dataclass(frozen=True, slots=True)
class Struck:
    """When a fault struck, in seconds since the epoch, and the parts of the system that it took."""

    at: float
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done, and whether something of the same kind lives on meanwhile (then no new request may fail)."""

    name: str
    strike: Callable[[Target], Struck]
    survivor: bool = True
    setting: Setting = SHARED
    database: Literal["sqlite", "private"] | None = None  # the only one it can be done to


def kill(part: str, index: int = 0) -> Callable[[Target], Struck]:
    """kill -9 of the part's process number `index`, oldest first."""

    def strike(target: Target) -> Struck:
        process = target.processes(part)[index]
        process.kill()
        return Struck(time.time(), (part,))

    return strike


def kill_application(target: Target) -> Struck:
    """kill -9 of everything, then a start on the same run."""
    target.kill_all()
    struck = time.time()
    target.start()
    return Struck(struck)


def tear_last_page(target: Target) -> Struck:
    """As after a power cut in the middle of a write: half a page of noise behind the last whole frame of the WAL."""
    target.kill_all()
    struck = time.time()
    wal = target.run_directory / "journal.sqlite-wal"
    with wal.open("ab") as file:
        file.write(os.urandom(2048))
    target.start()
    return Struck(struck)


def restart_database(target: Target) -> Struck:
    """PostgreSQL crashes (SIGQUIT: every connection cut, no clean shutdown) and starts again two seconds later."""
    assert isinstance(target.database, Postgres)
    target.database.stop(signal.SIGQUIT)
    struck = time.time()
    time.sleep(2)
    target.database.start()
    return Struck(struck)


def hang_judge(target: Target) -> Struck:
    """The judge's engine stops for ever, alive but silent (SIGSTOP)."""
    process = target.processes("judge engine core")[0]
    process.send_signal(signal.SIGSTOP)
    return Struck(time.time())


def fill_disk(target: Target) -> Struck:
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
    return Struck(struck)


def jump(hours: int) -> Callable[[Target], Struck]:
    """The wall clock of all the system's processes is set, and is seen in the journal to have been."""

    def strike(target: Target) -> Struck:
        assert target.clock is not None
        target.clock.set(3600 * hours)
        struck = time.time()
        wait_until_seen(lambda: newest_ahead(target.journal), 3600 * hours)
        return Struck(struck)

    return strike


def restart_program(target: Target) -> Struck:
    """`clawrl serve` dies in a cluster that goes on, and Ray Serve with it; then it is started again."""
    target.kill_program()
    struck = time.time()
    target.start()
    return Struck(struck, ("driver",))


def lose_node(target: Target) -> Struck:
    """The second node dies: kill -9 of its raylet and of all that runs there.

    Raises RuntimeError unless policy replicas run on both nodes: else nothing of the system, or no survivor, would.
    """
    assert target.cluster is not None
    lost = target.cluster.node(1)
    there = {process.pid for process in lost}
    if len({process.pid in there for process in target.processes("policy")}) != 2:
        raise RuntimeError("the policy replicas are all on one node; run the fault again")
    parts = target.parts(lost)
    for process in lost:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return Struck(time.time(), parts)


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
        Fault("database restart", restart_database, database="private"),
        Fault("judge hangs", hang_judge, setting=HANGING_JUDGE),
        Fault("disk full", fill_disk, survivor=False, setting=SMALL_DISK, database="sqlite"),
        Fault("clock an hour ahead", jump(1), setting=OWN_CLOCK),
        Fault("clock two hours back", jump(-1), setting=OWN_CLOCK),
        Fault("program in a cluster", restart_program, survivor=False, setting=TWO_NODES),
        Fault("second node", lose_node, setting=TWO_NODES),
    )
}
