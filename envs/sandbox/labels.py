"""Whose a sandbox is: labels on everything that is made, and how to tell that its maker is dead.

A label names the run, the process that made it and the boot. What a killed process left is removed by the next one of
the same run; nothing else is touched.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from clawrl.errors import SandboxError


@dataclass(frozen=True)
class Label:
    """run: the run's name; pid, started: its process and when that began (clock ticks since boot); boot: which boot."""

    run: str
    pid: int
    started: int
    boot: str

    def alive(self) -> bool:
        """Whether the process that it names still runs on this machine."""
        return self.boot == _boot() and _start_of(self.pid) == self.started

    def words(self) -> dict[str, str]:
        """As docker's labels."""
        return {f"clawrl.{name}": str(value) for name, value in asdict(self).items()}

    @classmethod
    def read(cls, words: dict[str, str]) -> Label | None:
        """From docker's labels; None if they are not ours."""
        try:
            run, pid, started, boot = (words[f"clawrl.{name}"] for name in ("run", "pid", "started", "boot"))
            return cls(run, int(pid), int(started), boot)
        except (KeyError, ValueError):
            return None


def own_label(run: str) -> Label:
    """This process's label for a run."""
    return Label(run, os.getpid(), _start_of(os.getpid()) or 0, _boot())


def new_id() -> str:
    return secrets.token_hex(6)


def write(folder: Path, label: Label, **facts: object) -> None:
    """Label a folder before anything else is in it."""
    text = json.dumps({**asdict(label), "facts": facts})
    (folder / "label.json.new").write_text(text)
    (folder / "label.json.new").replace(folder / "label.json")


def read(folder: Path) -> tuple[Label, dict] | None:
    """A folder's label and facts; None if it has none that can be read."""
    try:
        found = json.loads((folder / "label.json").read_text())
        return Label(found["run"], found["pid"], found["started"], found["boot"]), found["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stamps(pids: list[int]) -> list[tuple[int, int]]:
    """(pid, when it began) of processes, so that another one of the same number is not taken for them."""
    return [(pid, began) for pid in pids if (began := _start_of(pid)) is not None]


def kill_stamped(found: list[tuple[int, int]]) -> None:
    """End processes that are still those."""
    for pid, began in found:
        if _start_of(pid) == began:
            with suppress(OSError):
                os.kill(pid, 9)


def _start_of(pid: int) -> int | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@cache
def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return "unknown"


def home() -> Path:
    """Where layers, sandboxes and snapshots live: $CLAWRL_SANDBOX_HOME, else the user's or the machine's cache."""
    named = os.environ.get("CLAWRL_SANDBOX_HOME")
    if named:
        folder = Path(named)
    elif os.getuid() == 0:
        folder = Path("/var/cache/clawrl-sandbox")
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clawrl-sandbox"
    folder = folder.absolute()
    try:
        for name in ("layers", "boxes", "snapshots", "images"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SandboxError(f"sandboxes cannot be kept in {folder} ({error}); set CLAWRL_SANDBOX_HOME") from None
    if ":" in str(folder) or "," in str(folder):
        raise SandboxError(f"sandboxes cannot be kept in {folder}: overlay takes no ':' or ',' in a path")
    if os.getuid() == 0:
        for each in (folder, *folder.parents):
            if not each.stat().st_mode & stat.S_IXOTH:
                raise SandboxError(
                    f"{each} is closed to other users, and sandboxes run as another user; "
                    "set CLAWRL_SANDBOX_HOME to a folder that everybody may pass through"
                )
    return folder


def remove_tree(folder: Path) -> None:
    """Remove a folder whatever modes are in it (overlay's work folder has none); links are not followed."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            each = os.path.join(path, name)
            if not os.path.islink(each):
                with suppress(OSError):
                    os.chmod(each, 0o700)
    _remove(folder)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                _remove(Path(entry.path))
            else:
                os.unlink(entry.path)
        os.rmdir(folder)
