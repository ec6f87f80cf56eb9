"""Start one process inside a sandbox without bubblewrap: namespaces, root, devices, rights, filter, exec.

Run as a program with one argument of JSON by namespaces.UnshareSandbox; imports nothing but the standard library.
Tells {"child-pid": N} and, if the command was started, {"exit-code": N} to a descriptor, as bubblewrap does.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import signal
import socket
import struct
import sys
import termios
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

CLONE = {
    "mnt": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 22, 24, 38
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
SECCOMP_MODE_FILTER = 2
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
NUMBERS = {
    "CHOWN": 0, "DAC_OVERRIDE": 1, "FOWNER": 3, "FSETID": 4, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
    "NET_BIND_SERVICE": 10,
}  # fmt: skip
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


def call(name: str, *arguments: Any) -> None:
    """A C library call; raises OSError."""
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind)]
    call("mount", *words, ctypes.c_ulong(flags), None if data is None else data.encode())


def main() -> int:
    settings = json.loads(sys.argv[1])
    call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)  # nobody inside may look into this process before it is theirs
    first = settings["pid"] is None
    for name in ("user", "mnt", "net", "ipc", "uts"):
        if name in settings["join"]:
            call("setns", settings["join"][name], CLONE[name])
            if name == "user" and settings["become_root"]:
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)
    limit(settings)
    if first:
        call("unshare", CLONE["pid"] | CLONE["ipc"] | CLONE["uts"] | (CLONE["net"] if settings["own_net"] else 0))
        call("sethostname", settings["hostname"].encode(), len(settings["hostname"]))
        if settings["own_net"]:
            loopback()
    else:
        call("setns", settings["pid"], CLONE["pid"])
    failure, failing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(failure)
        start(settings, failing)
    os.close(failing)
    os.write(settings["status"], json.dumps({"child-pid": child}).encode() + b"\n")
    return watch(settings["status"], child, failure)


def watch(status: int, child: int, failure: int) -> int:
    """Wait for the process and pass on how it ended."""
    for stream in (0, 1):  # whoever reads its output must see its end when the process ends
        os.dup2(os.open("/dev/null", os.O_RDWR), stream)
    said = os.read(failure, 4096)
    _, state = os.waitpid(child, 0)
    if said:
        os.write(2, b"entry: " + said + b"\n")
        return 125
    code = os.waitstatus_to_exitcode(state)
    code = code if code >= 0 else 128 - code
    os.write(status, json.dumps({"exit-code": code}).encode() + b"\n")
    return code


def limit(settings: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, kind in (("processes", resource.RLIMIT_NPROC), ("data", resource.RLIMIT_DATA)):
        if settings[name] is not None:
            resource.setrlimit(kind, (settings[name], settings[name]))


def loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP


def start(settings: dict[str, Any], failing: int) -> None:
    """In the child: become the command, or say why not. Never returns."""
    try:
        call("unshare", CLONE["mnt"])
        terminal = os.ttyname(0) if settings["terminal"] else None
        put_together(settings, terminal)
        os.setsid()
        if terminal:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.chdir(settings["cwd"])
        give_up_rights(settings["capabilities"])
        if settings["rules"] is not None:
            filter_calls(settings["rules"])
        os.set_inheritable(failing, False)
        os.closerange(3, failing)
        os.closerange(failing + 1, 1 << 16)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(settings["command"][0], settings["command"], settings["env"])
    except BaseException as error:
        os.write(failing, str(error).encode()[:4000])
    os._exit(125)


def put_together(settings: dict[str, Any], terminal: str | None) -> None:
    """The overlay as root, with /proc, /dev and what is bound; the host's tree is let go."""
    root = settings["root"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount(root, root, None, MS_BIND | MS_REC)
    for name in settings["binds"]:
        mount(name, root + name, None, MS_BIND | MS_REC)
        mount("none", root + name, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)
    for name in ("proc", "dev"):
        if not os.path.lexists(f"{root}/{name}"):
            os.mkdir(f"{root}/{name}", 0o755)
        if os.path.islink(f"{root}/{name}"):
            raise OSError(f"/{name} is a link")
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sandbox", f"{root}/dev", "tmpfs", MS_NOSUID, "mode=755,size=65536")
    for name in DEVICES:
        bind_file(f"/dev/{name}", f"{root}/dev/{name}")
    if terminal:
        bind_file(terminal, f"{root}/dev/console")
    for name in ("shm", "pts"):
        os.mkdir(f"{root}/dev/{name}")
    mount("devpts", f"{root}/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    mount(settings["shm"], f"{root}/dev/shm", None, MS_BIND)
    for name, target in {"ptmx": "pts/ptmx", "fd": "/proc/self/fd", "core": "/proc/kcore"}.items():
        os.symlink(target, f"{root}/dev/{name}")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", f"{root}/dev/{name}")
    mount("none", f"{root}/dev", None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID)
    os.chdir(root)
    if libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def bind_file(source: str, target: str) -> None:
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    mount(source, target, None, MS_BIND)


def give_up_rights(kept: list[str]) -> None:
    """What is not in the bounding set cannot be had by any exec."""
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    keep = {NUMBERS[name] for name in kept}
    number = 0
    while (number not in keep and libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0) == 0) or number in keep:
        number += 1
    mask = sum(1 << each for each in keep)
    header = struct.pack("=Ii", 0x20080522, 0)
    rights = struct.pack("=6I", mask, mask, 0, 0, 0, 0)
    call("capset", header, rights)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def filter_calls(descriptor: int) -> None:
    program = os.read(descriptor, 1 << 16)
    buffer = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    filled = Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filled), 0, 0)


if __name__ == "__main__":
    sys.exit(main())
