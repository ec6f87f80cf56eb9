"""A docker daemon of the tests' own: its folder and its socket, nothing of the machine's is touched.

Its images lie on a btrfs in a file, where this machine can have one: there docker limits what a container writes.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OFF = "--bridge=none --iptables=false --ip6tables=false --ip-forward=false".split()


def missing() -> str | None:
    """Why there can be none here."""
    if os.getuid() != 0:
        return "a docker daemon needs root"
    return None if shutil.which("dockerd", path=PATH) else "no dockerd here; install Debian's docker.io"


@contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """Its address, once it answers."""
    for name in ("data", "exec"):
        (folder / name).mkdir()
    on_btrfs = _mount(folder)
    command = ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid"]
    command += ["-H", f"unix://{folder}/docker.sock", *OFF, *(["--storage-driver", "btrfs"] if on_btrfs else [])]
    environment = {"PATH": PATH, "HOME": str(folder)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 60
        while not (folder / "docker.sock").exists() or "API listen on" not in (folder / "log").read_text():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"dockerd did not start: {(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield f"unix://{folder}/docker.sock"
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in sorted((each for each in mounted if each.startswith(f"{folder}/")), reverse=True):
            subprocess.run(["umount", "--lazy", mount], check=False)


def _mount(folder: Path) -> bool:
    if not shutil.which("mkfs.btrfs", path=PATH) or not Path("/dev/loop-control").exists():
        return False
    image, data = folder / "btrfs", folder / "data"
    with image.open("wb") as file:
        file.truncate(8 << 30)
    steps = [["mkfs.btrfs", "-q", image], ["mount", "-o", "loop", image, data], ["btrfs", "quota", "enable", data]]
    for step in steps:
        if subprocess.run(list(map(str, step)), capture_output=True, env={"PATH": PATH}, check=False).returncode:
            return False
    return True
