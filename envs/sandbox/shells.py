"""A shell that stays: commands go in as text, a random marker after each tells its end and its exit status.

Works over any Process. Without a pty the shell reads a pipe; with one it is a terminal session.
"""

from __future__ import annotations

import base64
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable
from textwrap import wrap

from clawrl.errors import SandboxError
from envs.sandbox.base import Shell
from envs.sandbox.spec import MAX_OUTPUT, ExecResult
from envs.sandbox.streams import HeadTail, Process, exchange

Resize = Callable[[int, int], None]

START = 20.0
AFTERMATH = 5.0
"""Seconds a shell may take to start, and to speak again after its command was killed."""

_PROGRAM = "if command -v bash >/dev/null 2>&1; then exec bash {bash}; fi; exec sh {sh}"
PLAIN = "exec 2>&1; " + _PROGRAM.format(bash="--norc --noprofile", sh="")
TERMINAL = _PROGRAM.format(bash="--norc --noprofile --noediting -i", sh="-i")
"""What starts the shell inside: bash where there is one, else sh."""

_QUIET = "stty -echo 2>/dev/null; PS2="
_LONGEST = 1000  # bytes of one line; a terminal holds 4095


class LiveShell(Shell):
    """Over a process that runs PLAIN or TERMINAL."""

    def __init__(self, process: Process, timeout: float, *, pty: bool, resize: Resize | None = None) -> None:
        self._process, self._timeout, self._pty, self._resize = process, timeout, pty, resize
        self._marker: re.Pattern[bytes] | None = None
        self._screen, self._window = HeadTail(MAX_OUTPUT), b""
        self._status: int | None = None
        self._lock, self._closed = threading.RLock(), False
        if not self._say(_QUIET if pty else "", START):
            said = self._screen.text().strip()
            broken = None
            try:
                process.code()
            except SandboxError as error:
                broken = error
            self.close()
            raise broken or SandboxError(f"no shell started, has the image /bin/sh? It said: {said or 'nothing'}")
        self._screen = HeadTail(MAX_OUTPUT)

    def run(self, command: str, timeout: float | None = None, max_output: int = MAX_OUTPUT) -> ExecResult:
        started = time.monotonic()
        with self._lock:
            if not self.alive:
                raise SandboxError("this shell has ended; open another")
            if self.busy:
                raise SandboxError("a command still runs in this terminal; send keys (Ctrl-C is \\x03), or read on")
            self._screen = HeadTail(max_output)
            ended = self._say(_wrapped(command, self._pty), timeout or self._timeout)
            timed_out = not ended and self.alive
            if timed_out and not self._pty:
                self._process.kill_below()
                if not self._listen(b"", AFTERMATH):
                    self.close()
            if not ended and not timed_out:
                self._move(len(self._window))
            code = None if timed_out else self._status if ended else self._process.code()
            screen, self._screen = self._screen, HeadTail(MAX_OUTPUT)
        return ExecResult(
            code, screen.text(), "", timed_out, screen.truncated, screen.num_bytes, time.monotonic() - started
        )

    def send(self, keys: str | bytes) -> None:
        with self._lock:
            if not self._pty:
                raise SandboxError("keys need a terminal: open the shell with pty=True")
            if not self.alive:
                raise SandboxError("this shell has ended; open another")
            data = keys.encode() if isinstance(keys, str) else keys
            deadline = time.monotonic() + AFTERMATH
            while data and time.monotonic() < deadline:
                data = data[self._process.send(data) :]
                self._listen(b"", 0.0)
            if data:
                raise SandboxError(f"{len(data)} bytes of keys were not taken: nothing reads this terminal")

    def read(self, seconds: float = 0.1, max_output: int = MAX_OUTPUT) -> str:
        with self._lock:
            if self.alive:
                self._listen(b"", seconds)
            if not self.busy:
                self._move(len(self._window))
            screen, self._screen = self._screen, HeadTail(max_output)
            return re.sub(rf"\n{self._token}:\d+\n", "", screen.text())  # the prompt after keys that were commands

    def resize(self, rows: int, columns: int) -> None:
        if self._resize is None:
            raise SandboxError("only a terminal has a size: open the shell with pty=True")
        self._resize(rows, columns)

    @property
    def alive(self) -> bool:
        return not self._closed and bool(list(self._process.outputs())) and not self._process.ended()

    @property
    def busy(self) -> bool:
        return self._marker is not None and self.alive

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._process.kill()
            self._process.close()

    def _say(self, text: str, seconds: float) -> bool:
        """Send a command, and have the shell print a marker after it; True if that came in time.

        The marker is split in what the shell reads, so that an echo of it is not taken for it.
        """
        self._token = token = secrets.token_hex(12)
        self._marker, self._status = re.compile(rf"\n{token}:(\d+)\n".encode()), None
        show = f"printf '\\n%s%s:%d\\n' {token[:12]} {token[12:]} $?"
        if not self._pty:
            return self._listen(f"{text}\n{show}\n".encode(), seconds)
        # As the prompt it comes after Ctrl-C too, which takes back all that was typed ahead.
        prompt = f"if [ -n \"$BASH\" ]; then PS1= PROMPT_COMMAND={shlex.quote(show)}; else PS1='\n{token}:$?\n'; fi; "
        return self._listen(f"{prompt}{text}\n".encode(), seconds)

    def _listen(self, data: bytes, seconds: float) -> bool:
        """Read until the marker of the running command comes; without one for so long."""
        deadline = time.monotonic() + seconds
        waited_for = self._marker
        exchange(self._process, data, deadline, self._on_output, close_input=False)
        return waited_for is not None and self._marker is None

    def _on_output(self, stream: int, data: bytes) -> bool:
        del stream
        self._window += data
        if self._pty:
            self._window = self._window.replace(b"\r\n", b"\n")
        if self._marker is None:
            self._move(len(self._window) - self._window.endswith(b"\r"))
            return False
        found = self._marker.search(self._window)
        if found is None:
            self._move(_certain(self._window, self._token))
            return False
        self._move(found.start())
        self._window = self._window[found.end() - found.start() :]
        self._status, self._marker = int(found[1]), None
        return True

    def _move(self, size: int) -> None:
        """What is certainly output goes from the window to the screen."""
        self._screen.add(self._window[:size])
        self._window = self._window[size:]


def _certain(window: bytes, token: str) -> int:
    """How many bytes of the window cannot be the beginning of a marker."""
    at = window.rfind(b"\n")
    if at < 0:
        return len(window) - window.endswith(b"\r")
    marker, tail = f"\n{token}:".encode(), window[at:].removesuffix(b"\r")
    begins = marker.startswith(tail) or (tail.startswith(marker) and tail[len(marker) :].isdigit())
    return at if begins else len(window) - window.endswith(b"\r")


def _wrapped(command: str, pty: bool) -> str:
    """Shell text that runs the command in the shell itself and survives its syntax errors."""
    quoted = shlex.quote(command)
    if pty and (max(map(len, quoted.encode().split(b"\n"))) > _LONGEST or not command.isprintable()):
        lines = "\n".join(wrap(base64.b64encode(command.encode()).decode(), _LONGEST))
        quoted = f"\"$(printf %s '{lines}' | base64 -d)\""
    return f"command eval {quoted}{'' if pty else ' </dev/null'}"
