"""Demonstrations of the stock task for the tiny model's corpus. Deliberately noisy.

Knows how people get the task of `envs/toolcall` wrong. Half of the demonstrations fail on purpose (guesses, skipped
look-ups, wrong arguments, wrong operators, broken JSON), so that the base model succeeds sometimes and reinforcement
learning has something to do.
"""

from __future__ import annotations

import json
import random
from typing import Literal

from clawrl.types import Message
from envs.chat.world import ITEMS, PLACES
from envs.toolcall.stock import ToolTask, run_tool

Flaw = Literal["none", "guess", "skip", "argument", "operator", "json"]
FLAW_SHARES: dict[Flaw, float] = {
    "none": 0.52, "guess": 0.14, "skip": 0.12, "argument": 0.07, "operator": 0.08, "json": 0.07,
}  # fmt: skip


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
