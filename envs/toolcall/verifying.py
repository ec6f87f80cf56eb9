"""Verdicts on answers, in a process of their own: `python -m envs.toolcall.verifying` reads questions, gives scores.

    {"source": "gcd", "seed": 7, "answer": "12"} ─► {"score": 1.0}
    {"gold": "12/7", "answer": "\\\\frac{12}{7}"} ─► {"score": 1.0}

An answer may be made to take for ever or all memory; so the process has limits, and is replaced when it is slow. It has
nothing to do with the sandbox where the model's code runs. reasoning-gym's own score_answer, and math-verify.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from typing import Any

from clawrl.errors import EnvError
from envs.toolcall.problems import entry_of

SECONDS = 10.0
START_S = 60.0
MEMORY = 4 << 30
MAX_ANSWER = 20_000
"""Characters; a longer answer is none."""


class Verifier:
    """Shared by all environments of a process; asked by one at a time. It ends with this process."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def score(self, answer: str, **question: Any) -> float:
        """In [0, 1]; 0 for an answer that cannot be judged in time. Raises EnvError if nothing can be judged at all."""
        if len(answer) > MAX_ANSWER:
            return 0.0
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._begin()
            found = self._ask({**question, "answer": answer}, SECONDS)
            if found is None:
                self.close()
                return 0.0
        if "error" in found:
            raise EnvError(found["error"])
        return min(1.0, max(0.0, float(found["score"])))

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _begin(self) -> None:
        command = [sys.executable, "-m", "envs.toolcall.verifying"]
        path = os.pathsep.join(filter(None, sys.path))
        self._child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip
        if self._ask({}, START_S) is None:
            self.close()
            raise EnvError("answers cannot be verified: python -m envs.toolcall.verifying does not start")

    def _ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """None if no answer came in time."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(question).encode() + b"\n")
            child.stdin.flush()
        except OSError:
            return None
        deadline, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            if not select.select([child.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            if not (data := os.read(child.stdout.fileno(), 65536)):
                return None
            line += data
        return json.loads(line)


VERIFIER = Verifier()


def judge(question: dict[str, Any]) -> dict[str, Any]:
    """{"score": …}, or {"error": …} if the fault is not the answer's."""
    if not question:
        return {}
    try:
        if "gold" in question:
            return {"score": _equal(question["gold"], question["answer"])}
        dataset, entry = entry_of(question["source"], question["seed"])
    except (EnvError, ImportError) as error:
        return {"error": str(error)}
    try:
        return {"score": float(dataset.score_answer(question["answer"], entry))}
    except Exception:  # many data sets parse the answer and let it fail
        return {"score": 0.0}


def _equal(gold: str, answer: str) -> float:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise EnvError(
            "math-verify is not installed, and answers are verified by it; pip install 'clawrl[tools]'"
        ) from None
    wanted = parse(f"${gold}$", raise_on_error=False)
    if not wanted:
        raise EnvError(f"the answer {gold!r} of a problem is nothing that math-verify can read; correct the problem")
    given = [answer] if "$" in answer or "\\boxed" in answer else [f"${answer}$", answer]
    return float(any(verify(wanted, parse(each, raise_on_error=False), raise_on_error=False) for each in given))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a package prints is no verdict
    for line in sys.stdin:
        out.write(json.dumps(judge(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
