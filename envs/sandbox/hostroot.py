"""`python -m envs.sandbox.hostroot OUT.tar [PROGRAM…]`: a small root file system made of this machine's own programs.

Where no registry can be reached this is the image "base": shell tools, tar, git and Python with its standard library,
each with the libraries it loads. Nothing personal of the machine goes into it. Needs `ldd`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from clawrl.errors import SandboxError

PROGRAMS = (
    "sh bash cat ls cp mv rm ln mkdir rmdir touch chmod chown stat du df dd tee head tail sort uniq wc cut tr nl tac "
    "paste join comm split seq shuf od sha256sum md5sum base64 basename dirname readlink realpath mktemp install "
    "truncate fold date sleep timeout env printenv printf echo true false test [ expr yes id whoami uname hostname pwd "
    "tty stty nproc kill ps pgrep pkill nohup setsid setpriv unshare script grep egrep fgrep sed awk mawk find xargs "
    "diff cmp patch tar gzip gunzip zcat bzip2 xz which getopt file less git make"
).split()
"""Taken along if the machine has them; sh, cat, mkdir and tar must be there."""

PYTHON = "/usr/bin/python3"
_NEEDED = ("sh", "cat", "mkdir", "tar")
_FOLDERS = "usr/bin usr/sbin usr/lib usr/lib64 usr/local/bin etc home opt proc dev sys run srv var/tmp tmp root".split()
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_SKIPPED = {"test", "tests", "dist-packages", "site-packages", "idlelib", "lib2to3", "tkinter", "turtledemo"}


def skeleton(root: Path) -> None:
    """Folders, the links of a merged /usr, and the few files of /etc that programs look for."""
    for name in _FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
    root.chmod(0o755)
    for name in ("tmp", "var/tmp"):
        (root / name).chmod(0o1777)
    for name, text in _FILES.items():
        (root / name).write_text(text)


def build(root: Path, programs: Iterable[str] = PROGRAMS) -> None:
    """Fill an empty folder. Raises SandboxError if a program that a sandbox cannot do without is missing."""
    skeleton(root)
    binaries = []
    for name in programs:
        found = shutil.which(name, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        if found is None:
            if name in _NEEDED:
                raise SandboxError(f"this machine has no {name}: image base cannot be made of it; use a rootfs tar")
            continue
        _copy(Path(found).resolve(), root / "usr/bin" / name)
        binaries.append(str(Path(found).resolve()))
    if Path(PYTHON).exists():
        binaries += _python(root)
    if (core := Path("/usr/lib/git-core")).is_dir():
        shutil.copytree(core, root / "usr/lib/git-core", symlinks=True, dirs_exist_ok=True)
        binaries += [str(each) for each in core.iterdir() if each.is_file() and not each.is_symlink()]
    for folder in ("/usr/share/git-core/templates", "/usr/share/terminfo", "/lib/terminfo", "/usr/share/zoneinfo/Etc"):
        if Path(folder).is_dir():
            at = root / "usr" / folder.lstrip("/").removeprefix("usr/")
            shutil.copytree(folder, at, symlinks=True, dirs_exist_ok=True)
    for library in libraries(binaries):
        _copy(library, root / "usr" / str(library).lstrip("/").removeprefix("usr/"))


def _python(root: Path) -> list[str]:
    """Debian's interpreter and its standard library; the files whose libraries it needs."""
    real = Path(PYTHON).resolve()
    _copy(real, root / "usr/bin" / real.name)
    for name in ("python3", "python"):
        (root / "usr/bin" / name).symlink_to(real.name)
    library = Path(f"/usr/lib/{real.name}")
    if not library.is_dir():
        return [str(real)]
    (root / library.relative_to("/")).mkdir(parents=True, exist_ok=True)

    def skipped(folder: str, names: list[str]) -> set[str]:
        return _SKIPPED & set(names) | {name for name in names if name == "__pycache__" or name.startswith("config-")}

    shutil.copytree(library, root / library.relative_to("/"), ignore=skipped, dirs_exist_ok=True)
    return [str(real), *(str(each) for each in (library / "lib-dynload").glob("*.so"))]


def libraries(binaries: Sequence[str]) -> set[Path]:
    """What the dynamic linker would load for them."""
    found: set[Path] = set()
    for low in range(0, len(binaries), 50):
        listed = subprocess.run(
            ["ldd", *binaries[low : low + 50]], capture_output=True, text=True, timeout=60, check=False
        )
        found |= {Path(name) for name in re.findall(r"^\s.*?(/\S+) \(0x", listed.stdout, re.MULTILINE)}
    return found


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755 if os.access(source, os.X_OK) else 0o644)


def packed(folder: Path, take: Callable[[IO[bytes]], None]) -> None:
    """Hand a folder on as a tar in which everything is root's."""
    command = [
        "tar",
        "-c",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "--sort=name",
        "-f",
        "-",
        "-C",
        str(folder),
        ".",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as packing:
        assert packing.stdout is not None
        take(packing.stdout)
    if packing.returncode:
        raise SandboxError(f"{folder} could not be packed (tar ended with {packing.returncode})")


def tar(take: Callable[[IO[bytes]], None], programs: Iterable[str] = PROGRAMS) -> None:
    """Build, and hand it on as a tar."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), programs)
        packed(Path(folder), take)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m envs.sandbox.hostroot", description=__doc__)
    parser.add_argument("out", type=Path, help="the tar to write")
    parser.add_argument("programs", nargs="*", help="more programs of this machine to take along")
    options = parser.parse_args(arguments)
    with options.out.open("wb") as file:
        tar(lambda stream: shutil.copyfileobj(stream, file), [*PROGRAMS, *options.programs])
    sys.stderr.write(f"{options.out}: {options.out.stat().st_size >> 20} MiB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
