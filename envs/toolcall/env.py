"""Tool calls against a small stateful world: two counts to look up, one sum to work out, an answer to give.

    user: How many "pears" are at "market" and "barn" together?
    assistant: lookup(pears, market) ─► 12    lookup(pears, barn) ─► 30    calc(12 + 30) ─► 42    "42 pears."

The episode ends with a message that calls no tool; it is right if the last number in it is the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, Task, calls, message_of, split_of
from clawrl.types import Message
from envs.toolcall.stock import INVENTED_SHARE, TOOLS, ToolTask, make_task, run_tool, solved

BROKEN = "error: bad call; write valid JSON"
"""Short: longer words mislead the tiny model, which reads them as the policy and as the judge of its steps."""


@dataclass(frozen=True, slots=True)
class StockTask(Task):
    stock: ToolTask


class ToolCallEnv(AgentEnv[StockTask]):
    """`invented` is the share of tasks whose words are made up: they are copied, not remembered."""

    name = "toolcall"

    def __init__(self, invented: float = INVENTED_SHARE) -> None:
        super().__init__()
        self._invented = invented
        self._said = ""

    def make_task(self, number: int, split: Split) -> StockTask:
        """Two tasks about the same words in the same places are in the same split."""
        rng = random.Random(f"toolcall/{number}")
        while True:
            stock = make_task(rng, self._invented)
            words = "/".join((stock.item, *sorted(stock.places)))
            if split_of(words) == split:
                first, second = stock.counts
                return StockTask(f"{words}/{first}{stock.sign}{second}", stock)

    def begin(self, task: StockTask) -> Opening:
        self._said = ""
        return Opening(({"role": "user", "content": task.stock.question},), tuple(TOOLS))

    def act(self, action: Message) -> Answer:
        assert self.task is not None
        made = calls(action, self.tools)
        if made:
            return Answer(
                tuple(call.reply(call.problem or run_tool(self.task.stock, call.name, call.arguments)) for call in made)
            )
        self._said = action.get("content") or ""
        if "<tool_call>" in self._said:
            return Answer(({"role": "user", "content": BROKEN},))
        return Answer(terminated=True)

    def grade(self) -> float:
        assert self.task is not None
        return 1.0 if solved(self.task.stock, self._said) else -1.0

    def gold(self, task: StockTask) -> Sequence[Message]:
        stock = task.stock
        (first, second), (a, b) = stock.places, stock.counts
        return [
            message_of("lookup", item=stock.item, place=first),
            message_of("lookup", item=stock.item, place=second),
            message_of("calc", expression=f"{a} {stock.sign} {b}"),
            {"role": "assistant", "content": f"{stock.answer} {stock.item}."},
        ]
