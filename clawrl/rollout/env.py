"""The environment interface: a `gymnasium.Env` over chat messages, one task at a time.

    reset(seed, options) ─► messages, {"task", "tools"}          options: {"split": "train" | "held_out"}, {"task": ...}
    step(assistant message) ─► messages, reward, terminated, truncated, {}
    grade() ─► verdict on the world as it is now, in [-1, 1]

Knows messages, tools and tasks. Ignores models, tokens, Ray and who acts. An environment stays short: it makes a task,
answers an action, gives a verdict. How many turns an episode may have, how long it may take and how much of an
observation is shown belong to the rollout (`rollout.agent`), which calls `grade` when it cuts an episode short.

A malformed action is no failure: it is answered by an observation that says what was expected.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import gymnasium
import jsonschema
import numpy as np

from clawrl.errors import EnvError
from clawrl.types import Message, Tool

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")
HELD_OUT_SHARE = 0.2
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


@dataclass(frozen=True, slots=True)
class Task:
    """What an episode is about. Environments subclass it; `id` names it for ever and decides its split."""

    id: str


TaskT = TypeVar("TaskT", bound=Task)


@dataclass(frozen=True, slots=True)
class Opening:
    """How a task begins: the messages the agent reads first, and the tools it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What followed an action. `reward` is this step's own, 0 where only the outcome counts."""

    messages: tuple[Message, ...] = ()  # tool results, or a user message; may be empty once the episode is over
    terminated: bool = False
    reward: float = 0.0
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """One tool call of an assistant message, its arguments checked against the tool's schema."""

    id: str
    name: str
    arguments: dict[str, Any]
    problem: str | None = None  # what is wrong with it, in words for the agent; the arguments then say nothing

    def reply(self, content: str) -> Message:
        """The tool message that answers this call."""
        return {"role": "tool", "tool_call_id": self.id, "content": content}


class MessageSpace(gymnasium.Space[Message]):
    """One assistant message in OpenAI's shape."""

    def contains(self, x: Any) -> bool:
        return is_message(x) and x["role"] == "assistant"

    def sample(self, mask: Any = None, probability: Any = None) -> Message:
        return {"role": "assistant", "content": f"{int(self.np_random.integers(1000))}"}

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)


class MessagesSpace(gymnasium.Space[tuple[Message, ...]]):
    """Any number of messages, in the order they are read."""

    def contains(self, x: Any) -> bool:
        return isinstance(x, tuple) and all(map(is_message, x))

    def sample(self, mask: Any = None, probability: Any = None) -> tuple[Message, ...]:
        return ({"role": "user", "content": f"{int(self.np_random.integers(1000))}"},)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self)


class AgentEnv(gymnasium.Env[tuple[Message, ...], Message], Generic[TaskT], ABC):
    """Base of all environments. An environment has one task at a time and may be reset for ever."""

    name: ClassVar[str]
    """The source of its turns (`X-Source`)."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (gymnasium declares it so)

    def __init__(self) -> None:
        self.observation_space = MessagesSpace()
        self.action_space = MessageSpace()
        self.task: TaskT | None = None
        self.opening: Opening | None = None
        self.tools: tuple[Tool, ...] = ()
        self.outcome: float | None = None  # of this episode, once it was graded
        self.workdir: str | None = None  # a folder of this machine where a program may act, if there is one

    # -- what an environment defines ---------------------------------------------------------------------------------

    @abstractmethod
    def make_task(self, number: int, split: Split) -> TaskT:
        """Task `number` of a split: the same number gives the same task, and no task is in both splits."""

    @abstractmethod
    def begin(self, task: TaskT) -> Opening:
        """Bring the world into the task's first state."""

    @abstractmethod
    def act(self, action: Message) -> Answer:
        """Do what an assistant message says."""

    @abstractmethod
    def grade(self) -> float:
        """The verdict on the world as it is now, in [-1, 1]: 1 solved, -1 not at all. May be asked once an episode."""

    @abstractmethod
    def gold(self, task: TaskT) -> Sequence[Message]:
        """Assistant messages that solve the task one after the other, to prove that it can be solved."""

    @classmethod
    def reconcile(cls, run: str) -> None:
        """Remove what killed processes of a run left on this machine. Called before a pool's worker makes the first.

        An environment that makes what outlives its process (a sandbox) overrides it, and has an option `run` that
        labels what it makes.
        """

    # -- gymnasium's side --------------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[tuple[Message, ...], dict[str, Any]]:
        """Begin the task `options["task"]` (its number), or one drawn by `seed`, of `options["split"]` (train).

        Raises EnvError for a split that there is none of.
        """
        super().reset(seed=seed)
        chosen = options or {}
        split = chosen.get("split", "train")
        if split not in SPLITS:
            raise EnvError(f"{self.name}: split {split!r} is unknown; use one of {', '.join(SPLITS)}")
        number = chosen.get("task")
        self.task = self.make_task(int(self.np_random.integers(2**31) if number is None else number), split)
        self.outcome = None
        self.opening = opening = self.begin(self.task)
        self.tools = opening.tools
        return deepcopy(opening.messages), {"task": self.task.id, "tools": deepcopy(opening.tools)}

    def step(self, action: Message) -> tuple[tuple[Message, ...], float, bool, bool, dict[str, Any]]:
        """Never truncates: that is the rollout's. The last reward has the verdict in it, which is `info["outcome"]`.

        Raises EnvError before the first reset.
        """
        if self.task is None:
            raise EnvError(f"{self.name}: step before reset; call reset first")
        answer = self.act(action)
        if not answer.terminated:
            return answer.messages, float(answer.reward), False, False, dict(answer.info)
        outcome = self.verdict()
        return answer.messages, float(answer.reward + outcome), True, False, {**answer.info, "outcome": outcome}

    def verdict(self) -> float:
        """The episode's outcome: graded when it is first asked for, and then the same.

        Raises EnvError if the environment gives anything but a number from -1 to 1.
        """
        if self.outcome is None:
            outcome = float(self.grade())
            if not -1 <= outcome <= 1:  # nor NaN
                raise EnvError(f"{self.name}: grade gave {outcome}; it must give a number from -1 to 1")
            self.outcome = outcome
        return self.outcome


def split_of(task: str, held_out_share: float = HELD_OUT_SHARE) -> Split:
    """The split a task's id belongs to, the same for ever and everywhere."""
    drawn = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8])
    return "held_out" if drawn < held_out_share * 2**64 else "train"


def nth_of_split(name: str, tasks: Sequence[TaskT], number: int, split: Split) -> TaskT:
    """Task `number` of those in a split, round and round. Raises EnvError, in the name of an environment, for none."""
    found = [task for task in tasks if split_of(task.id) == split]
    if not found:
        other = next(each for each in SPLITS if each != split)
        raise EnvError(f"{name}: none of the {len(tasks)} tasks is in split {split}; use {other}")
    return found[number % len(found)]


def draw(number: int, attempt: int = 0) -> np.random.Generator:
    """The random numbers a task is made from. `attempt` counts tries that fell into the other split."""
    return np.random.default_rng((number, attempt))


def is_message(value: Any) -> bool:
    """Whether it has the shape of a chat message."""
    return isinstance(value, dict) and value.get("role") in ROLES and ("content" in value or "tool_calls" in value)


def calls(action: Message, tools: Sequence[Tool]) -> list[Call]:
    """The tool calls of an action, each checked; a problem is told in words that the agent can act on."""
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    return [_checked(position, call, known) for position, call in enumerate(action.get("tool_calls") or ())]


def message_of(name: str, /, **arguments: Any) -> Message:
    """An assistant message that calls one tool."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def _no_number(word: str) -> None:
    """NaN and the infinities, which Python would read: they pass every bound of a schema."""
    raise ValueError(f"{word} is no number")


def _checked(position: int, call: Any, known: Mapping[str, dict[str, Any]]) -> Call:
    call = call if isinstance(call, dict) else {}
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    identity, name = str(call.get("id") or f"call_{position}"), str(function.get("name") or "")
    if name not in known:
        return Call(identity, name, {}, f"error: there is no tool {name!r}; the tools are {', '.join(known)}")
    raw = function.get("arguments")
    try:
        arguments = json.loads(raw if isinstance(raw, str) else json.dumps(raw), parse_constant=_no_number)
        json.dumps(arguments, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, TypeError, RecursionError) as error:
        return Call(identity, name, {}, f"error: the arguments of {name} are not valid JSON ({error})")
    if not isinstance(arguments, dict):
        return Call(identity, name, {}, f"error: the arguments of {name} must be a JSON object")
    found = next(iter(jsonschema.Draft202012Validator(known[name]).iter_errors(arguments)), None)
    problem = None if found is None else f"error: {name}: {found.message[:200]}"
    return Call(identity, name, arguments, problem)
