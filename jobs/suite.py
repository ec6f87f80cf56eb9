"""A fixed suite of tasks that have nothing to do with how replies look: what is forgotten while a style is learnt.

    judge   which score a turn deserves, in the light of what followed     hint    whether there is a hint in it
    tool    the first call of a task that needs two look-ups               drill   a sum

Knows the tasks that the built-in model was trained on beside chat. Ignores what is behind the endpoint: they are asked
as anybody would, as side calls at temperature 0, and they are the same ones in every run, so that what changes between
two times is due to the weights (and to the engine's rounding).
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from clawrl.serving import judging
from clawrl.serving.judging import PromptSet
from clawrl.types import Message, Tool
from envs.toolcall.stock import TOOLS, make_task
from jobs.tiny_model.corpus import make_case

CASES = 40
"""Of each task."""
SEED = 0
CONCURRENCY = 16
ANSWER_TOKENS = 96


@dataclass(frozen=True, slots=True)
class Question:
    """One case: what is asked, and whether a reply (an assistant message as on the wire) is right."""

    task: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...]
    right: Callable[[Message], bool]


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """Shares of right answers by task, of those answered."""

    shares: dict[str, float]
    num_replies: int
    num_failed: int

    @property
    def mean(self) -> float:
        return sum(self.shares.values()) / len(self.shares)


def questions(prompts: PromptSet, cases: int = CASES) -> list[Question]:
    """The suite: `cases` of each task, the same for ever."""
    makers = {"judge": _judge, "hint": _hint, "tool": _tool, "drill": _drill}
    loaded = judging.load_prompts(prompts)
    return [maker(random.Random(f"{SEED} {at}"), loaded) for maker in makers.values() for at in range(cases)]


async def ask_suite(client: openai.AsyncOpenAI, model: str, asked: Sequence[Question]) -> SuiteResult:
    """Ask every question once."""
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(question: Question) -> bool | None:
        body: dict[str, Any] = {"tools": list(question.tools)} if question.tools else {}
        async with gate:
            try:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=list(question.messages),  # type: ignore[arg-type]
                    temperature=0,
                    max_completion_tokens=ANSWER_TOKENS,
                    extra_headers={"X-Turn-Type": "side"},
                    **body,
                )
            except openai.APIError:
                return None
        return question.right(completion.choices[0].message.model_dump(exclude_none=True))

    answers = await asyncio.gather(*map(one, asked))
    by_task: dict[str, list[bool]] = {}
    for question, right in zip(asked, answers, strict=True):
        if right is not None:
            by_task.setdefault(question.task, []).append(right)
    shares = {task: sum(rights) / len(rights) for task, rights in by_task.items()}
    return SuiteResult(shares, sum(map(len, by_task.values())), answers.count(None))


def _judge(rng: random.Random, prompts: judging.Prompts) -> Question:
    case = make_case(rng, "unseen", split="heldout")
    asked = judging.evaluative(prompts, case.messages, case.reply, case.next_state)
    return Question("judge", tuple(asked), (), lambda reply: judging.parse_vote(_text(reply)) == case.score)


def _hint(rng: random.Random, prompts: judging.Prompts) -> Question:
    case = make_case(rng, "unseen", split="heldout")
    asked = judging.directive(prompts, case.messages, case.reply, case.next_state)
    due = case.hint is not None
    return Question("hint", tuple(asked), (), lambda reply: (judging.parse_hint(_text(reply)) is not None) == due)


def _tool(rng: random.Random, prompts: judging.Prompts) -> Question:
    task = make_task(rng, invented=0.0)
    wanted = [{"item": task.item, "place": place} for place in task.places]

    def right(reply: Message) -> bool:
        calls = [call["function"] for call in reply.get("tool_calls", ())]
        return len(calls) == 1 and calls[0]["name"] == "lookup" and _arguments(calls[0]) in wanted

    return Question("tool", ({"role": "user", "content": task.question},), tuple(TOOLS), right)


def _drill(rng: random.Random, prompts: judging.Prompts) -> Question:
    sign, left, right = rng.choice("+-x"), rng.randint(30, 80), rng.randint(2, 29)
    if sign == "x":
        left, right = rng.randint(2, 9), rng.randint(2, 9)
    value = {"+": left + right, "-": left - right, "x": left * right}[sign]
    message = {"role": "user", "content": f"What is {left} {sign} {right}?"}
    return Question("drill", (message,), (), lambda reply: re.findall(r"\d+", _text(reply))[-1:] == [str(value)])


def _text(reply: Message) -> str:
    return reply.get("content") or ""


def _arguments(call: dict[str, Any]) -> Any:
    try:
        return json.loads(call["arguments"])
    except ValueError:
        return None
