"""A task folder made of two source trees: the old one as the base, the new one's sources as gold, its tests as judge.

    old, new ─► gold.patch (sources), test.patch (tests), eval.sh, Dockerfile, repo/ (old)
    run the new tests on old, and on old + gold ─► FAIL_TO_PASS, PASS_TO_PASS, or why it is no task

Knows the layout (`task`) and runs tests in a sandbox. Ignores where trees come from.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from envs.swe.env import Place
from envs.swe.grading import judge, run_tests, spec_of, statuses
from envs.swe.patches import is_test
from envs.swe.task import MARKS, REPO, SweTask, files_of, read_task

PASSED = ("PASSED", "XFAIL")
RUNS = 2
"""On each tree, to see which tests do not end alike."""
SKIPPED = {".git", "__pycache__", ".pytest_cache", ".tox", ".venv", "PKG-INFO"}
DOCKERFILE = f"""\
FROM clawrl-python
COPY repo {REPO}
WORKDIR {REPO}
RUN git init -q . && git add -A -f && git -c user.name=clawrl -c user.email=clawrl@localhost commit -q -m base
"""
IGNORED = "task.yaml\ntests.json\ngold.patch\ntest.patch\neval.sh\nproblem_statement.md\n"
"""What the image does not have, beside the Dockerfile: solution and tests; nor is it made again when they change."""
EVAL = """\
#!/bin/bash
set -uxo pipefail
cd {repo}
{bring}
: '{start}'
PYTHONPATH={repo}/src:{repo}:$PYTHONPATH python3 -m pytest -rA --tb=short -p no:cacheprovider {tests}
: '{end}'
"""
APPLY = """\
git apply --whitespace=nowarn - <<'END_OF_TESTS'
{patch}
END_OF_TESTS"""


class NoTask(Exception):
    """Two trees that make no task, and why."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A task to be: its id, the trees, what the agent is told, and how long its tests may take."""

    id: str
    old: Path
    new: Path
    statement: str
    repo: str
    version: str
    eval_s: float = 120.0


def build(draft: Draft, out: Path, place: Place) -> SweTask:
    """Write the task folder `out`/id. Raises NoTask with the reason; then nothing is left of it."""
    folder = out / draft.id
    if folder.exists():
        shutil.rmtree(folder)
    try:
        _write(draft, folder)
        _find_tests(folder, place)
        task = read_task(folder)
        if (report := judge(task, task.gold_patch.encode(), place.fresh(task.image))).status != "resolved":
            raise NoTask(f"its own gold patch does not pass once more ({report.status})")
        return task
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def copy_tree(source: Path, target: Path) -> None:
    """Files alone: no caches, no packaging's metadata, no times (git takes same time and size for the same file)."""
    for name in _names(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def sources(tree: Path) -> list[str]:
    """Python files that are no tests, by name."""
    return [name for name in _names(tree) if name.endswith(".py") and name != "setup.py" and not is_test(name)]


def _write(draft: Draft, folder: Path) -> None:
    copy_tree(draft.old, folder / "repo")
    gold, tests = patches(draft.old, draft.new)
    if not gold:
        raise NoTask("no source file differs")
    roots = [name for name in ("tests", "test") if (draft.new / name).is_dir()]
    roots = roots or [name for name in _names(draft.new) if is_test(name) and name.endswith(".py")]
    if not roots:
        raise NoTask("the new tree has no tests")
    told = {
        "instance_id": draft.id, "repo": draft.repo, "version": draft.version, "base_commit": "HEAD", "split": "train",
        "log_parser": "parse_log_pytest_v2", "eval_type": "pass_and_fail", "eval_timeout": draft.eval_s,
    }  # fmt: skip
    files = {
        "task.yaml": yaml.safe_dump(told, sort_keys=False),
        "problem_statement.md": draft.statement.strip() + "\n",
        "gold.patch": gold,
        "test.patch": tests,
        "Dockerfile": DOCKERFILE,
        ".dockerignore": IGNORED,
        "eval.sh": _eval(tests, draft.old, roots),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")


def _eval(tests: str, old: Path, roots: Iterable[str]) -> str:
    """The script that swebench's harness runs: put the tests' own files back, bring the new ones in, run them all."""
    start, end = MARKS
    changed = sorted(files_of(tests))
    there = [name for name in changed if (old / name).exists()]
    bring = [f"rm -f {shlex.join(changed)}"] if changed else []
    bring += [f"git checkout HEAD -- {shlex.join(there)}"] if there else []
    bring += [APPLY.format(patch=tests.rstrip("\n"))] if changed else []
    return EVAL.format(repo=REPO, bring="\n".join(bring), start=start, end=end, tests=shlex.join(roots))


def _find_tests(folder: Path, place: Place) -> None:
    """Write tests.json by running them on both trees. Raises NoTask if none tells the trees apart.

    Tests that pass at one time and fail at another on the same tree are left out.
    """
    (folder / "tests.json").write_text('{"FAIL_TO_PASS": ["unknown"], "PASS_TO_PASS": []}')
    task = read_task(folder)
    runs = [[_passing(task, patch, place) for _ in range(RUNS)] for patch in ("", task.gold_patch)]
    (ever, always), (ever_after, always_after) = ((set.union(*each), set.intersection(*each)) for each in runs)
    if not always_after:
        raise NoTask("no test passes with the new sources")
    if not always_after - ever:
        raise NoTask("every test that passes with the new sources passes with the old ones")
    if always - ever_after:
        raise NoTask(f"{len(always - ever_after)} tests pass with the old sources only")
    tests = {"FAIL_TO_PASS": sorted(always_after - ever), "PASS_TO_PASS": sorted(always_after & always)}
    (folder / "tests.json").write_text(json.dumps(tests, indent=1, ensure_ascii=False) + "\n")


def _passing(task: SweTask, patch: str, place: Place) -> set[str]:
    sandbox = place.fresh(task.image)
    if patch:
        sandbox.put({"tmp/patch.diff": patch.encode()})
        if not (done := sandbox.exec("git apply --whitespace=nowarn /tmp/patch.diff", cwd=REPO)).ok:
            raise NoTask(f"the gold patch does not apply: {done.output[-200:]}")
    ran = run_tests(task, sandbox)
    if ran.timed_out:
        raise NoTask(f"its tests take longer than {task.eval_s:g} s")
    return {name for name, status in statuses(spec_of(task), ran.output).items() if status in PASSED}


def patches(old: Path, new: Path) -> tuple[str, str]:
    """(what changed in the sources, what changed in the tests), by git. Raises NoTask for text that is not UTF-8."""
    chosen = {*sources(old), *sources(new)}, {name for tree in (old, new) for name in _names(tree) if is_test(name)}
    with tempfile.TemporaryDirectory() as name:
        repo = Path(name)
        copy_tree(old, repo)
        _git(repo, "init", "-q")
        _git(repo, "add", "-A", "-f")
        _git(repo, "-c", "user.name=clawrl", "-c", "user.email=clawrl@localhost", "commit", "-qm", "base")
        first, second = (_diff(repo, new, names) for names in chosen)
        return first, second


def _diff(repo: Path, new: Path, names: Iterable[str]) -> str:
    """These files as they are in the new tree, against the repository's commit, which they are put back to."""
    for name in names:
        if (new / name).is_file():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(new / name, repo / name)
        else:
            (repo / name).unlink(missing_ok=True)
    _git(repo, "add", "-A", "-f")
    patch = _git(repo, "diff", "--cached", "--binary", "--no-renames", "HEAD")
    _git(repo, "reset", "-q", "--hard")
    try:
        return patch.decode()
    except UnicodeDecodeError as error:
        raise NoTask(f"a changed file is not UTF-8 text ({error})") from error


def _git(repo: Path, *words: str) -> bytes:
    """This machine's git, without anybody's settings."""
    env = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    return subprocess.run(["git", *words], cwd=repo, env=env, capture_output=True, check=True, timeout=120).stdout


def _names(tree: Path) -> list[str]:
    """The files of a tree that a task has, relative to it."""
    return sorted(
        str(path.relative_to(tree))
        for path in tree.rglob("*")
        if path.is_file() and not any(_skipped(part) for part in path.relative_to(tree).parts)
    )


def _skipped(name: str) -> bool:
    return name in SKIPPED or name.endswith((".egg-info", ".pyc"))
