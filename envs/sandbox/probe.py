"""What this machine gives to sandboxes: each part tried, with the remedy where it does not work."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clawrl.errors import ClawrlError
from envs.sandbox import cgroups, containers, labels, mapped, opening
from envs.sandbox.spec import SandboxSpec

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")


@dataclass(frozen=True)
class Fact:
    """One line: what was looked at, how it is, what was found, and what would help."""

    name: str
    state: Literal["works", "in part", "missing"]
    said: str
    remedy: str = ""


def look() -> list[Fact]:
    """All facts; each part is tried, none raises."""
    looks = (_user, _folder, _namespaces, _overlay, _control_groups, _limits, _docker, _browser)
    return [_safely(each) for each in looks] + [_backend(name) for name in ("docker", "bwrap", "unshare")]


def _safely(look: Callable[[], Fact]) -> Fact:
    try:
        return look()
    except (ClawrlError, OSError, subprocess.SubprocessError) as error:
        return Fact(look.__name__.strip("_").replace("_", " "), "missing", str(error))


def _user() -> Fact:
    if mapped.as_root():
        return Fact("user", "works", f"root; sandboxes run as ids {mapped.BASE} and up, which own nothing here")
    return Fact("user", "in part", "a plain user: sandboxes are isolated, but only pids and disk are limited")


def _folder() -> Fact:
    home = labels.home()
    free = shutil.disk_usage(home).free >> 30
    return Fact("folder", "works", f"{home} ({free} GiB free; $CLAWRL_SANDBOX_HOME names another)")


def _namespaces() -> Fact:
    why = mapped.missing()
    return Fact("user namespaces", "missing", why) if why else Fact("user namespaces", "works", "one was made")


def _overlay() -> Fact:
    """One is mounted in a namespace that ends with it."""
    with tempfile.TemporaryDirectory(dir=labels.home()) as name:
        folder = Path(name)
        folder.chmod(0o755)
        for each in ("lower", "upper", "work", "root"):
            (folder / each).mkdir()
            mapped.own(folder / each)
        options = f"lowerdir={name}/lower,upperdir={name}/upper,workdir={name}/work,userxattr"
        script = 'mount -t overlay -o "$1" none "$2" && touch "$2/x" && umount "$2"'
        try:
            mapped.run(["unshare", "--mount", "sh", "-c", script, "sh", options, f"{name}/root"], "mounting an overlay")
        except ClawrlError as error:
            remedy = "Linux 5.11 or newer; no overlay as the folder's own file system (another $CLAWRL_SANDBOX_HOME)"
            return Fact("overlay", "missing", str(error), remedy)
        finally:
            for each in ("upper", "work"):
                labels.remove_tree(folder / each)
    return Fact("overlay", "works", "mounted in a user namespace")


def _control_groups() -> Fact:
    held = sorted(cgroups.enforceable()) if mapped.as_root() else []
    said = f"version {cgroups.version()}, limits that groups hold here: {', '.join(held) or 'none'}"
    if len(held) == 3:
        return Fact("control groups", "works", said)
    remedy = "run as root, with /sys/fs/cgroup writable and the memory, pids and cpu controllers given to this group"
    return Fact("control groups", "in part" if held else "missing", said, remedy)


def _limits() -> Fact:
    """Per limit of a SandboxSpec, who would hold it."""
    held = cgroups.enforceable() if mapped.as_root() else frozenset()
    how = {
        "memory": "group" if "memory" in held else "per process only",
        "pids": "group" if "pids" in held else "rlimit of the namespace",
        "cpus": "group" if "cpus" in held else "not",
        "disk": "size of the upper layer, which is in memory",
    }
    said = "; ".join(f"{name}: {who}" for name, who in how.items())
    if "memory" in held and "cpus" in held:
        return Fact("limits", "works", said)
    return Fact("limits", "in part", said, "root or docker; or limits='best_effort' to accept it")


def _docker() -> Fact:
    try:
        facts = containers.client().info()
    except ClawrlError as error:
        return Fact("docker", "missing", str(error), "optional: it is for images of a registry, and clusters")
    storage = f"{facts.get('Driver')}, limits of disk {'held' if containers.disk_limits() else 'not held'}"
    said = f"version {facts.get('ServerVersion')}, {facts.get('Images')} images, storage {storage}"
    return Fact("docker", "works" if containers.disk_limits() else "in part", said)


def _browser() -> Fact:
    for name in BROWSERS:
        if found := shutil.which(name):
            command = [found, "--version"]
            told = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
            return Fact("browser", "works", f"{found} {told}".strip())
    return Fact("browser", "missing", "none in PATH", "for GUI tasks: Debian's chromium-headless-shell")


def _backend(name: str) -> Fact:
    """A sandbox is started and asked for one word; of docker, whether it would take one."""
    spec = SandboxSpec("base" if name == "docker" else "host", disk=None if name == "docker" else 16 << 20)
    title = f"backend {name}"
    why = opening.refusal(name, spec)
    best_effort = why is not None and opening.refusal(name, _loose(spec)) is None
    if why is not None and not best_effort:
        return Fact(title, "missing", why)
    if name != "docker":
        try:
            with opening.open_sandbox(_loose(spec), name, f"doctor-{os.getpid()}") as sandbox:
                if sandbox.exec("echo well").output != "well\n":
                    return Fact(title, "missing", "a sandbox started, but runs nothing")
        except ClawrlError as error:
            return Fact(title, "missing", str(error))
    said = "a sandbox was started" if name != "docker" else "answers"
    return Fact(title, "in part", f"{said}; {why}") if best_effort else Fact(title, "works", said)


def _loose(spec: SandboxSpec) -> SandboxSpec:
    return replace(spec, limits="best_effort")
