"""The tool task the tiny model is shown: look up two stock counts, then compute. Deliberately noisy demonstrations.

Knows the two tools, their answers and how people get it wrong. Ignores models and HTTP. Half of the demonstrations
fail on purpose (guesses, skipped look-ups, wrong arguments, wrong operators, broken JSON), so that the base model
succeeds sometimes and reinforcement learning has something to do.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Literal

from clawrl.types import Message, Tool
from envs.chat.world import ITEMS, PLACES

Flaw = Literal["none", "guess", "skip", "argument", "operator", "json"]
FLAW_SHARES: dict[Flaw, float] = {
    "none": 0.52, "guess": 0.14, "skip": 0.12, "argument": 0.07, "operator": 0.08, "json": 0.07,
}  # fmt: skip
INVENTED_SHARE = 0.5

ONSETS = "b br d dr f fl g gl h j k kl l m n p pl r s st t tr v z".split()
VOWELS = "a e i o u ai oo".split()
CODAS = ["", "", "l", "m", "n", "r", "x", "k", "nt", "sh"]


def _function(name: str, description: str, *arguments: str) -> Tool:
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: list[Tool] = [
    _function("lookup", "Count of an item at a place.", "item", "place"),
    _function("calc", "Value of an expression.", "expression"),
]


@dataclass(frozen=True, slots=True)
class ToolTask:
    """Two counts to look up and one operation on them.

    The question quotes its words, so that they are the same tokens there and in a JSON argument: a model this small
    copies tokens, it does not spell.
    """

    item: str
    places: tuple[str, str]
    counts: tuple[int, int]
    sign: Literal["+", "-"]

    @property
    def question(self) -> str:
        first, second = self.places
        if self.sign == "+":
            return f'How many "{self.item}" are at "{first}" and "{second}" together?'
        return f'How many more "{self.item}" are at "{first}" than at "{second}"?'

    @property
    def answer(self) -> int:
        first, second = self.counts
        return first + second if self.sign == "+" else first - second


def invented_word(rng: random.Random, syllables: int | None = None) -> str:
    """A word that no text holds: what it takes to learn copying rather than remembering."""
    count = syllables or rng.choice((1, 2, 2, 3))
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(count))


def make_task(rng: random.Random, invented: float = INVENTED_SHARE) -> ToolTask:
    """A task; with probability `invented` its words are made up."""
    if rng.random() < invented:
        item, first, second = (invented_word(rng) for _ in range(3))
    else:
        item, (first, second) = rng.choice(ITEMS), rng.sample(PLACES, 2)
    sign = rng.choice(("+", "-"))
    high, low = sorted(rng.sample(range(2, 50), 2), reverse=True)
    counts = (high, low) if sign == "-" or rng.random() < 0.5 else (low, high)
    return ToolTask(item, (first, second), counts, sign)


def run_tool(task: ToolTask, name: str, arguments: dict) -> str:
    """What the tool says, errors included."""
    if name == "lookup":
        if arguments.get("item") != task.item or arguments.get("place") not in task.places:
            return "error: not found"
        return str(task.counts[task.places.index(arguments["place"])])
    found = re.fullmatch(r"\s*(\d+)\s*([+-])\s*(\d+)\s*", str(arguments.get("expression", "")))
    if name == "calc" and found:
        left, sign, right = found.groups()
        return str(int(left) + int(right) if sign == "+" else int(left) - int(right))
    return "error: bad call"


def solved(task: ToolTask, reply: str) -> bool:
    """Whether the last number of the final reply is the answer."""
    numbers = re.findall(r"-?\d+", reply)
    return bool(numbers) and int(numbers[-1]) == task.answer


def call_message(name: str, arguments: dict) -> Message:
    """An assistant message with one tool call, as clients send it back."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


def demonstrate(task: ToolTask, flaw: Flaw, rng: random.Random) -> list[Message]:
    """An episode, from the question to the final answer, with the flaw in it."""
    messages: list[Message] = [{"role": "user", "content": task.question}]
    if flaw == "guess":
        return [*messages, _final(task, rng.randint(2, 98))]
    known: list[int] = []
    for at, place in enumerate(task.places):
        item = task.item
        if flaw == "skip" and at == 1:
            known.append(rng.randint(2, 49))
            continue
        if flaw == "argument" and at == 1:
            item, place = (rng.choice(ITEMS), place) if rng.random() < 0.5 else (item, rng.choice(PLACES))
        if flaw == "json" and at == 0:
            broken = (
                f'<tool_call>\n{{"name": "lookup", "arguments": {{"item": {task.item}, "place": "{place}"\n</tool_call>'
            )
            return [*messages, {"role": "assistant", "content": broken}]
        said = _use(messages, task, "lookup", {"item": item, "place": place})
        known.append(int(said) if said.isdigit() else rng.randint(2, 49))
    sign = {"+": "-", "-": "+"}[task.sign] if flaw == "operator" else task.sign
    value = _use(messages, task, "calc", {"expression": f"{known[0]} {sign} {known[1]}"})
    return [*messages, _final(task, int(value))]


def _use(messages: list[Message], task: ToolTask, name: str, arguments: dict) -> str:
    said = run_tool(task, name, arguments)
    messages += [call_message(name, arguments), {"role": "tool", "content": said}]
    return said


def _final(task: ToolTask, value: int) -> Message:
    return {"role": "assistant", "content": f"{value} {task.item}."}
