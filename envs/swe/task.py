"""Tasks in folders, in the layout of swebench's task repositories.

    tasks/<id>/  task.yaml  tests.json  problem_statement.md  gold.patch  test.patch  eval.sh  [Dockerfile  …]

task.yaml names `image` (a docker tag, a root file system), or the Dockerfile beside it is the image, built without
network; either has the repository at /testbed with the base commit checked out. eval.sh brings the tests in and runs
them, as swebench's harness has it; where it applies no patch itself, test.patch is applied before it.

Knows the layout. Ignores sandboxes and how a run is judged. What a folder lacks is told by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clawrl.errors import EnvError
from clawrl.rollout.env import Task

REPO = "/testbed"
"""Where swebench's images have the repository."""
MARKS = (">>>>> Start Test Output", ">>>>> End Test Output")
EVAL_S = 600.0


@dataclass(frozen=True, slots=True)
class SweTask(Task):
    """One instance: what the agent reads, the world it finds, and what proves that it is done.

    row       the instance as swebench's harness takes it: tests to pass, eval script, name of the log parser …
    image     of the sandbox: a docker tag, or the folder with the Dockerfile
    eval_s    seconds that the tests may take (`eval_timeout` in task.yaml)
    """

    statement: str
    image: str
    gold_patch: str
    test_patch: str
    row: Mapping[str, Any]
    eval_s: float = EVAL_S

    @property
    def brings_tests(self) -> bool:
        """Whether eval.sh applies the tests' patch by itself."""
        return "git apply" in self.row["eval_script"]


def read_tasks(folder: Path) -> list[SweTask]:
    """The tasks of a task repository (its folder `tasks`), of a folder of task folders, or the one that it is.

    Raises EnvError if there is none, or one is broken.
    """
    if not folder.is_dir():
        raise EnvError(f"swe: {folder} is no folder; give one with task folders (task.yaml, tests.json, eval.sh …)")
    if (folder / "task.yaml").is_file():
        return [read_task(folder)]
    root = folder / "tasks" if (folder / "tasks").is_dir() else folder
    tasks = [read_task(each) for each in sorted(root.iterdir()) if (each / "task.yaml").is_file()]
    if not tasks:
        raise EnvError(f"swe: {root} holds no task; a task is a folder with a task.yaml")
    return tasks


def read_task(folder: Path) -> SweTask:
    """One task folder. Raises EnvError naming the file and what to do."""
    told = _yaml(folder / "task.yaml")
    if (id := told.get("instance_id", folder.name)) != folder.name:
        raise EnvError(f"{folder / 'task.yaml'}: instance_id {id!r} is not the folder's name; write {folder.name!r}")
    image = told.get("image") or (str(folder) if (folder / "Dockerfile").is_file() else None)
    if not isinstance(image, str):
        raise EnvError(f"{folder} has no image; add a Dockerfile that puts the repository at {REPO}, or `image: TAG`")
    row = {
        "repo": "unknown", "version": "0", "base_commit": "HEAD", "log_parser": "parse_log_pytest_v2",
        "eval_type": "pass_and_fail", **told, "instance_id": id, "image": image,
        "eval_script": _eval_script(folder / "eval.sh"), **_tests(folder / "tests.json"),
    }  # fmt: skip
    return SweTask(
        id=id,
        statement=_text(folder / "problem_statement.md").strip(),
        image=image,
        gold_patch=_patch(folder / "gold.patch"),
        test_patch=_patch(folder / "test.patch"),
        row=row,
        eval_s=_seconds(told.get("eval_timeout", EVAL_S), folder / "task.yaml"),
    )


def files_of(patch: str) -> set[str]:
    """The files that a patch of ours touches, by its `diff --git` lines. Not for patches of an agent: ask git."""
    return {name for pair in re.findall(r"^diff --git a/(.+) b/(.+)$", patch, re.MULTILINE) for name in pair}


def _tests(path: Path) -> dict[str, list[str]]:
    try:
        told = json.loads(_text(path))
    except ValueError as error:
        raise EnvError(f"{path} is not valid JSON: {error}") from error
    found = {name: told.get(name) if isinstance(told, dict) else None for name in ("FAIL_TO_PASS", "PASS_TO_PASS")}
    for name, tests in found.items():
        if not isinstance(tests, list) or not all(isinstance(each, str) for each in tests):
            raise EnvError(f"{path}: {name} = {tests!r} must be a list of test names")
    if not found["FAIL_TO_PASS"]:
        raise EnvError(f"{path}: FAIL_TO_PASS is empty, so nothing tells a solution; name the tests it makes pass")
    return found  # type: ignore[return-value]


def _eval_script(path: Path) -> str:
    script = _text(path)
    for mark in MARKS:
        if mark not in script:
            raise EnvError(f"{path} has no mark; write `: '{mark}'` on a line of its own around the tests")
    return script


def _patch(path: Path) -> str:
    """newline="" keeps the line ends that a patch speaks of. An empty one is allowed."""
    text = _text(path)
    if text.strip() and "diff --git" not in text:
        raise EnvError(f"{path} is no patch; write it with git diff")
    return text


def _yaml(path: Path) -> dict[str, Any]:
    try:
        told = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise EnvError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(told, dict):
        raise EnvError(f"{path} must be a table, such as `instance_id: {path.parent.name}`")
    return told


def _text(path: Path) -> str:
    if not path.is_file():
        raise EnvError(f"task folder {path.parent} lacks {path.name}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise EnvError(f"{path} is not UTF-8 text: {error}") from error


def _seconds(value: Any, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise EnvError(f"{path}: eval_timeout = {value!r} must be a number of seconds above 0")
    return float(value)
