"""Limits that the kernel holds for a whole sandbox: control groups, version 1 and 2.

Groups are made below the one this process is in, so that a limit on us goes on holding for what we start.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import get_ident

from clawrl.errors import SandboxError

CONTROLLERS = {"memory": "memory", "pids": "pids", "cpus": "cpu"}
"""Limit of a SandboxSpec → the controller that holds it."""

_PERIOD = 100_000


@cache
def version() -> str:
    """ "1", "2", or "none", as far as the three controllers go."""
    parents = _parents()
    return parents[0] if parents[1] else "none"


def _mounts(kind: str) -> list[tuple[Path, set[str]]]:
    """(mount point, options) of mounted control group trees."""
    with suppress(OSError):
        lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
        return [(Path(words[1]), set(words[3].split(","))) for words in lines if words[2] == kind]
    return []


@cache
def _parents() -> tuple[str, dict[str, Path]]:
    """(version, controller → the group of this process), for the controllers that there are."""
    own: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, names, path = line.split(":", 2)
            own |= dict.fromkeys(names.split(","), path)
    found: dict[str, Path] = {}
    for mount, options in _mounts("cgroup"):
        for controller in set(CONTROLLERS.values()) & options & own.keys():
            group = mount / own[controller].lstrip("/")
            found[controller] = group if group.is_dir() else mount
    if found:
        return "1", found
    for mount, _ in _mounts("cgroup2"):
        group = mount / own.get("", "/").lstrip("/")
        group = group if group.is_dir() else mount
        with suppress(OSError):
            there = set((group / "cgroup.controllers").read_text().split())
            return "2", dict.fromkeys(there & set(CONTROLLERS.values()), group)
    return "none", {}


@cache
def enforceable() -> frozenset[str]:
    """Limits that groups made here would hold: tried by making one."""
    kind, parents = _parents()
    held = set()
    for limit, controller in CONTROLLERS.items():
        if controller not in parents:
            continue
        group = parents[controller] / f"clawrl-probe-{os.getpid()}-{get_ident()}"  # threads may try at once
        with suppress(OSError):
            if kind == "2":
                _delegate(parents[controller], controller)
            group.mkdir()
            if any(group.glob(f"{controller}.*")):
                held.add(limit)
        with suppress(OSError):
            group.rmdir()
    return frozenset(held)


def _delegate(group: Path, controller: str) -> None:
    """Version 2 gives a controller to children only when told; refused while the group has processes of its own."""
    if controller not in (group / "cgroup.subtree_control").read_text().split():
        (group / "cgroup.subtree_control").write_text(f"+{controller}")


def settings(kind: str, limits: dict[str, float]) -> dict[str, list[tuple[str, str, bool]]]:
    """Controller → (file, value, whether it must be there), for limits in bytes, processes and processors."""
    first = kind == "1"
    found: dict[str, list[tuple[str, str, bool]]] = {}
    if "memory" in limits:
        value = str(int(limits["memory"]))
        found["memory"] = (
            [("memory.limit_in_bytes", value, True), ("memory.memsw.limit_in_bytes", value, False)]
            if first
            else [("memory.max", value, True), ("memory.swap.max", "0", False)]
        )
    if "pids" in limits:
        found["pids"] = [("pids.max", str(int(limits["pids"])), True)]
    if "cpus" in limits:
        quota = str(max(1000, int(limits["cpus"] * _PERIOD)))
        found["cpu"] = (
            [("cpu.cfs_period_us", str(_PERIOD), True), ("cpu.cfs_quota_us", quota, True)]
            if first
            else [("cpu.max", f"{quota} {_PERIOD}", True)]
        )
    return found


def planned(name: str, limits: dict[str, float]) -> list[Path]:
    """The groups that `make` would make."""
    kind, parents = _parents()
    return list(dict.fromkeys(parents[controller] / name for controller in settings(kind, limits)))


def make(name: str, limits: dict[str, float]) -> list[Path]:
    """Groups with these limits, to be entered by writing to their cgroup.procs. Raises SandboxError."""
    kind, parents = _parents()
    made: list[Path] = []
    try:
        for controller, files in settings(kind, limits).items():
            group = parents[controller] / name
            if kind == "2":
                _delegate(parents[controller], controller)
            group.mkdir(exist_ok=True)
            if group not in made:
                made.append(group)
            for file, value, needed in files:
                if needed or (group / file).exists():
                    (group / file).write_text(value)
    except (OSError, KeyError) as error:
        remove(made)
        raise SandboxError(f"limits {limits} could not be set in control groups: {error}") from None
    return made


def remove(groups: list[Path], seconds: float = 5.0) -> None:
    """Kill what is in the groups and remove them."""
    deadline = time.monotonic() + seconds
    for group in groups:
        while group.exists():
            with suppress(OSError):
                group.rmdir()
                break
            with suppress(OSError):
                for pid in (group / "cgroup.procs").read_text().split():
                    os.kill(int(pid), 9)
            if time.monotonic() > deadline:
                raise SandboxError(f"control group {group} could not be removed: processes in it do not end")
            time.sleep(0.001)
