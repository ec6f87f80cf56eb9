"""The house rules of DESIGN.md, read from the source: imports point down only, and functions stay short."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES = 70

LEVELS = {
    "types": 0,
    "errors": 0,
    "observe": 0,
    "testing": 1,
    "config": 1,
    "algorithms": 2,
    "journal": 3,
    "serving": 4,
    "rollout": 4,
    "training": 4,
    "main": 5,
    "commands": 6,
    "cli": 7,
}
"""A module imports from its own part or from lower levels; parts of one level above 0 never import each other."""

FOREIGN = {
    "types": {"numpy"},
    "errors": set(),
    "algorithms": {"numpy", "torch"},
}
"""Where only these packages beside the standard library may be imported."""

ENV_ALLOWED = ("clawrl.types", "clawrl.errors", "clawrl.rollout.env")

PURE = [
    "rollout/samples.py",
    "training/pack.py",
    "training/versions.py",
    "training/history.py",
    "serving/sessions.py",
    "serving/judging.py",
]
"""Modules whose computations run without Ray."""


def modules(*folders: str) -> list[Path]:
    """All Python files below the folders; generated and vendored trees are not ours."""
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return [path for path in found if not {"build", "repo"}.intersection(path.parts)]


@cache
def parsed(path: Path) -> tuple[str | None, tuple[ast.AST, ...]]:
    """A file's docstring, and its statements that the rules are about."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    about = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef)
    return ast.get_docstring(tree), tuple(node for node in ast.walk(tree) if isinstance(node, about))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those within functions too; `from a import b` gives `a.b`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in parsed(path)[1]:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def part_of(name: str) -> str | None:
    """The part of clawrl that a dotted name belongs to; None outside clawrl."""
    first, *rest = name.split(".")
    return rest[0] if first == "clawrl" and rest else None


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def upward_imports(path: Path) -> list[str]:
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own in (None, "__init__", "__main__"):
        return []
    assert own in LEVELS, f"{path} is a part that DESIGN.md does not place; add it to LEVELS with its level"
    wrong = []
    for line, name in imports(path):
        other = part_of(name)
        if other is None or other == own or other not in LEVELS:
            continue
        if LEVELS[other] > LEVELS[own] or (LEVELS[other] == LEVELS[own] > 0):
            wrong.append(f"{place(path, line)} imports {name}")
    return wrong


def test_imports_point_down_only():
    assert [line for path in modules("clawrl") for line in upward_imports(path)] == []


def test_the_rule_sees_a_wrong_import(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    wrong = {
        "clawrl/training/a.py": "def f():\n    from clawrl.serving import judge",
        "clawrl/config.py": "import clawrl.journal.store",
        "clawrl/rollout/b.py": "from ..training import pack",
    }
    fine = {
        "clawrl/training/c.py": "from clawrl.algorithms import losses\nfrom . import pack\nimport torch",
        "clawrl/main.py": "from clawrl.serving import app\nfrom clawrl.training import trainer",
    }
    for name, text in {**wrong, **fine}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert all(upward_imports(tmp_path / name) for name in wrong)
    assert not any(upward_imports(tmp_path / name) for name in fine)


def test_lowest_parts_import_few_packages():
    import sys

    wrong = [
        f"{place(path, line)} imports {name}"
        for path in modules("clawrl")
        if (own := part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))) in FOREIGN
        for line, name in imports(path)
        if (package := name.split(".")[0]) not in FOREIGN[own] | sys.stdlib_module_names | {"clawrl"}
        and package != "__future__"
    ]
    assert wrong == []


def test_pure_modules_know_no_ray():
    wrong = [
        f"{place(path, line)} imports {name}"
        for path in (ROOT / "clawrl" / name for name in PURE)
        if path.exists()
        for line, name in imports(path)
        if name.split(".")[0] == "ray"
    ]
    assert wrong == []


def test_environments_see_three_modules_of_clawrl():
    wrong = [
        f"{place(path, line)} imports {name}"
        for path in modules("envs")
        for line, name in imports(path)
        if name.split(".")[0] == "clawrl" and not any(name == ok or name.startswith(ok + ".") for ok in ENV_ALLOWED)
    ]
    assert wrong == []


def test_clawrl_knows_no_environment_and_no_job_by_import():
    allowed = {"main", "cli", "commands"}
    wrong = [
        f"{place(path, line)} imports {name}"
        for path in modules("clawrl")
        if part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) not in allowed
        for line, name in imports(path)
        if name.split(".")[0] in ("envs", "jobs")
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", ["clawrl", "envs", "jobs"])
def test_no_function_is_longer_than_70_lines(folder):
    long = [
        f"{place(path, node.lineno)} {node.name}: {lines} lines"
        for path in modules(folder)
        for node in parsed(path)[1]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_LINES
    ]
    assert long == []


def test_every_module_opens_with_what_it_knows():
    silent = [
        str(path.relative_to(ROOT))
        for path in modules("clawrl", "envs", "jobs")
        if path.name != "__init__.py" and not parsed(path)[0]
    ]
    assert silent == []
