"""The processes of a running system: which part of it each one is, its processor time and its memory.

Knows how Ray and vLLM name their processes. Everything that descends from this process counts.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil

CLIENT = "client (bench)"
_RAY = (
    "raylet",
    "gcs_server",
    "ray::ServeController",
    "agent",
    "Agent",
    "Preemption",
    "log_monitor",
    "monitor.py",
    "runtime_env",
)


def role(title: str, parent: str | None) -> str:
    """The part of the system that a process with this command line is; `parent` is its parent's part."""
    if title.startswith("VLLM::"):
        return f"{parent or '?'} {'engine core' if 'EngineCore' in title else 'worker'}".replace(" engine core ", " ")
    if title.startswith("ray::ServeReplica"):
        return title.split(":")[-1].split()[0].split(".")[0]
    if title.startswith("ray::Proxy"):
        return "http proxy"
    if any(name in title for name in _RAY):
        return "ray"
    if title.startswith("ray::IDLE"):
        return "ray idle workers"
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split(".")[0].split("(")[0].split()[0]
    return f"{parent} helper" if parent and parent not in (CLIENT, "ray") and "helper" not in parent else parent or "?"


class Meter:
    """Processor seconds of each part between its start and `stop`, its own readings not counted."""

    def __init__(self) -> None:
        self._before = _processor_seconds()
        self._own = time.process_time()

    def stop(self) -> dict[str, float]:
        """Seconds by part; a process that appeared since counts from its own start."""
        own = time.process_time() - self._own
        spent: defaultdict[str, float] = defaultdict(float)
        for key, seconds in _processor_seconds().items():
            spent[key[1]] += seconds - self._before.get(key, 0.0)
        spent[CLIENT] = own
        return spent


def _processor_seconds() -> dict[tuple[int, str], float]:
    """User and system seconds that each process has used, by (pid, part)."""
    used: dict[tuple[int, str], float] = {}
    for process, name in family(psutil.Process(), CLIENT):
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        used[process.pid, name] = times.user + times.system
    return used


def memory() -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by part: proportional (shared pages divided among their users) and resident (counted for each)."""
    proportional: defaultdict[str, int] = defaultdict(int)
    resident: defaultdict[str, int] = defaultdict(int)
    for process, name in family(psutil.Process(), CLIENT):
        try:
            proportional[name] += _proportional_bytes(process.pid)
            resident[name] += process.memory_info().rss
        except (psutil.Error, OSError):
            continue
    return proportional, resident


def _proportional_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def family(root: psutil.Process, name: str) -> Iterator[tuple[psutil.Process, str]]:
    """A process, which is the part `name`, and its descendants with their parts, parents first."""
    waiting: list[tuple[psutil.Process, str | None]] = [(root, None)]
    while waiting:
        process, parent = waiting.pop()
        try:
            part = name if parent is None else role(" ".join(process.cmdline()), parent)
            waiting += [(child, part) for child in process.children()]
        except psutil.Error:
            continue
        yield process, part
