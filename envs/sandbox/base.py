"""The one interface of all sandboxes. Synchronous: it is called from threads of Ray actors.

with open_sandbox(SandboxSpec(image="images/base.tar"), run="run-7") as sandbox:
    sandbox.put({"work/a.txt": b"hello"})
    print(sandbox.exec("cat /work/a.txt").output)
    with sandbox.shell() as shell:
        shell.run("cd /work")
        print(shell.run("ls").output)
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from envs.sandbox.spec import MAX_OUTPUT, ExecResult, SandboxSpec
from envs.sandbox.streams import Process

MAX_TAR = 256 << 20
"""Bytes that `get` takes out of a sandbox unless told otherwise."""


class Shell(ABC):
    """One living shell (bash, else sh): directory, variables and functions stay from command to command.

    Without a pty a command's stdin is empty and stderr goes to stdout; one that takes too long is killed, with all
    its descendants, and the shell goes on. With a pty it is a terminal session: a command that takes longer than
    `timeout` runs on (`busy`), keys go to it by `send`, and what it shows is had by `read`.
    """

    @abstractmethod
    def run(self, command: str, timeout: float | None = None, max_output: int = MAX_OUTPUT) -> ExecResult:
        """Run a command (several lines too) and wait for its end, seen by a random marker.

        Raises SandboxError if the shell is closed, or busy with a command in its pty.
        """

    @abstractmethod
    def send(self, keys: str | bytes) -> None:
        r"""Type keys as they are, e.g. "y\n", "\x03" (Ctrl-C), "\x1b[A" (up). Needs a pty."""

    @abstractmethod
    def read(self, seconds: float = 0.1, max_output: int = MAX_OUTPUT) -> str:
        """What the terminal showed since it was last read, after waiting so long, or until the command ended."""

    @abstractmethod
    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size. Needs a pty."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """False once it was closed, or a command ended it (`exit`)."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a command of `run` still goes on (pty only)."""

    @abstractmethod
    def close(self) -> None:
        """End the shell and what runs in it. May be called twice."""

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sandbox(ABC):
    """Files and processes of their own. One thread per shell or call; several threads may call at once.

    Raises SandboxError when the sandbox itself broke (not when a command fails: that is a result).
    """

    id: str
    spec: SandboxSpec
    backend: str
    unenforced: tuple[str, ...]
    """Limits of the spec that this backend holds in part or not at all (only with limits="best_effort")."""

    @abstractmethod
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
        """Run one command in a process of its own: a string by /bin/sh, a sequence as it is.

        merge=False keeps stderr apart (`errors`). A daemon that a command leaves behind lives until reset or close.
        """

    @abstractmethod
    def start(self, command: Sequence[str], env: Mapping[str, str] | None = None, *, cwd: str | None = None) -> Process:
        """Start a program that stays, and is spoken to over its stdin and stdout; stderr is kept apart.

        The caller ends it (`kill`, then `close`); reset and close of the sandbox end it too. A program that is not
        there ends with exit status 127, as in a shell.
        """

    @abstractmethod
    def shell(
        self, pty: bool = False, env: Mapping[str, str] | None = None, *, cwd: str | None = None,
        rows: int = 40, columns: int = 120,
    ) -> Shell:  # fmt: skip
        """Start a shell that stays; one per episode costs a fraction of one exec per command."""

    @abstractmethod
    def put(self, files: Mapping[str, bytes | Path], at: str = "/") -> None:
        """Write files: name below `at` → content, or the host's file or folder to copy. Folders are made."""

    @abstractmethod
    def get(self, path: str, to: Path, max_bytes: int = MAX_TAR) -> Path:
        """Copy a file or folder out, into the host's folder `to`; returns its path there.

        Links that lead out of it, devices and setuid bits do not come along.
        """

    @abstractmethod
    def put_tar(self, tar: bytes | BinaryIO, at: str = "/") -> None:
        """Unpack a tar stream below `at`, by the sandbox's own tar."""

    @abstractmethod
    def get_tar(self, path: str, max_bytes: int = MAX_TAR) -> bytes:
        """A file or folder as the sandbox's own tar packs it. Not to be trusted: unpack it with `get`."""

    @abstractmethod
    def read_file(self, path: str, max_bytes: int = MAX_OUTPUT) -> bytes:
        """Content of a regular file, at most so many bytes. Raises SandboxError if it cannot be read."""

    @abstractmethod
    def snapshot(self) -> str:
        """Keep the files as they are now; the answer is an image for a SandboxSpec of this backend and machine.

        Processes are not kept. It lives until `remove_snapshot`, or as long as this process.
        """

    @abstractmethod
    def fork(self) -> Sandbox:
        """A second running sandbox that starts from these files (no processes)."""

    @abstractmethod
    def reset(self) -> None:
        """Back to the image: a new empty upper layer, every process ended, shells closed. Takes milliseconds."""

    @abstractmethod
    def close(self) -> None:
        """End every process and remove every trace. May be called twice."""

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_folders(sandbox: Sandbox, *paths: str) -> None:
    """Folders where commands may have left nothing, or something else, in their place."""
    for name in map(shlex.quote, paths):
        sandbox.exec(f"[ -d {name} ] || {{ rm -f {name}; mkdir -p {name}; }}", cwd="/")
