"""The stock task: look up two counts, then compute. Its words, its two tools and their answers.

Pure. Ignores models, messages and episodes (`env`).
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from clawrl.types import Tool
from envs.chat.world import ITEMS, PLACES

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
    found = re.fullmatch(r"\s*(\d{1,15})\s*([+-])\s*(\d{1,15})\s*", str(arguments.get("expression", "")))
    if name == "calc" and found:
        left, sign, right = found.groups()
        return str(int(left) + int(right) if sign == "+" else int(left) - int(right))
    return "error: bad call"


def solved(task: ToolTask, reply: str) -> bool:
    """Whether the last number of the final reply is the answer."""
    numbers = re.findall(r"-?\d+", reply)
    return bool(numbers) and numbers[-1] == str(task.answer)
