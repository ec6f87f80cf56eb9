"""What a sandbox is asked to be, and what a command in it gave back.

Plain records: knows no backend, starts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from clawrl.errors import ConfigError

GIB = 1 << 30
MAX_OUTPUT = 64 * 1024
"""Bytes of output that a command's result keeps by default; the middle of a longer one is left out."""


@dataclass(frozen=True)
class SandboxSpec:
    """One sandbox: the files it starts from and the most it may use. None leaves a limit out on purpose.

    image    "host" (this machine's programs, read-only where the backend cannot copy on write), the path of a root
             file system (folder or tar), the path of a folder with a Dockerfile, a docker tag, or what `snapshot` gave
    memory   bytes, all processes together, swap included
    pids     processes and threads alive at once
    cpus     processors' worth of time
    disk     bytes written, /tmp and /dev/shm included
    network  "none": only a loopback of its own; "host": this machine's network
    timeout  seconds that a command may take when `exec` and `run` name none
    limits   "enforce": a limit that the backend cannot hold is an error; "best_effort": as far as it can
    env      variables of every command, added to those of the image; the parent's are never passed on
    workdir  folder commands start in, made if need be; None is the image's own
    """

    image: str = "host"
    memory: int | None = GIB
    pids: int | None = 256
    cpus: float | None = 1.0
    disk: int | None = GIB
    network: Literal["none", "host"] = "none"
    timeout: float = 60.0
    limits: Literal["enforce", "best_effort"] = "enforce"
    env: Mapping[str, str] = field(default_factory=dict)
    workdir: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("memory", 4 << 20), ("pids", 4), ("disk", 1 << 20)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"sandbox {name}={value!r} is too little to start in; use {least} or more, or None")
        for name in ("cpus", "timeout"):
            value = getattr(self, name)
            if (value is not None or name != "cpus") and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"sandbox {name}={value!r} must be above 0")
        for name, allowed in (("network", ("none", "host")), ("limits", ("enforce", "best_effort"))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"sandbox {name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        if not self.image:
            raise ConfigError("sandbox image is empty; name a docker tag, a folder, a tar file or host")
        if self.workdir is not None and not self.workdir.startswith("/"):
            raise ConfigError(f"sandbox workdir={self.workdir!r} must be an absolute path inside the sandbox")


@dataclass(frozen=True)
class ExecResult:
    """What a command gave back.

    code       exit status; 128 + n when signal n ended it; None when it was stopped for time, or runs on in a pty
    output     stdout and stderr in order (stdout alone if they were kept apart), head and tail when it was long
    errors     stderr, if it was kept apart
    timed_out  it took longer than it may
    truncated  output left out from the middle; the text says how much
    num_bytes  all that was written, kept or not
    seconds    wall time
    """

    code: int | None
    output: str
    errors: str = ""
    timed_out: bool = False
    truncated: bool = False
    num_bytes: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return self.code == 0
