"""A Python interpreter that stays, in a sandbox: code in, text out. What it lost, it says.

Knows the sandbox and the marker after a cell's output. Ignores tasks. What comes back is hostile code's text, no more.
"""

from __future__ import annotations

import json
import secrets
import time
from contextlib import suppress
from pathlib import Path

from clawrl.errors import EnvError, SandboxError
from envs.sandbox import MAX_OUTPUT, HeadTail, Process, Sandbox, exchange

CELLS = Path(__file__).with_name("cells.py")
PLACE = "/opt/cells.py"
GRACE_S = 2.0
"""Beyond its time, for a cell that is stopped inside; then the interpreter is killed."""
START_S = 30.0


class Interpreter:
    """Names stay from cell to cell. `memory`: bytes that the process may have, beyond which it gets MemoryError."""

    def __init__(self, sandbox: Sandbox, memory: int) -> None:
        """Raises EnvError if no Python starts in the sandbox."""
        self._sandbox, self._memory = sandbox, memory
        self._process: Process | None = None
        self._begin()
        said, found = self._ask("", START_S)
        if not found or said:
            self.close()
            raise EnvError(
                f"python: no interpreter starts in this sandbox ({said[-500:] or 'it says nothing'}); "
                "its image needs python on the PATH"
            )

    def run(self, code: str, seconds: float) -> str:
        """What the cell wrote, and the value of its last expression. An end of the interpreter is told in it."""
        try:
            said, found = self._ask(code, seconds)
        except SandboxError as error:
            said, found = str(error), False
        if found:
            return said or "[no output]"
        why = self._end()
        self.close()
        self._begin()
        lost = f"[{why}; a new one was started, and what was defined before is lost]"
        return f"{said}\n{lost}".lstrip("\n")

    def close(self) -> None:
        if self._process is not None:
            with suppress(SandboxError):
                self._process.kill()
            self._process.close()
            self._process = None

    def _begin(self) -> None:
        """In the sandbox as it is; if that is broken, in a fresh one."""
        command = ["python", PLACE, str(self._memory)]
        try:
            self._sandbox.put({PLACE: CELLS})
            self._process = self._sandbox.start(command)
        except SandboxError:
            self._sandbox.reset()
            self._sandbox.put({PLACE: CELLS})
            self._process = self._sandbox.start(command)

    def _ask(self, code: str, seconds: float) -> tuple[str, bool]:
        """(what came, whether the cell came to its end)."""
        assert self._process is not None
        token = secrets.token_hex(16)
        marker = f"\n{token}\n".encode()
        kept, recent = HeadTail(MAX_OUTPUT), b""

        def heard(stream: int, data: bytes) -> bool:
            nonlocal recent
            kept.add(data)
            recent = (recent + data)[-(len(data) + len(marker)) :]
            return marker in recent

        line = json.dumps({"code": code, "seconds": seconds, "marker": token}).encode() + b"\n"
        exchange(self._process, line, time.monotonic() + seconds + GRACE_S, heard, close_input=False)
        said, found, _ = kept.text().partition(marker.decode())
        return said.rstrip("\n"), bool(found)

    def _end(self) -> str:
        assert self._process is not None
        if not self._process.ended():
            return "the interpreter did not stop in time and was killed"
        try:
            return f"the interpreter ended with exit status {self._process.code()}"
        except SandboxError:
            return "the interpreter's sandbox broke"
