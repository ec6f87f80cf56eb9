"""Which backend serves a spec, and what is cleared away before the first sandbox of a run."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from clawrl.errors import ConfigError, SandboxError
from envs.sandbox import bare, cgroups, containers, images, labels, mapped, namespaces
from envs.sandbox.base import Sandbox
from envs.sandbox.labels import Label
from envs.sandbox.spec import SandboxSpec

BACKENDS = ("bwrap", "docker", "unshare", "process")
_begun: set[tuple[str, int]] = set()
_lock = threading.Lock()


def open_sandbox(spec: SandboxSpec, backend: str = "auto", run: str = "local") -> Sandbox:
    """A running sandbox. backend: auto, bwrap, docker, unshare, or process (no isolation at all; never by auto).

    auto is docker for a tag that docker has (or can pull), if the limits hold there, else bwrap, else unshare; images
    of this machine start in bwrap or unshare where these work. `run` labels the sandbox: the first call for a run
    removes what killed processes of that run left on this machine. Raises SandboxError with the reason of each backend
    and what would help.
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"sandbox backend {backend!r} is not one of auto, {', '.join(BACKENDS)}")
    with _lock:
        if (run, os.getpid()) not in _begun:
            reconcile(run)
            _begun.add((run, os.getpid()))
    label = labels.own_label(run)
    names = [backend] if backend != "auto" else _order(spec.image)
    refused: dict[str, str] = {}
    for name in names:
        why = refusal(name, spec)
        if why is None:
            return _open(name, spec, label)
        refused[name] = why
    reasons = "\n".join(f"  {name}: {why}" for name, why in refused.items())
    choice = "" if backend != "auto" else (
        "\nFor trusted commands only, backend='process' runs them without any isolation."
    )  # fmt: skip
    raise SandboxError(f"no sandbox for image {spec.image!r}:\n{reasons}{choice}")


def _order(image: str) -> list[str]:
    """What auto tries, first to last."""
    here = image in ("host", "base") or image.startswith("snapshot:") or images.local_path(image) is not None
    return ["bwrap", "unshare", "docker"] if here else ["docker", "bwrap", "unshare"]


def refusal(name: str, spec: SandboxSpec) -> str | None:
    """Why a backend cannot serve a spec here; None if it can."""
    try:
        if name == "docker":
            return containers.refusal(spec)
        if name == "process":
            bare.unenforced(spec)
            return None
        why = namespaces.missing_bwrap() if name == "bwrap" else mapped.missing()
        if why is None:
            namespaces.unenforced(spec)
        return why
    except SandboxError as error:
        return str(error)


def _open(name: str, spec: SandboxSpec, label: Label) -> Sandbox:
    kinds = {
        "bwrap": namespaces.BwrapSandbox,
        "unshare": namespaces.UnshareSandbox,
        "docker": containers.DockerSandbox,
        "process": bare.ProcessSandbox,
    }
    try:
        return kinds[name](spec, label)
    except OSError as error:
        raise SandboxError(f"sandbox of image {spec.image!r} could not be started by {name}: {error}") from error


def reconcile(run: str) -> list[str]:
    """Remove what dead processes of a run left on this machine: processes, groups, folders, containers, images.

    Gives the names of what was removed. What live processes hold, and other runs, are not touched. One process does it
    at a time.
    """
    home = labels.home()
    with (home / "reconcile.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _remove_dead(home, run)


def _remove_dead(home: Path, run: str) -> list[str]:
    removed = []
    for folder in (*home.glob("boxes/*"), *home.glob("snapshots/*"), *home.glob("layers/.new-*")):
        found = labels.read(folder)
        if found is None:
            with suppress(OSError):  # its maker was killed between two lines; a full one is never without a label
                if time.time() - folder.stat().st_mtime > 60:
                    folder.rmdir()
            continue
        label, facts = found
        if label.run == run and not label.alive():
            labels.kill_stamped([(pid, began) for pid, began in facts.get("processes", [])])
            cgroups.remove([Path(name) for name in facts.get("groups", [])])
            labels.remove_tree(folder)
            removed.append(f"{folder.parent.name}/{folder.name}")
    return removed + containers.reconcile(run)


def remove_snapshot(image: str) -> None:
    """Give up a snapshot. Sandboxes that stand on it must be closed first."""
    kind, _, id = image.partition(":")
    if kind == "snapshot" and id and "/" not in id:
        labels.remove_tree(labels.home() / "snapshots" / id)
    elif image.startswith(containers.SNAPSHOTS):
        containers.remove_image(image)
    else:
        raise SandboxError(f"{image!r} is not a snapshot")


def close_run(run: str) -> None:
    """Remove the snapshots that this process made for a run."""
    own = labels.own_label(run)
    for folder in labels.home().glob("snapshots/*"):
        if (found := labels.read(folder)) and found[0] == own:
            labels.remove_tree(folder)
    containers.remove_snapshots(own)
