"""Sandboxes of Linux namespaces over an overlay: `bwrap` (bubblewrap) and `unshare` (entry.py, where there is none).

    owner ── holder: user + mount namespace; mounts upper layer and overlay, then waits for its stdin to end
          ├─ first:  pid 1 of pid, net, ipc and uts namespaces of its own; ends with its stdin, and all others with it
          └─ exec:   joins these, in a mount namespace of its own with the overlay as root, without rights

Holder and first process live on pipes of the owner: when the owner is killed, they end. Nothing of the host's view is
ever reachable from pid namespace or root of what runs inside.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from clawrl.errors import SandboxError
from envs.sandbox import cgroups, dockerfile, images, labels, mapped, seccomp
from envs.sandbox.labels import Label
from envs.sandbox.running import RunningSandbox
from envs.sandbox.shells import Resize
from envs.sandbox.spec import SandboxSpec
from envs.sandbox.streams import LocalProcess, Process, kill_tree

START = 30.0
HOSTNAME = "sandbox"
CAPABILITIES = "CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE".split()
"""What root inside may do to what is inside; the user namespace gives none of it a meaning outside."""

HOLDER = """
echo 0 >/proc/sys/user/max_user_namespaces && cd "$1" || exit 1
if [ "$3" != 0 ]; then mount -t tmpfs -o "size=$3,nr_inodes=$4,mode=755" sandbox "$2" || exit 1; fi
mkdir -p "$2/upper" "$2/work" "$2/root" "$2/shm" && chmod 1777 "$2/shm" || exit 1
mount -t overlay -o "lowerdir=$5,upperdir=$2/upper,workdir=$2/work,userxattr" sandbox "$2/root" || exit 1
echo ready
exec cat >/dev/null
"""
"""$1 home, $2 folder of the sandbox below it, $3 bytes of disk (0: no limit), $4 files, $5 lower layers."""

FIRST = """
trap '' HUP INT TERM
exec 3<&0
until cat <&3 >/dev/null & wait $!; do [ $? = 127 ] && exit; done
"""
"""Pid 1 inside: buries orphans, and ends when its stdin does. Whoever kills its cat inside gets a new one."""

INODE = 1024
"""Bytes of disk that allow one file: their number is bounded too."""


OWN_PROCESSES = 8
"""Processes of ours beside the sandbox's: holder, first process and its cat, one watcher per running command."""


def unenforced(spec: SandboxSpec) -> tuple[str, ...]:
    """The limits of a spec that cannot be held here, each with why. Raises SandboxError if they must be."""
    held = cgroups.enforceable() if mapped.as_root() else frozenset()
    why = "no control group may be made here" if mapped.as_root() else "a plain user makes no control groups"
    found = {
        "memory": f"memory={spec.memory} holds per process only ({why})",
        "cpus": f"cpus={spec.cpus} does not hold ({why})",
    }
    missing = tuple(said for name, said in found.items() if getattr(spec, name) is not None and name not in held)
    if missing and spec.limits == "enforce":
        raise SandboxError(
            f"{'; '.join(missing)}. Run as root with control groups, use docker, leave the limit out (None), "
            "or say limits='best_effort'"
        )
    return missing


class NamespaceSandbox(RunningSandbox):
    """Backends differ in `_enter`: the words that start a process inside."""

    def __init__(self, spec: SandboxSpec, label: Label) -> None:
        super().__init__(spec, labels.new_id())
        self.label, self.unenforced = label, unenforced(spec)
        self._home = labels.home()
        self._image = images.find(spec.image, label, self._build)
        self._environment = {**self._environment, **self._image.env, **spec.env}
        self._workdir = spec.workdir or self._image.workdir or "/"
        self._lock, self._open = threading.RLock(), ExitStack()
        self._closed = False
        self._box = f"boxes/{self.id}"
        self._up()

    def _build(self, folder: Path) -> str:
        return dockerfile.build(folder, _Layers(type(self), self.label))

    # --- life

    def _up(self) -> None:
        """Label, limits, holder, first process; undone in the opposite order."""
        with self._lock, ExitStack() as stack:
            folder, limits = self._home / self._box, self._group_limits()
            groups = cgroups.planned(f"clawrl-{self.id}", limits)
            folder.mkdir()
            stack.callback(labels.remove_tree, folder)
            facts = {"groups": [str(each) for each in groups]}
            labels.write(folder, self.label, **facts)
            stack.callback(cgroups.remove, groups)
            self._groups = cgroups.make(f"clawrl-{self.id}", limits)
            self._holder = self._start_holder(folder, stack)
            self._spaces = self._descriptors(self._holder.pid, ("user", "mnt"), stack)
            watcher = self._start(["/bin/sh", "-c", FIRST], {"PATH": self._environment["PATH"]}, "/", merge=True)
            stack.callback(watcher.close)
            stack.callback(watcher.child.wait)
            stack.callback(watcher.child.kill)
            first = watcher.inside(START)
            self._spaces |= self._descriptors(first, ("pid", "ipc", "uts", "net"), stack)
            self._life = os.pidfd_open(first)
            stack.callback(os.close, self._life)
            stack.callback(self._kill_first)
            pids = [self._holder.pid, watcher.child.pid, first]
            labels.write(folder, self.label, **facts, processes=labels.stamps(pids))
            self._open = stack.pop_all()
        try:
            self._make_workdir()
        except BaseException:
            self.close()
            raise

    def _group_limits(self) -> dict[str, float]:
        """Of control groups. What is written to disk is kept in memory, and counts there too."""
        held = cgroups.enforceable() if mapped.as_root() else frozenset()
        spec = self.spec
        wanted = {
            "memory": None if spec.memory is None or spec.disk is None else spec.memory + spec.disk,
            "pids": None if spec.pids is None else spec.pids + OWN_PROCESSES,
            "cpus": spec.cpus,
        }
        if spec.memory is not None and spec.disk is None:  # the upper layer is then on the disk
            wanted["memory"] = spec.memory
        return {name: value for name, value in wanted.items() if value is not None and name in held}

    def _start_holder(self, folder: Path, stack: ExitStack) -> subprocess.Popen[bytes]:
        mapped.own(folder)
        disk = self.spec.disk or 0
        words = [str(self._home), self._box, str(disk), str(disk // INODE + 1000), ":".join(self._image.layers)]
        with (folder / "holder.log").open("wb") as log:
            command = ["sh", "-c", HOLDER, "sh", *words]
            holder = mapped.start(command, groups=self._groups, namespaces=["--mount"], errors=log)
        stack.callback(_end, holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != b"ready\n":
            holder.wait(START)
            said = (folder / "holder.log").read_text(errors="replace").strip()
            raise SandboxError(f"the sandbox's file system could not be mounted: {said[-500:] or holder.returncode}")
        return holder

    def _descriptors(self, pid: int, names: Sequence[str], stack: ExitStack) -> dict[str, int]:
        """Open namespaces of a process; by descriptor they cannot be mixed up with those of a later process."""
        found = {}
        for name in names:
            if name != "net" or self.spec.network == "none":
                found[name] = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, found[name])
        return found

    def _kill_first(self) -> None:
        """With pid 1 of a pid namespace all of it ends."""
        with suppress(OSError):
            signal.pidfd_send_signal(self._life, signal.SIGKILL)

    def reset(self) -> None:
        with self._lock:
            if self._closed:
                raise SandboxError(f"sandbox {self.id} is closed; open another")
            self._close_shells()
            self._open.close()
            self._up()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._close_shells()
            self._open.close()

    def snapshot(self) -> str:
        return images.new_snapshot(self.label, self._image, self._copy_upper)

    def fork(self) -> NamespaceSandbox:
        image = self.snapshot()
        return type(self)(replace(self.spec, image=image), self.label)

    def _copy_upper(self, root: Path) -> None:
        """Whiteouts and opaque marks are files like others here, and copied as they are."""
        script = 'cd "$1" && exec cp -a --reflink=auto upper/. "$2"'
        command = ["sh", "-c", script, "sh", str(self._home / self._box), str(root)]
        words = ["nsenter", *self._joining(("user", "mnt")), "--", *command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            raise SandboxError(f"the snapshot could not be taken: {done.stderr.strip()[-500:]}")

    # --- processes

    def _enter(self, command: Sequence[str], env: Mapping[str, str], cwd: str, status: int, terminal: str | None):
        """(words, descriptors to pass) that start a process inside. The first one makes the namespaces."""
        raise NotImplementedError

    def _joining(self, names: Sequence[str]) -> list[str]:
        """nsenter's options for namespaces that are open. By path: an inherited descriptor would come along inside."""
        options = {"user": "--user", "mnt": "--mount", "net": "--net", "ipc": "--ipc", "uts": "--uts"}
        there = f"/proc/{os.getpid()}/fd"
        keep = [] if mapped.as_root() else ["--preserve-credentials"]
        return [f"{options[name]}={there}/{self._spaces[name]}" for name in names if name in self._spaces] + keep

    def _limiting(self) -> list[str]:
        """Limits per process, where no group holds them. Set inside, where only the sandbox's processes count."""
        held, spec = self._group_limits(), self.spec
        words = ["--core=0"]
        if spec.pids is not None and "pids" not in held:
            words.append(f"--nproc={spec.pids + OWN_PROCESSES}")
        if spec.memory is not None and "memory" not in held:
            words.append(f"--data={spec.memory}")
        return ["prlimit", *words, "--"]

    def _start(self, command: Sequence[str], env: Mapping[str, str], cwd: str, *, merge: bool) -> InsideProcess:
        return self._launch(command, env, cwd, None, merge=merge)

    def _launch(self, command, env, cwd, terminal: tuple[int, int] | None, *, merge: bool) -> InsideProcess:
        """terminal: the two sides of a pty."""
        if self._closed:
            raise SandboxError(f"sandbox {self.id} is closed; open another")
        with ExitStack() as stack:
            reading, writing = os.pipe()
            stack.callback(os.close, writing)
            name = os.ttyname(terminal[1]) if terminal else None
            try:
                words, passed = self._enter(command, env, cwd, writing, name)
                passed += [writing]
                if (rules := seccomp.open_program()) is not None:
                    stack.callback(os.close, rules)
                    words, passed = self._filtered(words, rules), [*passed, rules]
                errors = subprocess.STDOUT if merge else subprocess.PIPE
                child = subprocess.Popen(
                    [*mapped.entering(self._groups), *words],
                    stdin=terminal[1] if terminal else subprocess.PIPE,
                    stdout=terminal[1] if terminal else subprocess.PIPE,
                    stderr=terminal[1] if terminal else errors,
                    pass_fds=passed, env={"PATH": mapped.HOST_PATH, "LANG": "C.UTF-8"}, cwd="/",
                    start_new_session=True, umask=0o022, bufsize=0,
                )  # fmt: skip
            except BaseException as error:
                os.close(reading)
                if isinstance(error, OSError):
                    raise SandboxError(f"sandbox {self.id} cannot start a process: {error}") from None
                raise
        return InsideProcess(child, reading, terminal[0] if terminal else None, self)

    def _filtered(self, words: list[str], rules: int) -> list[str]:
        """The words with a filter of system calls."""
        raise NotImplementedError

    def _terminal(self, command, env, cwd, rows: int, columns: int) -> tuple[Process, Resize]:
        master, slave = os.openpty()
        try:
            mapped.own_descriptor(slave)
            _set_size(master, rows, columns)
            process = self._launch(command, env, cwd, (master, slave), merge=True)
        except BaseException:
            os.close(master)
            raise
        finally:
            os.close(slave)
        return process, lambda rows, columns: _set_size(master, rows, columns)

    def ended(self) -> bool:
        """Whether everything inside has ended, whoever did it."""
        if self._closed or "pid" not in self._spaces:
            return self._closed
        try:
            signal.pidfd_send_signal(self._life, 0)
        except OSError:
            return True
        return False


def _set_size(master: int, rows: int, columns: int) -> None:
    with suppress(OSError):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _end(holder: subprocess.Popen[bytes]) -> None:
    for stream in (holder.stdin, holder.stdout):
        if stream is not None:
            stream.close()
    holder.kill()
    holder.wait()


class InsideProcess(LocalProcess):
    """A watcher outside and the process inside; a pipe of the watcher tells the second's pid and exit status."""

    def __init__(
        self, child: subprocess.Popen[bytes], status: int, master: int | None, sandbox: NamespaceSandbox
    ) -> None:
        super().__init__(child, master)
        self._status, self._told, self._sandbox = status, b"", sandbox
        os.set_blocking(status, False)

    def _facts(self) -> dict[str, int]:
        with suppress(OSError):
            while data := os.read(self._status, 4096):
                self._told += data
        found: dict[str, int] = {}
        for line in self._told.splitlines():
            with suppress(ValueError):
                found |= json.loads(line)
        return found

    def inside(self, seconds: float) -> int:
        """Pid of the process inside, as seen from outside. Raises SandboxError if it could not be started."""
        deadline = time.monotonic() + seconds
        while "child-pid" not in (facts := self._facts()):
            if self.ended() or time.monotonic() > deadline:
                raise self._broken()
            time.sleep(0.0002)
        return facts["child-pid"]

    def code(self) -> int | None:
        if not self.ended():
            return None
        facts = self._facts()
        if "exit-code" not in facts:
            raise self._broken()
        return facts["exit-code"]

    def _broken(self) -> SandboxError:
        if self._sandbox.ended():
            return SandboxError(f"sandbox {self._sandbox.id} has ended (closed, reset, or out of memory); reset it")
        said = b""
        for descriptor in self.outputs():
            with suppress(OSError):
                said += os.read(descriptor, 4096)
        return SandboxError(
            f"sandbox {self._sandbox.id} could not start a process, or lost it "
            f"({said.decode('utf-8', 'replace').strip()[-500:] or 'its limit of processes or memory is reached'})"
        )

    def kill_below(self) -> None:
        if not self.ended() and "child-pid" in (facts := self._facts()):
            kill_tree(facts["child-pid"], itself=False)

    def close(self) -> None:
        super().close()
        if self._status >= 0:
            os.close(self._status)
            self._status = -1


class BwrapSandbox(NamespaceSandbox):
    """bubblewrap starts the processes."""

    backend = "bwrap"

    def _enter(self, command, env, cwd, status, terminal):
        root, shm = (str(self._home / self._box / name) for name in ("root", "shm"))
        first = "pid" not in self._spaces
        words = [
            "nsenter",
            *self._joining(("user", "mnt", "net", "ipc", "uts")),
            "--",
            *self._limiting(),
            "bwrap",
        ]
        if first:
            words += ["--unshare-pid", "--as-pid-1", "--unshare-ipc", "--unshare-uts", "--hostname", HOSTNAME]
            words += ["--unshare-net"] if self.spec.network == "none" else []
        else:  # comes along inside, where it says no more than /proc/self/ns/pid
            words += ["--pidns", str(self._spaces["pid"])]
        words += ["--json-status-fd", str(status), "--bind", root, "/"]
        for name in self._image.binds:
            words += ["--ro-bind", name, name]
        words += ["--proc", "/proc", "--dev", "/dev", "--bind", shm, "/dev/shm", "--remount-ro", "/dev"]
        words += ["--cap-drop", "ALL", *(word for each in CAPABILITIES for word in ("--cap-add", f"CAP_{each}"))]
        words += ["--clearenv", *(word for name, value in env.items() for word in ("--setenv", name, value))]
        if terminal:  # a session of its own inside, which takes the terminal as its own
            command = ["/bin/sh", "-c", 'exec <>/dev/console >&0 2>&0; exec "$@"', "sh", *command]
        return [*words, "--new-session", "--chdir", cwd, "--", *command], [] if first else [self._spaces["pid"]]

    def _filtered(self, words, rules):
        at = words.index("bwrap") + 1
        return [*words[:at], "--seccomp", str(rules), *words[at:]]


class UnshareSandbox(NamespaceSandbox):
    """entry.py starts the processes, by the kernel's calls alone."""

    backend = "unshare"

    def _enter(self, command, env, cwd, status, terminal):
        box = self._home / self._box
        held = self._group_limits()
        settings = {
            "join": {name: number for name, number in self._spaces.items() if name != "pid"},
            "pid": self._spaces.get("pid"),
            "own_net": self.spec.network == "none",
            "become_root": mapped.as_root(),
            "root": str(box / "root"), "shm": str(box / "shm"), "binds": self._image.binds,
            "hostname": HOSTNAME, "capabilities": CAPABILITIES, "status": status, "terminal": bool(terminal),
            "env": dict(env), "cwd": cwd, "command": list(command), "rules": None,
            "processes": None if self.spec.pids is None or "pids" in held else self.spec.pids + OWN_PROCESSES,
            "data": None if "memory" in held else self.spec.memory,
        }  # fmt: skip
        return [sys.executable, "-I", "-S", str(Path(__file__).with_name("entry.py")), json.dumps(settings)], [
            *self._spaces.values()
        ]  # closed there

    def _filtered(self, words, rules):
        return [*words[:-1], json.dumps({**json.loads(words[-1]), "rules": rules})]


class _Layers:
    """Where a Dockerfile's layers are kept; see dockerfile.Keeper."""

    def __init__(self, kind: type[NamespaceSandbox], label: Label) -> None:
        self._kind, self._label = kind, label

    def identity(self, image: str) -> str:
        return images.find(image, self._label, self._nested).layers[0]

    def _nested(self, folder: Path) -> str:
        return dockerfile.build(folder, self)

    def find(self, key: str) -> str | None:
        return images.layer(key)

    def open(self, spec: SandboxSpec) -> NamespaceSandbox:
        return self._kind(spec, self._label)

    def environment(self, sandbox: NamespaceSandbox) -> tuple[dict[str, str], str]:
        return dict(sandbox._image.env), sandbox._image.workdir or "/"

    def keep(self, sandbox: NamespaceSandbox, key: str, env: Mapping[str, str], workdir: str) -> str:
        image = replace(sandbox._image, env=dict(env), workdir=workdir)
        return images.keep(key, self._label, image, sandbox._copy_upper)


@cache
def missing_bwrap() -> str | None:
    """Why bubblewrap cannot be used here; None if it can."""
    if shutil.which("bwrap", path=mapped.HOST_PATH) is None:
        return "no `bwrap` here: install bubblewrap (Debian: apt-get install bubblewrap)"
    return mapped.missing()
