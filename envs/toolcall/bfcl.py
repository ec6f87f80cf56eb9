"""Berkeley Function-Calling Leaderboard, simple and multiple: held-out tasks of one question and one call.

    user: Find the area of a triangle with a base of 10 units and height of 5 units.
    assistant: calculate_triangle_area(base=10, height=5)     ─► the leaderboard's own ast_checker: 1 or -1

Evaluation only: there is nothing to train on. Data and checker are those of the installed package `bfcl-eval`; its
needs (numpy 1.26, a hundred packages) are for its model handlers, so it is installed with --no-deps.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from clawrl.errors import EnvError, boundary
from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, Task, calls
from clawrl.types import Message, Tool

CATEGORIES = ("simple_python", "multiple", "live_simple", "live_multiple")
MODEL = "clawrl"


@dataclass(frozen=True, slots=True)
class BfclTask(Task):
    """`functions` as the data give them; `expected`: function → parameter → the values that are right, "" for none."""

    category: str
    messages: tuple[Message, ...]
    functions: tuple[Mapping[str, Any], ...]
    expected: tuple[Mapping[str, Any], ...]


class BfclEnv(AgentEnv[BfclTask]):
    """categories: simple_python (400 tasks), multiple (200), and by name live_simple (258), live_multiple (1053)."""

    name = "bfcl"

    def __init__(self, categories: Sequence[str] = ("simple_python", "multiple")) -> None:
        """Raises EnvError for a category that there is not, or without bfcl-eval."""
        super().__init__()
        unknown = [each for each in categories if each not in CATEGORIES]
        if unknown or not categories:
            raise EnvError(f"bfcl: categories={list(categories)} must be some of {', '.join(CATEGORIES)}")
        self._tasks = [task for each in categories for task in read_category(each)]
        self._action: Message = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """As AgentEnv's, but the split is held_out unless named."""
        return super().reset(seed=seed, options={"split": "held_out", **(options or {})})

    def make_task(self, number: int, split: Split) -> BfclTask:
        """Tasks in the leaderboard's order. Raises EnvError for split train."""
        if split != "held_out":
            raise EnvError("bfcl: it is for evaluation only and has no tasks in split train; use held_out")
        return self._tasks[number % len(self._tasks)]

    def begin(self, task: BfclTask) -> Opening:
        self._action = {}
        return Opening(task.messages, tuple(map(described, task.functions)))

    def act(self, action: Message) -> Answer:
        """The first message is the answer, and ends the episode; what is wrong with it is in info."""
        self._action = action
        made = calls(action, self.tools)
        why = [call.reply(call.problem or "noted") for call in made]
        return Answer(tuple(why), terminated=True, info={"error": self._error()})

    def grade(self) -> float:
        return -1.0 if self._error() else 1.0

    def _error(self) -> str:
        """The checker's words; empty if the call is right."""
        assert self.task is not None
        made = calls(self._action, self.tools)
        unread = [call.problem for call in made if call.problem and not call.arguments]
        if unread:
            return str(unread[0])
        task, said = self.task, [{call.name: call.arguments} for call in made]
        if not said:
            return "error: no function was called"
        found = checker()(list(task.functions), said, list(task.expected), _python(), task.category, MODEL)
        return "" if found["valid"] else f"error: {found['error']}"

    def gold(self, task: BfclTask) -> Sequence[Message]:
        """The first right value of every parameter."""
        required = {each["name"]: each["parameters"].get("required", ()) for each in task.functions}
        tool_calls = [
            {"id": f"call_{at}", "type": "function", "function": {"name": _name(name), "arguments": arguments}}
            for at, call in enumerate(task.expected)
            for name, given in call.items()
            for arguments in [dict.fromkeys(required[name], "") | _chosen(given)]
        ]
        return [{"role": "assistant", "content": None, "tool_calls": tool_calls}]


# -- the package ------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    found = importlib.util.find_spec("bfcl_eval")
    if found is None or not found.submodule_search_locations:
        raise EnvError("bfcl: bfcl-eval is not installed; pip install --no-deps bfcl-eval==2026.3.23")
    return Path(found.submodule_search_locations[0])


@cache
def checker() -> Callable[..., dict[str, Any]]:
    """bfcl_eval's ast_checker. Its module imports the handlers of all models, with the client libraries of a dozen
    makers, of which it reads one setting: whether a model's names have `_` for `.`, as OpenAI's API wants it. That is
    true for every model here, so that the setting stands in for the handlers while it is imported.
    """
    _folder()
    name = "bfcl_eval.constants.model_config"
    before, settings = sys.modules.get(name), ModuleType(name)
    settings.__dict__["MODEL_CONFIG_MAPPING"] = defaultdict(lambda: SimpleNamespace(underscore_to_dot=True))
    sys.modules[name] = settings
    try:
        with boundary(EnvError, "bfcl: the checker of bfcl-eval cannot be imported; this is made for 2026.3.23"):
            return importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _python() -> Any:
    return importlib.import_module("bfcl_eval.constants.enums").Language.PYTHON


@cache
def _types() -> Mapping[str, str]:
    """The data's names of types → JSON Schema's."""
    return importlib.import_module("bfcl_eval.constants.type_mappings").GORILLA_TO_OPENAPI


@cache
def read_category(category: str) -> tuple[BfclTask, ...]:
    """Raises EnvError without the package, or if its data are of another form."""
    data = _folder() / "data"
    with boundary(EnvError, f"bfcl: category {category} of bfcl-eval cannot be read; this is made for 2026.3.23"):
        asked, expected = (
            [json.loads(line) for line in (folder / f"BFCL_v4_{category}.json").read_text("utf-8").splitlines()]
            for folder in (data, data / "possible_answer")
        )
        right = {each["id"]: each["ground_truth"] for each in expected}
        return tuple(
            BfclTask(
                f"bfcl/{each['id']}", category, tuple(each["question"][0]), tuple(each["function"]),
                tuple(right[each["id"]]),
            )
            for each in asked
        )  # fmt: skip


def _name(name: str) -> str:
    return name.replace(".", "_")


def described(function: Mapping[str, Any]) -> Tool:
    """A function of the data as OpenAI's API describes one."""
    about = {"name": _name(function["name"]), "description": function["description"]}
    return {"type": "function", "function": {**about, "parameters": _schema(function["parameters"])}}


def _schema(given: Mapping[str, Any]) -> dict[str, Any]:
    found = {**given, "type": _types().get(given.get("type", "string"), "string")}
    if "properties" in given:
        found["properties"] = {name: _schema(each) for name, each in given["properties"].items()}
    if isinstance(given.get("items"), dict):
        found["items"] = _schema(given["items"])
    return found


def _chosen(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The first value of each parameter that is no "", which says that it may be left out."""
    found = {name: [_value(each) for each in values if each != ""] for name, values in parameters.items()}
    return {name: values[0] for name, values in found.items() if values}


def _value(value: Any) -> Any:
    """Within an object every value is a list of right ones again."""
    if isinstance(value, dict):
        return _chosen(value)
    return [_value(each) for each in value] if isinstance(value, list) else value
