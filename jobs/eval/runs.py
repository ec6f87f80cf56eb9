"""Whole runs of a job, each a process of its own, one after the other or over a Ray cluster; none is made twice.

    <run root>/eval-<verb>-<digest>/<arm>-<mark>-seed<N>/   result.json, once it has ended; log.txt; run directories

Knows how a job is started and the files it leaves (`jobs.train`, `jobs.demo`). Ignores what they say.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clawrl.errors import ClawrlError, ConfigError
from jobs import free_port

RESULT = "result.json"
STOP_S = 60.0
"""How long a run that is told to stop may take."""
OWN_RAY = ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "RAY_TMPDIR")
"""Settings of Ray's that are the user's."""


class RunFailed(ClawrlError):
    """A run that came to no end; the others go on."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run to make: its folder, the words of its command line, and what it is called where it is spoken of."""

    folder: Path
    job: str
    arguments: tuple[str, ...]
    label: str
    codes: Sequence[int] = (0,)
    cwd: Path = field(default_factory=Path.cwd)  # what paths in the arguments are relative to


def side_by_side(runs: Sequence[Run], each: Mapping[str, float]) -> Iterator[tuple[int, dict[str, Any] | RunFailed]]:
    """What comes of each run, by its place among them, as they end.

    As many are made at a time as have room on the Ray cluster at RAY_ADDRESS, or on one that is started on this
    machine; `each` takes so much of it (`CPU`, `GPU`, resources of its own). A run has the port that its machine gives
    it. Its log stays there, and its result comes here too. Raises ConfigError if no machine has so much.
    """
    import ray
    from ray.exceptions import RayError

    handler = signal.getsignal(signal.SIGTERM)
    with ray.init(address=os.environ.get("RAY_ADDRESS", "local"), logging_level=logging.ERROR):
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own in the place of the program's
        _require_room([node["Resources"] for node in ray.nodes() if node["Alive"]], each)
        others = {name: amount for name, amount in each.items() if name not in ("CPU", "GPU")}
        task = ray.remote(_make_there).options(
            num_cpus=each.get("CPU", 1), num_gpus=each.get("GPU", 0), resources=others, max_retries=0
        )
        waiting = {task.remote(run): number for number, run in enumerate(runs)}
        while waiting:
            (ended,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(ended)
            try:
                result = ray.get(ended)
            except RayError as error:
                yield number, RunFailed(str(getattr(error, "cause", None) or error).strip().splitlines()[-1])
            else:
                runs[number].folder.mkdir(parents=True, exist_ok=True)
                _keep(runs[number].folder, result)
                yield number, result


def _require_room(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> None:
    if not any(all(node.get(name, 0) >= amount for name, amount in each.items()) for node in nodes):
        wanted = ",".join(f"{name}={amount:g}" for name, amount in each.items())
        most = {name: max(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        raise ConfigError(
            f"--parallel {wanted}: no machine of the cluster has so much (the largest: CPU={most['CPU']:g}, "
            f"GPU={most['GPU']:g}); ask for less"
        )


def _make_there(run: Run) -> dict[str, Any]:
    """Ray task. What its process says of Ray is the cluster's, and not that of the run, which starts its own."""
    for name in [name for name in os.environ if name.startswith("RAY_") and name not in OWN_RAY]:
        del os.environ[name]
    arguments = [*run.arguments, f"gateway.port={free_port()}"]
    os.chdir(run.cwd)
    return make_run(run.folder, run.job, arguments, prefixed(run.label), run.codes)


def prefixed(label: str) -> Callable[[str], None]:
    """What says a run's lines to whoever looks on, each with the run's name before it."""
    return lambda line: print(f"[{label}] {line}", file=sys.stderr, flush=True)


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a run that was made before has left, or None. Half a file, as a full disk leaves it, is none."""
    try:
        return json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def make_run(
    folder: Path, job: str, arguments: Sequence[str], say: Callable[[str], None], codes: Sequence[int] = (0,)
) -> dict[str, Any]:
    """One run of a job to its end; `say` gets its lines. Raises RunFailed, with its last words, for no exit code of
    `codes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    load, started = os.getloadavg()[0], time.time()
    command = [sys.executable, "-m", job, *arguments, f"run_root={folder}"]
    last = ""
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                log.flush()
                if line.strip():
                    last = line.rstrip()
                    say(last)
            code = process.wait()
        finally:
            _end(process)
    written = folder / "latest" / "report.json"
    if code not in codes or (code and not (written.exists() and written.stat().st_mtime >= started)):
        raise RunFailed(f"exit code {code}: {last.strip() or 'no word'}")
    try:
        report = json.loads(written.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFailed(f"it left no report: {error}") from error
    result = {
        "report": report,
        "run": (folder / "latest").resolve().name,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(time.time() - started, 1),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }
    _keep(folder, result)
    return result


def _keep(folder: Path, result: Mapping[str, Any]) -> None:
    fresh = folder / f".{RESULT}"
    fresh.write_text(json.dumps(result) + "\n", encoding="utf-8")
    fresh.replace(folder / RESULT)


def _end(process: subprocess.Popen[str]) -> None:
    """Stop a run whose reader is going: it takes its system down, or is ended by force, with all of its session."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """A run does not go on, and hold its port, when the evaluation was killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def commit() -> str:
    """What the program is: the commit, and a digest of what differs from it; `unknown` outside a checkout."""
    here = Path(__file__).parent
    asked = {"cwd": here, "capture_output": True, "check": True}
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **asked).stdout.decode().strip()
        changed = subprocess.run(["git", "diff", "HEAD", "--", ":/"], **asked).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+{hashlib.sha256(changed).hexdigest()[:6]}" if changed else head
