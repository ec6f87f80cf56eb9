"""`clawrl play ENV`: a person takes the agent's seat in an environment, or `--gold` watches its own solution.

    reset ─► messages and tools, shown ─► a line ─► assistant message ─► step ─► observations, shown ─► … ─► verdict

Knows the environment interface, how a typed line becomes an assistant message, and how messages are shown. Ignores what
an environment does, models and the gateway. Observations are cut as the rollout cuts them.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from clawrl.errors import EnvError, boundary
from clawrl.types import Message, Tool

HOW = (
    'A line calls a tool: NAME {"key": "value"}, NAME key=value key="a JSON string\\n", or, where it needs one text, '
    "NAME text. Any other line is a message. Ctrl-D ends."
)

_PAIR = r'\w+=(?:"(?:[^"\\]|\\.)*"|[^\s"]\S*)'
_PAIRS = re.compile(rf"{_PAIR}(?:\s+{_PAIR})*")
_PICTURE = re.compile(r"data:image/(\w+);base64,(.*)", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add(commands: Any) -> None:
    """Register the parser."""
    about = "take the agent's seat in an environment"
    parser = commands.add_parser("play", help=about, description=f"{about.capitalize()}. {HOW}")
    parser.add_argument("env", metavar="ENV", help="terminal, toolcall …, or gymnasium's name package:clawrl/Name-v0")
    parser.add_argument("--split", default="train", help="train or held_out (default: %(default)s)")
    parser.add_argument("--task", type=int, metavar="N", help="the task's number (default: one is drawn)")
    parser.add_argument("--seed", type=int, help="which task is drawn")
    parser.add_argument(
        "--option", action="append", default=[], type=_option, metavar="KEY=VALUE", help="for the environment; repeat"
    )
    parser.add_argument("--gold", action="store_true", help="play the task's own solution; exit code 1 if it fails")
    parser.set_defaults(run=_play)


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, _value(value, {})


def _play(options: argparse.Namespace) -> int:
    screen = _Screen()
    chosen = {"split": options.split} | ({} if options.task is None else {"task": options.task})
    with closing(_make(options.env, dict(options.option))) as env:
        seen, facts = env.reset(seed=options.seed, options=chosen)
        print(f"task {facts['task']}\n{_usage(facts['tools'])}\n")
        screen.show(seen)
        world: Any = env.unwrapped
        actions = _golden(world.gold(world.task)) if options.gold else _typed(facts["tools"])
        outcome = _outcome(env, actions, screen)
        if outcome is None:
            print("the lines ended before the task did; it is graded as it stands")
            outcome = world.grade()
        print(f"verdict {outcome:g} (1 solved, -1 not at all)")
    if options.gold and outcome < 1:
        raise EnvError(f"the solution of task {facts['task']} does not solve it; correct the solution or the tests")
    return 0


def _make(name: str, options: Mapping[str, Any]) -> Any:
    """The environment of that name. Raises EnvError if there is none, or it refuses the options."""
    import gymnasium

    from clawrl.rollout.env import AgentEnv

    if ":" not in name:
        importlib.import_module("envs")  # as gymnasium does for "envs:…"; it registers our own
        own = {each.split("/")[1].rpartition("-v")[0].lower(): each for each in gymnasium.registry if "clawrl/" in each}
        if name not in own:
            raise EnvError(
                f"there is no environment {name!r}; use one of {', '.join(sorted(own))}, or gymnasium's name for "
                "yours, such as package:clawrl/Name-v0"
            )
        name = f"envs:{own[name]}"
    with boundary(EnvError, f"environment {name!r} cannot be made"):
        env = gymnasium.make(name, disable_env_checker=True, **options)
    if not isinstance(env.unwrapped, AgentEnv):
        raise EnvError(f"environment {name!r} is not played by chat messages: it is no clawrl.rollout.env.AgentEnv")
    return env


def _outcome(env: Any, actions: Iterator[Message], screen: _Screen) -> float | None:
    """The verdict, once an action has ended the episode; None if the actions end first."""
    for action in actions:
        seen, _, terminated, _, facts = env.step(action)
        screen.show(seen)
        if terminated:
            return facts["outcome"]
    return None


# -- what is typed ----------------------------------------------------------------------------------------------------


def action_of(line: str, tools: Sequence[Tool]) -> Message:
    """The assistant message that a line means. Whether a call is well-formed, the environment says."""
    name, _, rest = line.strip().partition(" ")
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if name not in known:
        return {"role": "assistant", "content": line.strip()}
    function = {"name": name, "arguments": _arguments(rest.strip(), known[name])}
    call = {"id": "call_0", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def _arguments(text: str, schema: Mapping[str, Any]) -> str:
    """JSON, as a model gives it; words that are no arguments stay as they are."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not text:
        return "{}"
    if _PAIRS.fullmatch(text):
        pairs = [pair.split("=", 1) for pair in re.findall(_PAIR, text)]
        if all(key in properties for key, _ in pairs):
            return json.dumps({key: _value(value, properties[key]) for key, value in pairs})
    if not text.startswith("{") and len(required) == 1 and properties[required[0]].get("type") == "string":
        return json.dumps({required[0]: _value(text, properties[required[0]])})
    return text


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """A value as JSON where it is some; where a string is asked for, only what is in double quotes is read as JSON."""
    if schema.get("type") == "string" and not text.startswith('"'):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _typed(tools: Sequence[Tool]) -> Iterator[Message]:
    """The person's messages, until the lines end."""
    while (line := _line()) is not None:
        if line.strip():
            yield action_of(line, tools)


def _line() -> str | None:
    """The next line; None at the end of input."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 (input() edits lines with it)

        try:
            return input("> ")
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    if not line:
        return None
    print(f"> {line.rstrip()}")
    return line


def _golden(actions: Sequence[Message]) -> Iterator[Message]:
    for action in actions:
        for call in action.get("tool_calls") or ():
            arguments = call["function"]["arguments"]
            told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            print(f"> {call['function']['name']} {told}")
        if action.get("content"):
            print(f"> {action['content']}")
        yield action


# -- what is shown ----------------------------------------------------------------------------------------------------


def _usage(tools: Sequence[Tool]) -> str:
    """One line per tool, and how they are called."""
    lines = []
    for tool in tools:
        function = tool["function"]
        schema = function.get("parameters") or {}
        required = schema.get("required", [])
        keys = [key if key in required else f"[{key}]" for key in schema.get("properties", {})]
        lines.append(f"  {' '.join([function['name'], *keys])}: {function.get('description', '')}")
    return "\n".join(["tools", *lines, HOW]) if lines else "Every line is a message. Ctrl-D ends."


class _Screen:
    """Prints messages. Pictures go to files; control characters are shown as such, never obeyed."""

    def __init__(self) -> None:
        from clawrl.rollout.agent import Limits, cut

        self._cut, self._most = cut, Limits().observation_chars
        self._folder: Path | None = None
        self._num_pictures = 0

    def show(self, messages: Sequence[Message]) -> None:
        for message in messages:
            content = self._cut(message, self._most).get("content") or ""
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            told = "\n".join(map(self._part, parts))
            print(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", f"{message['role']}: {told}"), flush=True)

    def _part(self, part: Mapping[str, Any]) -> str:
        if part.get("type") != "image_url":
            return str(part.get("text", ""))
        found = _PICTURE.fullmatch(part["image_url"]["url"])
        return f"[picture: {part['image_url']['url'] if found is None else self._saved(found[1], found[2])}]"

    def _saved(self, ending: str, content: str) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="clawrl-play-"))
        self._num_pictures += 1
        path = self._folder / f"{self._num_pictures}.{ending}"
        path.write_bytes(base64.b64decode(content))
        return path
