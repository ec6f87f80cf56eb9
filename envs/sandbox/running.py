"""What every backend shares: exec, shell, files in and out, all over one act, `_start` of a process inside.

Files travel as tar streams through the sandbox's own tar. The host never resolves a path inside.
"""

from __future__ import annotations

import shlex
import tarfile
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from clawrl.errors import SandboxError
from envs.sandbox import shells, tars
from envs.sandbox.base import MAX_TAR, Sandbox
from envs.sandbox.spec import MAX_OUTPUT, ExecResult, SandboxSpec
from envs.sandbox.streams import HeadTail, Process, exchange

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8"}


class RunningSandbox(Sandbox):
    """A backend gives `_start`, `_terminal` and the life cycle."""

    backend = ""
    unenforced: tuple[str, ...] = ()

    def __init__(self, spec: SandboxSpec, id: str) -> None:
        self.spec, self.id = spec, id
        self._environment: dict[str, str] = {**ENVIRONMENT, **spec.env}
        self._workdir = spec.workdir or "/"
        self._shells: list[shells.LiveShell] = []

    @abstractmethod
    def _start(self, command: Sequence[str], env: Mapping[str, str], cwd: str, *, merge: bool) -> Process:
        """Start a process inside, on pipes. Raises SandboxError if the sandbox is gone."""

    @abstractmethod
    def _terminal(
        self, command: Sequence[str], env: Mapping[str, str], cwd: str, rows: int, columns: int
    ) -> tuple[Process, shells.Resize]:
        """Start a process inside on a terminal of its own, which becomes its controlling terminal."""

    def exec(
        self,
        command: str | Sequence[str],
        timeout: float | None = None,
        env: Mapping[str, str] | None = None,
        *,
        cwd: str | None = None,
        stdin: bytes = b"",
        merge: bool = True,
        max_output: int = MAX_OUTPUT,
    ) -> ExecResult:
        kept = {1: HeadTail(max_output), 2: HeadTail(max_output)}
        started = time.monotonic()

        def keep(stream: int, data: bytes) -> bool:
            kept[stream].add(data)
            return False

        code, timed_out = self._exchange(command, timeout, env, cwd, stdin, keep, merge=merge)
        return ExecResult(
            code,
            kept[1].text(),
            kept[2].text(),
            timed_out,
            kept[1].truncated or kept[2].truncated,
            kept[1].num_bytes + kept[2].num_bytes,
            time.monotonic() - started,
        )

    def _exchange(self, command, timeout, env, cwd, stdin, on_output, *, merge) -> tuple[int | None, bool]:
        """Run one command to its end: (exit status, whether it was stopped for time)."""
        process = self._start(_words(command), self._variables(env), cwd or self._workdir, merge=merge)
        deadline = time.monotonic() + (timeout or self.spec.timeout)
        try:
            if exchange(process, stdin, deadline, on_output):
                if process.ended():
                    return process.code(), False
                process.kill()  # on_output had enough
                return None, False
            process.kill()
            return None, True
        finally:
            process.close()

    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None, *, cwd: str | None = None) -> Process:
        return self._start(_words(command), self._variables(env), cwd or self._workdir, merge=False)

    def _variables(self, env: Mapping[str, str] | None) -> dict[str, str]:
        found = {**self._environment, **(env or {})}
        for name, value in found.items():
            if not name or "=" in name or "\0" in name + value:
                raise SandboxError(f"environment variable {name!r} has a name or value that no process can have")
        return found

    def shell(
        self,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        *,
        cwd: str | None = None,
        rows: int = 40,
        columns: int = 120,
    ) -> shells.LiveShell:
        variables, folder = self._variables(env), cwd or self._workdir
        if pty:
            variables.setdefault("TERM", "xterm-256color")
            command = ["/bin/sh", "-c", shells.TERMINAL]
            process, resize = self._terminal(command, variables, folder, rows, columns)
        else:
            variables.setdefault("TERM", "dumb")
            process, resize = self._start(["/bin/sh", "-c", shells.PLAIN], variables, folder, merge=True), None
        shell = shells.LiveShell(process, self.spec.timeout, pty=pty, resize=resize)
        self._shells = [each for each in self._shells if each.alive] + [shell]
        return shell

    def _close_shells(self) -> None:
        while self._shells:
            with suppress(OSError, SandboxError):
                self._shells.pop().close()

    def put(self, files: Mapping[str, bytes | Path], at: str = "/") -> None:
        if files:
            self.put_tar(tars.pack(files), at)

    def put_tar(self, tar: bytes | BinaryIO, at: str = "/") -> None:
        folder = shlex.quote(at)
        command = f"mkdir -p -- {folder} && exec tar -x -o -f - -C {folder}"
        data = tar if isinstance(tar, bytes) else tar.read()
        result = self.exec(command, max(self.spec.timeout, 120.0), stdin=data, cwd="/")
        if not result.ok:
            raise SandboxError(f"{at} could not be written: {_reason(result)}")

    def get_tar(self, path: str, max_bytes: int = MAX_TAR) -> bytes:
        parts, errors = bytearray(), HeadTail(4096)

        def keep(stream: int, data: bytes) -> bool:
            if stream == 1:
                parts.extend(data[: max_bytes + 1 - len(parts)])
            else:
                errors.add(data)
            return len(parts) > max_bytes

        clean = path.rstrip("/") or "/"
        folder, _, name = clean.rpartition("/")
        command = f"exec tar -c -f - -C {shlex.quote(folder or '/')} -- {shlex.quote('./' + (name or '.'))}"
        code, timed_out = self._exchange(
            command, max(self.spec.timeout, 120.0), None, "/", b"", keep, merge=False
        )  # fmt: skip
        if len(parts) > max_bytes:
            raise SandboxError(f"{path} is larger than max_bytes={max_bytes}; allow more, or get less of it")
        if code != 0:
            reason = _reason(ExecResult(code, errors.text(), timed_out=timed_out))
            raise SandboxError(f"{path} could not be read: {reason}")
        return bytes(parts)

    def get(self, path: str, to: Path, max_bytes: int = MAX_TAR) -> Path:
        tars.unpack(self.get_tar(path, max_bytes), to)
        name = path.rstrip("/").rpartition("/")[2]
        return to / name if name else to

    def read_file(self, path: str, max_bytes: int = MAX_OUTPUT) -> bytes:
        found = bytearray()

        def keep(stream: int, data: bytes) -> bool:
            found.extend(data if stream == 1 else b"")
            return len(found) >= max_bytes

        quoted = shlex.quote(path)
        command = f"[ -f {quoted} ] && [ -r {quoted} ] || exit 9; exec cat -- {quoted}"
        code, timed_out = self._exchange(command, None, None, "/", b"", keep, merge=False)
        if code == 9 or timed_out:
            raise SandboxError(f"{path} could not be read: {'timed out' if timed_out else 'not a readable file'}")
        return bytes(found[:max_bytes])

    def _make_workdir(self) -> None:
        if self._workdir != "/":
            result = self.exec(["mkdir", "-p", "--", self._workdir], 20.0, cwd="/")
            if not result.ok:
                raise SandboxError(f"workdir {self._workdir} could not be made: {_reason(result)}")


def _words(command: str | Sequence[str]) -> list[str]:
    """What a shell runs it by, so that a missing program is exit status 127. Raises SandboxError for no command."""
    words = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
    if not words or any("\0" in word for word in words):
        raise SandboxError(f"command {command!r} is empty or holds a zero byte")
    return words if isinstance(command, str) else ["/bin/sh", "-c", 'exec "$@"', "sh", *words]


def _reason(result: ExecResult) -> str:
    if result.timed_out:
        return "it took too long"
    said = result.output.strip() or f"exit status {result.code}"
    if result.code == 127 or "not found" in said:
        return f"{said[-500:]} (the image needs /bin/sh, cat, mkdir and tar)"
    return said[-500:]


def is_tar(path: Path) -> bool:
    """Whether a file is a tar, compressed or not."""
    try:
        return tarfile.is_tarfile(path)
    except OSError:
        return False
