"""`process`: no isolation at all. Commands are children of this process and may do whatever its user may.

Only by explicit choice, for trusted commands where nothing else works. Files live in a folder of their own that
relative paths, HOME and TMPDIR point to; absolute paths are the machine's own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from clawrl.errors import SandboxError
from envs.sandbox import labels
from envs.sandbox.labels import Label
from envs.sandbox.running import RunningSandbox
from envs.sandbox.shells import Resize
from envs.sandbox.spec import SandboxSpec
from envs.sandbox.streams import LocalProcess, Process


class ProcessSandbox(RunningSandbox):
    """A folder, and processes that are not kept in it."""

    backend = "process"

    def __init__(self, spec: SandboxSpec, label: Label) -> None:
        super().__init__(spec, labels.new_id())
        self.unenforced = unenforced(spec)
        self.label, self._closed = label, False
        self._children: list[LocalProcess] = []
        self._folder = labels.home() / "boxes" / self.id
        self._up()

    def _up(self) -> None:
        self._folder.mkdir()
        labels.write(self._folder, self.label)
        files = self._folder / "files"
        kind, _, id = self.spec.image.partition(":")
        if kind == "snapshot":
            source = labels.home() / "snapshots" / id / "root"
            if not source.is_dir():
                raise SandboxError(f"image {self.spec.image} is not on this machine (any more)")
            shutil.copytree(source, files, symlinks=True)
        else:
            files.mkdir()
        self._environment |= {"HOME": str(files), "TMPDIR": str(files), "PATH": os.environ.get("PATH", "")}
        self._environment |= self.spec.env
        self._workdir = self.spec.workdir or str(files)

    def reset(self) -> None:
        self._down()
        self._up()

    def close(self) -> None:
        self._closed = True
        self._down()

    def _down(self) -> None:
        self._close_shells()
        for each in self._children:
            each.kill()
            with suppress(OSError):
                os.killpg(each.child.pid, 9)
        self._children.clear()
        labels.remove_tree(self._folder)

    def snapshot(self) -> str:
        id = labels.new_id()
        folder = labels.home() / "snapshots" / id
        folder.mkdir()
        labels.write(folder, self.label)
        shutil.copytree(self._folder / "files", folder / "root", symlinks=True)
        return f"snapshot:{id}"

    def fork(self) -> ProcessSandbox:
        return ProcessSandbox(replace(self.spec, image=self.snapshot()), self.label)

    def put_tar(self, tar, at: str = ".") -> None:
        files = self._folder / "files"
        folder = files if at == "/" else (files / at).resolve()
        if folder != files and files not in folder.parents:
            raise SandboxError(f"backend process would write {folder} on this machine itself; name a folder in {files}")
        super().put_tar(tar, str(folder))

    def _start(self, command: Sequence[str], env: Mapping[str, str], cwd: str, *, merge: bool) -> LocalProcess:
        errors = subprocess.STDOUT if merge else subprocess.PIPE
        return self._launch(command, env, cwd, subprocess.PIPE, subprocess.PIPE, errors)

    def _launch(self, command, env, cwd, entry, output, errors, master: int | None = None) -> LocalProcess:
        if self._closed:
            raise SandboxError(f"sandbox {self.id} is closed; open another")
        folder = Path(self._workdir, cwd if cwd != "/" else ".")
        try:
            child = subprocess.Popen(
                list(command), stdin=entry, stdout=output, stderr=errors, env=dict(env), cwd=folder,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
        except OSError as error:
            raise SandboxError(f"{command[0]} could not be started in {folder}: {error}") from None
        process = LocalProcess(child, master)
        self._children = [each for each in self._children if not each.ended()] + [process]
        return process

    def _terminal(self, command, env, cwd, rows: int, columns: int) -> tuple[Process, Resize]:
        master, slave = os.openpty()

        def resize(rows: int, columns: int) -> None:
            with suppress(OSError):
                fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

        resize(rows, columns)
        # a session leader that opens a terminal takes it as its own
        command = ["/bin/sh", "-c", f'exec <>{os.ttyname(slave)} >&0 2>&0; exec "$@"', "sh", *command]
        try:
            process = self._launch(command, env, cwd, slave, slave, slave, master)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        return process, resize


def unenforced(spec: SandboxSpec) -> tuple[str, ...]:
    """All limits of the spec. Raises SandboxError if they must be held."""
    names = [name for name in ("memory", "pids", "cpus", "disk") if getattr(spec, name) is not None]
    found = (
        *(f"{name}={getattr(spec, name)}" for name in names),
        *(["network=none"] if spec.network == "none" else []),
    )
    if found and spec.limits == "enforce":
        raise SandboxError(f"backend process holds none of {', '.join(found)}: say limits='best_effort' to accept that")
    return found
