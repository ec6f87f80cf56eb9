"""How long sandboxes take to start and commands to run in them, the backends of this machine side by side.

Each round measures every backend once, so that a drift of the machine touches all alike. What is cached (image layers)
is made before. `process` isolates nothing: it is what the same acts cost without a sandbox.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clawrl.errors import SandboxError
from envs.sandbox import BACKENDS, SandboxSpec, close_run, open_sandbox
from envs.sandbox.opening import refusal
from jobs.bench.figures import Figure

RUN = "bench-sandbox"
ACTS = ("start", "exec", "shell", "command", "put", "fork", "reset", "close")
_FILES = {f"bench/{number}.txt": b"x" * 1000 for number in range(20)}


def measure(*, rounds: int, commands: int, together: int) -> tuple[list[Figure], dict[str, Any]]:
    """Figures in milliseconds, the median over rounds, by backend; and how long `together` sandboxes take to be up."""
    spec = SandboxSpec("base", limits="best_effort")
    refused = {name: why for name in BACKENDS if (why := refusal(name, spec)) is not None}
    names = [name for name in BACKENDS if name not in refused]
    if not names:
        raise SandboxError(f"no backend works here: {refused}")
    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in names}
    unenforced = {}
    for name in names:
        with open_sandbox(spec, name, RUN) as sandbox:
            unenforced[name] = sandbox.unenforced
    try:
        for _ in range(rounds):
            for name in names:
                _round(spec, name, commands, times[name])
        crowds = {name: _crowd(spec, name, together) for name in names if name != "process"}
    finally:
        close_run(RUN)
    figures = [
        Figure(f"{act}: {name}", 1e3 * statistics.median(times[name][act]), "ms") for act in ACTS for name in names
    ]
    figures += [Figure(f"{together} up: {name}", seconds, "s") for name, seconds in crowds.items()]
    return figures, {"seconds": times, "refused": refused, "unenforced": unenforced}


def _round(spec: SandboxSpec, name: str, commands: int, times: dict[str, list[float]]) -> None:
    """One sandbox's life; a command's time is the mean over many in one shell."""

    @contextmanager
    def timed(act: str, number: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        yield
        times[act].append((time.perf_counter() - started) / number)

    with timed("start"):
        sandbox = open_sandbox(spec, name, RUN)
    try:
        with timed("exec"):
            sandbox.exec("true")
        with timed("shell"):
            shell = sandbox.shell()
        with timed("command", commands):
            for _ in range(commands):
                shell.run("true")
        shell.close()
        with timed("put"):
            sandbox.put(_FILES, at="/")
        with timed("fork"):
            other = sandbox.fork()
        other.close()
        with timed("reset"):
            sandbox.reset()
    finally:
        with timed("close"):
            sandbox.close()


def _crowd(spec: SandboxSpec, name: str, number: int) -> float:
    """Seconds until so many sandboxes, started one after the other, have all answered."""
    started = time.perf_counter()
    opened = []
    try:
        for _ in range(number):
            opened.append(open_sandbox(spec, name, RUN))
            opened[-1].exec("true")
        return time.perf_counter() - started
    finally:
        for each in opened:
            each.close()
