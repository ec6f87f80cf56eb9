"""Images for tools: `base` with the Python that runs us in /opt/python, and the packages that are named, no others.

Made on first use out of what is installed here, below the sandbox's named images, and again when a version changes.
What is not named is not inside: neither graders nor clawrl.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from clawrl.errors import EnvError
from envs.sandbox import hostroot, labels

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
DOCKERFILE = f"""\
FROM base
COPY root /
RUN ln -sf {VERSION} /opt/python/bin/python3 && ln -sf {VERSION} /opt/python/bin/python
ENV PATH=/opt/python/bin:/usr/local/bin:/usr/bin:/bin LD_LIBRARY_PATH=/opt/python/lib
ENV PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
"""
_SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "tkinter",
    "turtledemo",
    "ensurepip",
}
_NEED = re.compile(r"(?P<name>[\w.-]+)\s*(?:\[(?P<extras>[\w.,-]+)\])?")


def python_image(packages: Sequence[str] = ()) -> str:
    """The folder of the image with these packages and all that they need, to be named in a SandboxSpec.

    Raises EnvError if one is not installed here.
    """
    found = closure(packages)
    stamp = "\n".join([sys.version, *sorted(f"{each.name}=={each.version}" for each in found), DOCKERFILE])
    name = f"clawrl-tools-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    folder = labels.home() / "images" / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "Dockerfile").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _fill(folder / "root", found)
            (folder / "Dockerfile").write_text(DOCKERFILE)  # the last: without it the folder is made again
    return str(folder)


def closure(packages: Iterable[str]) -> list[Distribution]:
    """These packages (`name`, or `name[extra]`) and what they need, as they are installed here."""
    found: dict[str, Distribution] = {}
    waiting, seen = [(each, True) for each in packages], set[str]()
    while waiting:
        need, named = waiting.pop()
        parts = _NEED.match(need)
        if parts is None or parts[0] in seen:
            continue
        seen.add(parts[0])
        try:
            package = distribution(parts["name"])
        except PackageNotFoundError:
            if named:
                raise EnvError(
                    f"package {parts['name']} is not installed here, and the sandbox is to have it; pip install it"
                ) from None
            continue  # needed on other systems only
        found[package.name] = package
        extras = (parts["extras"] or "").split(",")
        waiting += [(each, False) for each in package.requires or () if _extra(each) in (None, *extras)]
    return list(found.values())


def _extra(need: str) -> str | None:
    """The extra that a requirement belongs to."""
    match = re.search(r"\bextra\s*==\s*['\"]([\w.-]+)", need)
    return match and match[1]


def _fill(root: Path, packages: Sequence[Distribution]) -> None:
    """Compiled files come along with the times of their sources, which makes them valid there."""
    home, library = root / "opt/python", Path(sysconfig.get_path("stdlib"))
    real = Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
    (home / "bin").mkdir(parents=True)
    shutil.copy2(real, home / "bin" / VERSION)
    shutil.copytree(library, home / "lib" / VERSION, ignore=_ignored, symlinks=True)
    site = home / "lib" / VERSION / "site-packages"
    binaries = [real, *(library / "lib-dynload").glob("*.so")]
    for each in packages:
        binaries += _copy(each, site)
    own = {path.name for path in site.rglob("*.so*")}
    for found in hostroot.libraries([str(each) for each in binaries]):
        if found.name in own:
            continue
        parts = found.parts[1:]
        inside = parts if parts[0] == "usr" else ("usr", *parts) if parts[0].startswith("lib") else None
        target = root.joinpath(*inside) if inside else home / "lib" / found.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(found, target)


def _ignored(folder: str, names: list[str]) -> set[str]:
    return {name for name in names if name in _SKIPPED or name.startswith("config-")}


def _copy(package: Distribution, site: Path) -> list[Path]:
    """The modules of a package; its libraries. Programs lie outside of site-packages, tests are left out."""
    libraries = []
    for name in package.files or ():
        source = Path(str(name.locate()))
        if ".." in name.parts or {"tests", "test"}.intersection(name.parts[:-1]) or not source.is_file():
            continue
        target = site / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
        if ".so" in source.suffixes:
            libraries.append(source)
    return libraries
