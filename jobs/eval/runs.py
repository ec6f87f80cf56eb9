"""Whole runs of a job, one after the other, each a process of its own; one that was made is not made again.

    <run root>/eval-<verb>-<digest>/<arm>-<mark>-seed<N>/   result.json, once it has ended; log.txt; run directories

Knows how a job is started and the files it leaves (`jobs.train`, `jobs.demo`). Ignores what they say.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clawrl.errors import ClawrlError

RESULT = "result.json"
STOP_S = 60.0
"""How long a run that is told to stop may take."""


class RunFailed(ClawrlError):
    """A run that came to no end; the others go on."""


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
    fresh = folder / f".{RESULT}"
    fresh.write_text(json.dumps(result) + "\n", encoding="utf-8")
    fresh.replace(folder / RESULT)
    return result


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
