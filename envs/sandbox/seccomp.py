"""A filter of system calls that no sandbox needs and that reach what namespaces do not divide.

Kernel keyrings (the parent's are inherited), bpf, perf, handles of files by number, io_uring, modules; and typing into
a terminal (TIOCSTI). Refused with EPERM; calls of a foreign architecture do not exist.
"""

from __future__ import annotations

import errno
import os
import platform
import struct
from functools import cache

# (audit architecture, call numbers); names in both lists mean the same
_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        {
            "ioctl": 16, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298,
            "userfaultfd": 323, "kexec_load": 246, "kexec_file_load": 320, "init_module": 175, "finit_module": 313,
            "delete_module": 176, "open_by_handle_at": 304, "io_uring_setup": 425, "io_uring_enter": 426,
            "io_uring_register": 427, "lookup_dcookie": 212, "quotactl": 179, "acct": 163, "syslog": 103,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ioctl": 29, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241,
            "userfaultfd": 282, "kexec_load": 104, "kexec_file_load": 294, "init_module": 105, "finit_module": 273,
            "delete_module": 106, "open_by_handle_at": 265, "io_uring_setup": 425, "io_uring_enter": 426,
            "io_uring_register": 427, "lookup_dcookie": 18, "quotactl": 60, "acct": 89, "syslog": 116,
        },
    ),
}  # fmt: skip
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


@cache
def program(machine: str | None = None) -> bytes | None:
    """The filter in the kernel's form (struct sock_filter[]); None for an architecture that is not listed."""
    found = _ARCHITECTURES.get(machine or platform.machine())
    if found is None:
        return None
    audit, calls = found
    missing, denied = _ERRNO | errno.ENOSYS, _ERRNO | errno.EPERM
    lines: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 1, 0, audit),
        (_RETURN, 0, 0, missing),
        (_LOAD, 0, 0, 0),
    ]
    if audit == 0xC000003E:  # x32 calls are numbered from here
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, missing)]
    for name, number in calls.items():
        if name != "ioctl":
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, denied)]
    lines += [(_EQUAL, 1, 0, calls["ioctl"]), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 24)]
    for request in (_TIOCSTI, _TIOCLINUX):
        lines += [(_EQUAL, 0, 1, request), (_RETURN, 0, 0, denied)]
    lines.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)


@cache
def _file() -> int | None:
    content = program()
    if content is None:
        return None
    descriptor = os.memfd_create("clawrl-seccomp", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    return descriptor


def open_program() -> int | None:
    """A descriptor at the start of the filter, to be closed by the caller; None where there is no filter."""
    descriptor = _file()
    return None if descriptor is None else os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
