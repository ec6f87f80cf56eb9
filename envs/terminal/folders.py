"""Tasks in folders: Harbor's layout as it is, and Terminal-Bench 1's; both become a TerminalTask.

    Harbor            task.toml  instruction.md  environment/Dockerfile  tests/test.sh  solution/solve.sh
    Terminal-Bench 1  task.yaml  Dockerfile      run-tests.sh  tests/    solution.sh | solution.yaml

Knows the two layouts. Ignores sandboxes. What a folder lacks is told by name.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from clawrl.errors import EnvError
from envs.terminal.task import MIB, TerminalTask

_UNITS = {"": MIB, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}


def read_tasks(folder: Path) -> list[TerminalTask]:
    """The tasks of a folder: itself, or every task folder in it, by name. Raises EnvError if there is none."""
    if not folder.is_dir():
        raise EnvError(f"terminal: {folder} is no folder; give one with task folders (task.toml or task.yaml)")
    if _is_task(folder):
        return [read_task(folder)]
    tasks = [read_task(each) for each in sorted(folder.iterdir()) if each.is_dir() and _is_task(each)]
    if not tasks:
        raise EnvError(f"terminal: {folder} holds no task; a task is a folder with a task.toml or a task.yaml")
    return tasks


def read_task(folder: Path) -> TerminalTask:
    """One task folder. Raises EnvError naming what is missing or wrong."""
    if (folder / "task.toml").is_file():
        return _harbor(folder)
    if (folder / "task.yaml").is_file():
        return _terminal_bench(folder)
    raise EnvError(f"{folder} is no task: it has neither task.toml (Harbor) nor task.yaml (Terminal-Bench 1)")


def _is_task(folder: Path) -> bool:
    return (folder / "task.toml").is_file() or (folder / "task.yaml").is_file()


def _harbor(folder: Path) -> TerminalTask:
    file = folder / "task.toml"
    try:
        told = tomllib.loads(_text(file))
    except tomllib.TOMLDecodeError as error:
        raise EnvError(f"{file} is not valid TOML: {error}") from error
    world, verifier, solution = (_table(told, file, name) for name in ("environment", "verifier", "solution"))
    _refuse_what_is_not_done(folder, told, world)
    dockerfile = folder / "environment" / "Dockerfile"
    image = world.get("docker_image") or str(_there(dockerfile).parent)
    _there(folder / "tests" / "test.sh")
    return TerminalTask(
        id=f"{folder.name}",
        instruction=_text(folder / "instruction.md").strip(),
        image=image,
        workdir=_workdir(dockerfile),
        tests=_files(folder / "tests", "tests"),
        solution=_solution(folder, _strings(solution.get("env"), file)),
        solution_files=_files(folder / "solution", "solution"),
        env=_strings(world.get("env"), file),
        verify_env=_strings(verifier.get("env"), file),
        memory=_size(world, "memory", 2048 * MIB, file),
        disk=_size(world, "storage", 10240 * MIB, file),
        cpus=_number(world, "cpus", 1.0, file),
        verify_timeout=_number(verifier, "timeout_sec", 600.0, file),
        difficulty=str(_table(told, file, "metadata").get("difficulty", "unknown")),
    )


def _refuse_what_is_not_done(folder: Path, told: Mapping[str, Any], world: Mapping[str, Any]) -> None:
    """Raises EnvError for Harbor tasks of several containers or steps, and for those that need a GPU."""
    if (folder / "environment" / "docker-compose.yaml").is_file():
        raise EnvError(f"{folder}: environment/docker-compose.yaml is not supported; a task has one container")
    if told.get("steps"):
        raise EnvError(f"{folder / 'task.toml'}: steps are not supported; make each step a task of its own")
    if world.get("gpus"):
        raise EnvError(f"{folder / 'task.toml'}: gpus = {world['gpus']!r} is not supported; sandboxes have no GPU")


def _solution(folder: Path, env: Mapping[str, str]) -> str:
    """Shell text that runs solution/solve.sh with the variables of [solution.env]; empty if there is none."""
    if not (folder / "solution" / "solve.sh").is_file():
        return ""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in env.items()]
    return "\n".join([*exports, "bash /solution/solve.sh"])


def _terminal_bench(folder: Path) -> TerminalTask:
    told = _yaml(folder / "task.yaml")
    if not isinstance(told, dict) or not isinstance(told.get("instruction"), str):
        raise EnvError(f"{folder / 'task.yaml'} has no instruction; add `instruction: |` and the text")
    if (parser := told.get("parser_name", "pytest")) != "pytest":
        raise EnvError(f"{folder / 'task.yaml'}: parser_name {parser!r} is not supported; only pytest is")
    _there(folder / "Dockerfile")
    tests = {"tests/run-tests.sh": _there(folder / "run-tests.sh"), **_files(folder / "tests", "tests")}
    return TerminalTask(
        id=f"{folder.name}",
        instruction=told["instruction"].strip(),
        image=str(folder),
        workdir=_workdir(folder / "Dockerfile"),
        tests=tests,
        verify="bash /tests/run-tests.sh",
        verdict="pytest",
        solution=_old_solution(folder),
        verify_env={"TEST_DIR": "/tests"},
        verify_timeout=_number(told, "max_test_timeout_sec", 60.0, folder / "task.yaml"),
        difficulty=str(told.get("difficulty", "unknown")),
    )


def _old_solution(folder: Path) -> str:
    """solution.sh as it is, or the commands of a solution.yaml one below the other."""
    if (folder / "solution.sh").is_file():
        return _text(folder / "solution.sh")
    if (folder / "solution.yaml").is_file():
        told = _yaml(folder / "solution.yaml")
        if not isinstance(told, list) or not all(isinstance(each, dict) and "command" in each for each in told):
            raise EnvError(f"{folder / 'solution.yaml'} must be a list with a `command` in each item")
        return "\n".join(str(each["command"]) for each in told)
    return ""


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise EnvError(f"{path} is not valid YAML: {error}") from error


def _workdir(dockerfile: Path) -> str | None:
    """The last absolute WORKDIR of a Dockerfile; the image's own (None) if it names none."""
    if not dockerfile.is_file():
        return None
    found = re.findall(r"^\s*WORKDIR\s+(.+?)\s*$", _text(dockerfile), re.MULTILINE | re.IGNORECASE)
    last = (shlex.split(found[-1]) or [""])[0] if found else ""
    return last if last.startswith("/") and "$" not in last else None


def _files(folder: Path, at: str) -> dict[str, bytes | Path]:
    return {f"{at}/{path.relative_to(folder)}": path for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())


def _there(path: Path) -> Path:
    if not path.is_file():
        raise EnvError(f"task folder {path.parent} lacks {path.name}")
    return path


def _text(path: Path) -> str:
    try:
        return _there(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EnvError(f"{path} is not UTF-8 text: {error}") from error


def _table(told: Mapping[str, Any], file: Path, name: str) -> Mapping[str, Any]:
    value = told.get(name, {})
    if not isinstance(value, dict):
        raise EnvError(f"{file}: {name} = {value!r} must be a table")
    return value


def _strings(value: Any, file: Path) -> dict[str, str]:
    if not isinstance(value or {}, dict):
        raise EnvError(f"{file}: env = {value!r} must be a table of strings")
    found = {str(key): str(each) for key, each in (value or {}).items()}
    for key, text in found.items():
        if "${" in text:
            raise EnvError(f"{file}: env {key} = {text!r} asks for a variable of this machine; write its value instead")
    return found


def _number(told: Mapping[str, Any], name: str, default: float, file: Path) -> float:
    value = told.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise EnvError(f"{file}: {name} = {value!r} must be a number above 0")
    return float(value)


def _size(told: Mapping[str, Any], name: str, default: int, file: Path) -> int:
    """`memory_mb = 2048`, or the older `memory = "2G"`."""
    if f"{name}_mb" in told:
        return int(_number(told, f"{name}_mb", 1.0, file) * MIB)
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)i?B?", str(told.get(name, "")).strip(), re.IGNORECASE)
    if name in told and match is None:
        raise EnvError(f'{file}: {name} = {told[name]!r} is no size; write "2G" or {name}_mb = 2048')
    return int(match[1]) * _UNITS[match[2].upper()] if match else default
