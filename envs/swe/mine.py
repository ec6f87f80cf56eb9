"""`python -m envs.swe.mine --out FOLDER [--bugs N] [NAME OLD NEW …]`: task folders made of packages on PyPI.

    sdists of two versions ─► the older as base, what changed in the sources as gold, the newer's tests as judge
    the older again, with one small bug made in it (--bugs) ─► its own tests as judge

Every task was run: new tests fail on the old tree, and pass on it with the gold patch. What is no task is told with its
reason. pip fetches the sdists, from wherever it is set up to; they stay in FOLDER/sdists.
"""

from __future__ import annotations

import argparse
import difflib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from clawrl.errors import EnvError
from envs.swe.building import Draft, NoTask, build, copy_tree, sources
from envs.swe.env import Place
from envs.swe.mutations import Bug, chosen
from envs.swe.task import SweTask

PAIRS = (
    ("sqlparse", "0.5.1", "0.5.2"),
    ("sqlparse", "0.5.4", "0.5.5"),
    ("tomlkit", "0.13.1", "0.13.2"),
    ("tomlkit", "0.13.2", "0.13.3"),
    ("cachetools", "7.2.7", "7.2.8"),
)
"""Pure Python without dependencies, tests and changelog in the sdist."""
CHANGELOGS = ("CHANGELOG*", "CHANGES*", "HISTORY*", "NEWS*", "docs/changelog*", "docs/changes*", "docs/history*")
DOWNLOAD_S = 300.0
MOST = 6000
"""Characters of a changelog."""
MOST_TESTS = 20
"""A bug that breaks more than these breaks everything, and is told by any traceback."""


def download(name: str, version: str, into: Path) -> Path:
    """The source tree of a version. Raises NoTask if pip finds none."""
    place = into / f"{name}-{version}"
    if not (place / "done").exists():
        place.mkdir(parents=True, exist_ok=True)
        words = ["download", "--quiet", "--no-deps", "--no-binary", name, "--dest", str(place), f"{name}=={version}"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
            capture_output=True, text=True, timeout=DOWNLOAD_S, check=False,
        )  # fmt: skip
        packed = sorted(place.glob("*.tar.gz"))
        if done.returncode or not packed:
            raise NoTask(f"pip has no sdist of it: {done.stderr.strip()[-200:]}")
        with tarfile.open(packed[0]) as tar:
            tar.extractall(place / "tree", filter="data")
        (place / "done").touch()
    return next(each for each in (place / "tree").iterdir() if each.is_dir())


def told(name: str, version: str, old: Path, new: Path) -> str:
    """What the agent reads: the lines that the newer version adds to its changelog. Raises NoTask without one."""
    for pattern in CHANGELOGS:
        for path in sorted(new.glob(pattern)):
            before = old / path.relative_to(new)
            if path.is_file() and before.is_file():
                was, is_ = (each.read_text(encoding="utf-8", errors="replace").splitlines() for each in (before, path))
                added = [line[2:] for line in difflib.ndiff(was, is_) if line.startswith("+ ")]
                if text := "\n".join(added).strip():
                    return (
                        f"{name} should behave as its version {version}, of which the changelog says:\n\n{text[:MOST]}"
                    )
    raise NoTask("no changelog says what changed")


def mine_pair(name: str, old: str, new: str, out: Path, place: Place) -> SweTask:
    """The task of a version and the one after it."""
    before, after = (download(name, version, out / "sdists") for version in (old, new))
    draft = Draft(f"{name}-{old}-{new}", before, after, told(name, new, before, after), name, old)
    return build(draft, out / "tasks", place)


def mine_bug(name: str, version: str, path: str, bug: Bug, out: Path, place: Place) -> SweTask:
    """The task of one bug; its statement names the tests that fail, which the agent can run."""
    tree = download(name, version, out / "sdists")
    id = f"{name}-{version}-{bug.kind}-{path.removesuffix('.py').replace('/', '.')}-{bug.line}"
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(tree, Path(folder))
        (Path(folder) / path).write_text(bug.text, encoding="utf-8", newline="")
        task = build(Draft(id, Path(folder), tree, "unknown", name, version), out / "tasks", place)
    failing, made = task.row["FAIL_TO_PASS"], out / "tasks" / id
    if len(failing) > MOST_TESTS:
        shutil.rmtree(made)
        raise NoTask(f"it breaks {len(failing)} tests")
    lines = "\n".join(f"- {each}" for each in failing)
    statement = f"Since a recent change these tests fail; the tests are right, and the sources are not:\n\n{lines}\n"
    (made / "problem_statement.md").write_text(statement, encoding="utf-8")
    return task


class Miner:
    """Tries one plan after the other and says what became of each."""

    def __init__(self, out: Path) -> None:
        self._out, self._place = out, Place("auto", "best_effort", "mine")
        self.num_tasks = 0

    def pair(self, name: str, old: str, new: str) -> None:
        self._try(f"{name} {old} to {new}", lambda: mine_pair(name, old, new, self._out, self._place))

    def bugs(self, name: str, version: str, number: int, seed: int) -> None:
        tree = download(name, version, self._out / "sdists")
        files = {each: (tree / each).read_text(encoding="utf-8") for each in sources(tree)}
        for path, bug in chosen(files, number, seed):
            what = f"{name} {version}, {bug.kind} in {path}:{bug.line}"
            self._try(what, lambda path=path, bug=bug: mine_bug(name, version, path, bug, self._out, self._place))

    def close(self) -> None:
        self._place.close()

    def _try(self, what: str, make: Callable[[], SweTask]) -> None:
        started = time.monotonic()
        try:
            task = make()
            self.num_tasks += 1
            fails, passes = (len(task.row[each]) for each in ("FAIL_TO_PASS", "PASS_TO_PASS"))
            said = f"task {task.id}: {fails} tests to pass, {passes} to keep"
        except (NoTask, EnvError) as error:
            said = f"no task: {error}"
        sys.stdout.write(f"{what}: {said} ({time.monotonic() - started:.1f} s)\n")
        sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m envs.swe.mine", description="Task folders of packages on PyPI.")
    parser.add_argument("--out", type=Path, required=True, help="a task repository: FOLDER/tasks")
    parser.add_argument("--bugs", type=int, default=0, help="so many small bugs tried per package, beside the pairs")
    parser.add_argument("--seed", type=int, default=0, help="which bugs")
    parser.add_argument(
        "pairs", nargs="*", metavar="NAME OLD NEW", help=f"packages and versions; else {len(PAIRS)} known"
    )
    options = parser.parse_args(arguments)
    words = options.pairs
    if len(words) % 3:
        parser.error(f"{' '.join(words)} is no list of NAME OLD NEW")
    pairs = [tuple(words[at : at + 3]) for at in range(0, len(words), 3)] or PAIRS
    miner = Miner(options.out)
    try:
        for name, old, new in pairs:
            miner.pair(name, old, new)
        for name, version in sorted({name: new for name, _, new in pairs}.items()) if options.bugs else ():
            miner.bugs(name, version, options.bugs, options.seed)
    finally:
        miner.close()
    sys.stdout.write(f"{miner.num_tasks} tasks in {options.out / 'tasks'}\n")
    return 0 if miner.num_tasks else 1


if __name__ == "__main__":
    sys.exit(main())
