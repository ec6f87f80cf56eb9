"""What the judge is asked and how its answers are read: pure text in, pure values out.

Knows prompts (`prompts/*.txt`), chat messages and next states. Ignores engines, votes' timing and where the
answers go. Three questions, after OpenClaw-RL (arXiv:2603.10165, section 3), and one of a whole session:

    evaluative   did the reply do what was asked, given what followed?        -> \\boxed{1 | -1 | 0}
    directive    does what followed say what the reply should have done?      -> \\boxed{1} + hint, or \\boxed{-1}
    step         did this step of a task bring it forward?                    -> \\boxed{1 | -1 | 0}
    lesson       what should the assistant do, and not do, for this user?     -> \\boxed{1} + list, or \\boxed{-1}
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, Literal

from clawrl.types import Message, NextState, Turn

PromptSet = Literal["tiny", "full"]

_FOLDER = Path(__file__).parent / "prompts"
_VOTE = re.compile(r"\\boxed\{\s*([+-]?1|0)\s*\}")
_HINT = re.compile(r"\[HINT_START\](.*?)\[HINT_END\]", re.DOTALL)
_LIST = re.compile(r"\[LIST_START\](.*?)\[LIST_END\]", re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Budget:
    """How many characters of each part the judge sees; about four characters make a token of a big model."""

    request: int
    history: int
    reply: int
    next_state: int
    session: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """A system message and the template of the user message."""

    system: str
    template: Template


@dataclass(frozen=True, slots=True)
class Prompts:
    """The questions of one judge, and how much text it can take."""

    evaluative: Prompt
    directive: Prompt
    step: Prompt
    lesson: Prompt | None  # None: a session's hints, gathered, are what it teaches
    budget: Budget


BUDGETS: dict[PromptSet, Budget] = {
    "tiny": Budget(request=800, history=0, reply=1200, next_state=800, session=0),
    "full": Budget(request=6000, history=12000, reply=16000, next_state=8000, session=40000),
}


@cache
def load_prompts(name: PromptSet) -> Prompts:
    """The prompts shipped under `prompts/`: `tiny` is what the tiny model was trained on, `full` is for big models.

    The tiny model has seen tool calls and their results in the evaluative form only: its step is asked for in that. It
    has never read a session as a whole: what one teaches are the hints that it found in its turns.
    """
    if name not in BUDGETS:
        raise ValueError(f"judge.prompts={name!r} is unknown; choose one of {', '.join(BUDGETS)}")
    evaluative = _load(f"{name}_evaluative")
    step = evaluative if name == "tiny" else _load(f"{name}_step")
    lesson = None if name == "tiny" else _load(f"{name}_lesson")
    return Prompts(evaluative, _load(f"{name}_directive"), step, lesson, BUDGETS[name])


def evaluative(prompts: Prompts, messages: Sequence[Message], reply: Message, next_state: NextState) -> list[Message]:
    """The chat that asks for a vote on `reply`, which answered `messages` and was followed by `next_state`."""
    return _ask(prompts.evaluative, prompts.budget, _split_request(messages), reply, next_state)


def directive(prompts: Prompts, messages: Sequence[Message], reply: Message, next_state: NextState) -> list[Message]:
    """The chat that asks for a hint on `reply`, which answered `messages` and was followed by `next_state`."""
    return _ask(prompts.directive, prompts.budget, _split_request(messages), reply, next_state)


def step(prompts: Prompts, messages: Sequence[Message], reply: Message, next_state: NextState) -> list[Message]:
    """The chat that asks for a vote on one step of an episode, whose task is the first user message of `messages`."""
    return _ask(prompts.step, prompts.budget, _split_task(messages), reply, next_state)


def lesson(prompts: Prompts, exchanges: Sequence[tuple[Turn, NextState | None]]) -> list[Message]:
    """The chat that asks what a whole session teaches."""
    assert prompts.lesson is not None
    session = _history_text(transcript(exchanges), prompts.budget.session)
    text = prompts.lesson.template.safe_substitute(session=session)
    return [{"role": "system", "content": prompts.lesson.system}, {"role": "user", "content": text}]


def transcript(exchanges: Sequence[tuple[Turn, NextState | None]]) -> list[Message]:
    """What was said in a session, each thing once: requests, replies, and what followed them."""
    said: list[Message] = []
    before: Turn | None = None
    followed: NextState | None = None
    for turn, next_state in exchanges:
        if before is None or followed is None or turn.parent != before.id:  # else the request is what followed
            said += [each for each in _spoken(turn.messages) if each.get("role") == "user"][-1:]
        said += [turn.reply, *(next_state.messages if next_state is not None else ())]
        before, followed = turn, next_state
    return said


def gather_hints(hints: Iterable[tuple[str, ...]]) -> str | None:
    """The shortest hint of each turn, each once, in order of the turns; None where there is none."""
    first: dict[str, str] = {}
    for of_turn in hints:
        if of_turn:
            first.setdefault(" ".join(of_turn[0].casefold().split()), of_turn[0])
    return " ".join(first.values()) or None


def parse_list(text: str) -> str | None:
    """The list of an answer whose last vote is 1, a rule a line; None where the judge declined or left it out."""
    found = _LIST.findall(text)
    if not found or parse_vote(text) != 1:
        return None
    return "\n".join(line for line in map(str.strip, found[-1].splitlines()) if line) or None


def parse_vote(text: str) -> int | None:
    """The last `\\boxed{1|-1|0}` of a judge's answer; None where there is none."""
    votes = _VOTE.findall(text)
    return int(votes[-1]) if votes else None


def plurality(votes: Iterable[int | None]) -> int | None:
    """The most frequent vote; a tie is 0, and no valid vote is None (the judge abstains)."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return None
    most = max(counts.values())
    winners = [vote for vote, count in counts.items() if count == most]
    return winners[0] if len(winners) == 1 else 0


def parse_hint(text: str) -> str | None:
    """The hint of an answer whose last vote is 1; None where the judge declined or left the hint out."""
    hints = [" ".join(hint.split()) for hint in _HINT.findall(text)]
    return hints[-1] or None if hints and parse_vote(text) == 1 else None


def dedupe_hints(hints: Iterable[str | None]) -> tuple[str, ...]:
    """All different hints (up to case and spacing), shortest first, equal lengths in order of arrival."""
    first: dict[str, str] = {}
    for hint in hints:
        if hint and hint.strip():
            first.setdefault(" ".join(hint.casefold().split()), hint.strip())
    return tuple(sorted(first.values(), key=len))


def message_text(message: Message) -> str:
    """What a judge reads of a message: its text without thoughts, then its tool calls in Qwen3's form."""
    parts = [_THOUGHT.sub("", _content_text(message.get("content"))).strip()]
    parts += [_call_text(call) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in parts if part)


def clip(text: str, limit: int) -> str:
    """At most `limit` characters: a long text keeps its head and its tail."""
    if len(text) <= limit:
        return text
    mark = "\n[...]\n"
    head = max(0, limit - len(mark)) // 2
    tail = max(0, limit - len(mark)) - head
    return text[:head] + mark + text[len(text) - tail :] if limit > len(mark) else text[:limit]


def _load(stem: str) -> Prompt:
    system, _, template = (_FOLDER / f"{stem}.txt").read_text(encoding="utf-8").partition("\n---\n")
    return Prompt(system.strip(), Template(template.strip()))


def _ask(
    prompt: Prompt, budget: Budget, before: tuple[list[Message], str], reply: Message, next_state: NextState
) -> list[Message]:
    """One pass of substitution, so that no `$name` in anybody's text is ever replaced."""
    history, request = before
    text = prompt.template.safe_substitute(
        request=clip(request, budget.request),
        history=_history_text(history, budget.history),
        reply=clip(message_text(reply), budget.reply) or "(empty)",
        role=next_state.role,
        next_state=_next_state_text(next_state, budget.next_state),
    )
    return [{"role": "system", "content": prompt.system}, {"role": "user", "content": text}]


def _split_request(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """All messages but the last user message and the system's, and that user message's text."""
    spoken = _spoken(messages)
    return _split_at(spoken, reversed(range(len(spoken))))


def _split_task(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """All messages but the first user message and the system's, and that user message's text."""
    spoken = _spoken(messages)
    return _split_at(spoken, range(len(spoken)))


def _spoken(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if message.get("role") not in ("system", "developer")]


def _split_at(spoken: list[Message], positions: Iterable[int]) -> tuple[list[Message], str]:
    """Without the first user message along `positions`, and that message's text."""
    for at in positions:
        if spoken[at].get("role") == "user":
            return spoken[:at] + spoken[at + 1 :], message_text(spoken[at])
    return spoken, ""


def _history_text(messages: Sequence[Message], limit: int) -> str:
    """`[role] text` lines, the newest that fit within `limit` characters, oldest first."""
    lines: list[str] = []
    left = limit
    for message in reversed(messages):
        line = f"[{message.get('role', 'user')}] {clip(message_text(message), limit // 2)}"
        if len(line) > left:
            lines.append("[...]")
            break
        lines.append(line)
        left -= len(line) + 1
    return "\n".join(reversed(lines)) or "(none)"


def _next_state_text(next_state: NextState, limit: int) -> str:
    """All messages that followed; several of them (parallel tool results) are numbered and share the budget."""
    texts = [message_text(message) or "(empty)" for message in next_state.messages]
    if len(texts) == 1:
        return clip(texts[0], limit)
    share = limit // max(1, len(texts))
    numbered = [f"[{i} of {len(texts)}] {clip(text, share)}" for i, text in enumerate(texts, 1)]
    return "\n".join(numbered) or "(nothing; the session ended)"


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(part.get("text") or f"[{part.get('type', 'part')}]" for part in content)
    return ""


def _call_text(call: dict[str, Any]) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    shown = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": "{function.get("name", "")}", "arguments": {shown}}}\n</tool_call>'
