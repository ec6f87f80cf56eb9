"""Processes in a user namespace: root inside, nobody outside.

As root, ids 0 to 65535 inside are BASE and up outside, which own nothing on this machine; as a plain user, root
inside is that user and there are no others. Needs util-linux (unshare, setpriv).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO

from clawrl.errors import SandboxError

BASE = int(os.environ.get("CLAWRL_SANDBOX_UID", "1600000000"))
COUNT = 65536
HOST_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BECOME = 'echo; read -r go && exec "$@"'


def as_root() -> bool:
    return os.getuid() == 0


def start(
    command: Sequence[str], *, groups: Sequence[Path] = (), namespaces: Sequence[str] = (), errors: IO[bytes] | int
) -> subprocess.Popen[bytes]:
    """Start a command as root of a new user namespace, in these control groups; stdin and stdout are pipes.

    Raises SandboxError if this machine gives no user namespaces.
    """
    become = ["setpriv", "--reuid=0", "--regid=0", "--clear-groups", "--"] if as_root() else []
    child = subprocess.Popen(
        [
            *entering(groups), "unshare", "--user", "--keep-caps", *namespaces, "--",
            "sh", "-c", _BECOME, "sh", *become, *command,
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        env={"PATH": HOST_PATH, "LANG": "C.UTF-8"}, cwd="/", start_new_session=True, umask=0o022, bufsize=0,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if child.stdout.read(1) != b"\n":
            raise SandboxError(f"no user namespace could be made (unshare ended with {child.wait()})")
        _map(child.pid)
        child.stdin.write(b"go\n")
    except OSError as error:
        child.kill()
        child.wait()
        raise SandboxError(f"ids of a user namespace could not be mapped: {error}") from None
    except SandboxError:
        child.wait()
        raise
    return child


def entering(groups: Sequence[Path]) -> list[str]:
    """Words before a command that put its process into control groups first."""
    if not groups:
        return []
    script = 'n=$1; shift; while [ "$n" -gt 0 ]; do echo 0 >"$1/cgroup.procs" || exit 125; shift; n=$((n - 1)); done; '
    return ["sh", "-c", script + 'exec "$@"', "sh", str(len(groups)), *map(str, groups)]


def _map(pid: int) -> None:
    folder = Path(f"/proc/{pid}")
    if as_root():
        (folder / "uid_map").write_text(f"0 {BASE} {COUNT}\n")
        (folder / "gid_map").write_text(f"0 {BASE} {COUNT}\n")
    else:
        (folder / "setgroups").write_text("deny")
        (folder / "uid_map").write_text(f"0 {os.getuid()} 1\n")
        (folder / "gid_map").write_text(f"0 {os.getgid()} 1\n")


def own(path: Path) -> None:
    """Give a file of ours to root inside."""
    if as_root():
        os.chown(path, BASE, BASE)


def own_descriptor(descriptor: int) -> None:
    """As `own`, of an open file."""
    if as_root():
        os.fchown(descriptor, BASE, BASE)


def run(command: Sequence[str], what: str, source: IO[bytes] | None = None, *, forgiven: str | None = None) -> None:
    """Run a command to its end as root inside, reading `source`. Raises SandboxError with what it said.

    Lines of stderr that hold `forgiven` do not make it a failure.
    """
    child = start(command, errors=subprocess.STDOUT)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if source is not None:
            with suppress(BrokenPipeError):  # it says why on stderr
                shutil.copyfileobj(source, child.stdin, 1 << 20)
        with suppress(BrokenPipeError):
            child.stdin.close()
        said = child.stdout.read().decode("utf-8", "replace").strip().splitlines()
        code = child.wait(600)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    wrong = [line for line in said if forgiven is None or forgiven not in line]
    if code != 0 and not (forgiven and len(wrong) < len(said) and all("previous errors" in line for line in wrong)):
        raise SandboxError(f"{what} failed: {' | '.join(wrong)[-800:] or f'exit status {code}'}")


@cache
def missing() -> str | None:
    """Why namespaces cannot be used here, with the remedy; None if they can. Tries it once."""
    for program in ("unshare", "nsenter", "setpriv", "prlimit", "mount"):
        if shutil.which(program, path=HOST_PATH) is None:
            return f"no `{program}` here: install util-linux"
    try:
        run(["true"], "a user namespace")
    except (SandboxError, OSError, subprocess.SubprocessError) as error:
        limit = Path("/proc/sys/user/max_user_namespaces")
        none = limit.exists() and limit.read_text().strip() == "0"
        return (
            f"user namespaces do not work here ({error}); "
            + ("raise user.max_user_namespaces above 0, " if none else "")
            + "allow them (kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0), "
            "or outside of a container, or with CAP_SYS_ADMIN"
        )
    return None
