"""The image `clawrl-python`: this machine's programs with pytest, for tasks that say `FROM clawrl-python`.

It is a Dockerfile folder among the sandbox's named images: `FROM host`, and this interpreter's own pytest (pure Python,
so that the sandbox's python3 may be another one) at /opt/python. Made on first use, and again when pytest changes.
"""

from __future__ import annotations

import fcntl
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from clawrl.errors import EnvError
from envs.sandbox import labels

NAME = "clawrl-python"
PACKAGES = ("pytest", "pluggy", "iniconfig", "packaging")  # pygments only colours terminals
DOCKERFILE = """\
FROM host
COPY site /opt/python
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/python
ENV PYTHONPATH=/opt/python PYTHONDONTWRITEBYTECODE=1
"""


def ensure_image() -> Path:
    """The folder of the image, made if it is not there. Raises EnvError where pytest is not installed."""
    folder = labels.home() / "images" / NAME
    try:
        found = [distribution(name) for name in PACKAGES]
    except PackageNotFoundError as error:
        raise EnvError(f"{error.name} is not installed, and tasks are tested with it; install clawrl[swe]") from error
    stamp = "\n".join(f"{each.name}=={each.version}" for each in found) + f"\n{DOCKERFILE}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{NAME}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is(folder, stamp):
            shutil.rmtree(folder, ignore_errors=True)
            for each in found:
                _copy(each, folder / "site")
            (folder / "Dockerfile").write_text(DOCKERFILE)
            (folder / "stamp").write_text(stamp)  # the last: without it the folder is made again
    return folder


def _is(folder: Path, stamp: str) -> bool:
    return (folder / "stamp").is_file() and (folder / "stamp").read_text() == stamp


def _copy(found, site: Path) -> None:
    """The modules of a package; not its programs, which lie outside of site-packages, nor compiled files."""
    for name in found.files or ():
        if ".." in name.parts or "__pycache__" in name.parts or not Path(str(name.locate())).is_file():
            continue
        target = site / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(name.locate()), target)


def prepare(image: str) -> None:
    """Make the image if a task's Dockerfile stands on it."""
    file = Path(image, "Dockerfile")
    if file.is_file() and f"FROM {NAME}\n" in file.read_text(encoding="utf-8", errors="replace"):
        ensure_image()
