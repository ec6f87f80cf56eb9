"""Simulated users at an OpenAI-compatible endpoint: they talk, and they are measured, as any client would be.

Knows the `openai` client and the simulated users. Ignores what stands behind the endpoint: nothing outside the
OpenAI protocol is sent but two headers that any client may set (`X-Session-Id`, `X-Turn-Type`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import openai

from clawrl.types import Message
from envs.chat.styles import FORMS, Style, classify
from envs.chat.user import Person, Persona, satisfies
from envs.chat.world import Question, Solution

log = logging.getLogger(__name__)

REPLY_TOKENS = 192
ATTEMPTS = 3

Opening = Callable[[list[Message]], list[Message]]
"""What a client sends in the place of a user's messages, as one does that keeps notes of its own."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One message of the user and the reply to it."""

    said: str
    reaction: str  # why the user said it (see SimulatedUser)
    reply: str
    style: Style
    solution: Solution  # of the problem that was open when the reply came
    satisfied: bool  # the reply is in the style the user wants


@dataclass(frozen=True, slots=True)
class Conversation:
    """A finished conversation and how the endpoint behaved in it."""

    session: str
    persona: Persona
    exchanges: tuple[Exchange, ...]
    longest_gap_s: float  # between two chunks of one reply
    first_chunk_s: float  # the longest wait for a first chunk
    num_failed: int  # requests that ended in an error, each attempt counted


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Unhinted first replies to held-out problems, as one persona sees them. Shares are of answered problems."""

    persona: Persona
    num_replies: int
    score: float  # in the style the persona wants
    correct: float  # with the right answer
    shows_work: float  # with the working, and nothing false in it
    sound: float  # right and with the working: a bare number is not
    good: float  # sound, and in the style that is wanted
    mean_length: float  # in tokens where the endpoint reports usage, else in characters
    forms: dict[str, float]
    num_failed: int
    ids: tuple[str, ...]  # of the replies, as the endpoint named them


@dataclass(slots=True)
class _Wire:
    """What was seen of the endpoint so far."""

    longest_gap_s: float = 0.0
    first_chunk_s: float = 0.0
    num_failed: int = 0


async def hold_conversation(
    client: openai.AsyncOpenAI,
    model: str,
    user: Person,
    problem: Question | None,
    session_id: str,
    max_turns: int,
    stream: bool = True,
    account: str | None = None,
    opening: Opening = list,
    reply_tokens: int = REPLY_TOKENS,
) -> Conversation:
    """Talk until the user is done or has sent `max_turns` messages; `account` is the protocol's `user` field.

    The last reply gets no answer, so it never has a next state: two trained turns take max_turns = 3.
    """
    said: str | None = user.begin(problem)
    messages: list[Message] = []
    exchanges: list[Exchange] = []
    wire = _Wire()
    while said is not None and len(exchanges) < max_turns:
        reaction = user.reaction
        messages.append({"role": "user", "content": said})
        request: dict[str, Any] = {"model": model, "messages": opening(messages), "max_completion_tokens": reply_tokens}
        if account is not None:
            request["user"] = account
        reply = await _ask(client, request, {"X-Session-Id": session_id}, stream, wire)
        if reply is None:
            break
        messages.append({"role": "assistant", "content": reply})
        style = classify(reply)
        exchanges.append(
            Exchange(said, reaction, reply, style, user.problem.read(reply), satisfies(user.persona, style))
        )
        said = await user.react(reply)
    return Conversation(
        session=session_id,
        persona=user.persona,
        exchanges=tuple(exchanges),
        longest_gap_s=wire.longest_gap_s,
        first_chunk_s=wire.first_chunk_s,
        num_failed=wire.num_failed,
    )


async def evaluate(
    client: openai.AsyncOpenAI,
    model: str,
    persona: Persona,
    problems: Sequence[Question],
    concurrency: int = 16,
    account: str | None = None,
    opening: Opening = list,
    reply_tokens: int = REPLY_TOKENS,
) -> Evaluation:
    """Ask every problem once, without any word on style; marked as side calls, so that they never train."""
    gate = asyncio.Semaphore(concurrency)
    user: dict[str, Any] = {} if account is None else {"user": account}

    async def one(problem: Question) -> Answer | None:
        messages = opening([{"role": "user", "content": problem.question}])
        async with gate:
            try:
                completion = await client.chat.completions.create(
                    model=model,
                    messages=cast(Any, messages),
                    max_completion_tokens=reply_tokens,
                    extra_headers={"X-Turn-Type": "side"},
                    **user,
                )
            except openai.APIError:
                return None
        text = completion.choices[0].message.content or ""
        return Answer(text, completion.usage.completion_tokens if completion.usage else len(text), completion.id)

    answers = await asyncio.gather(*(one(problem) for problem in problems))
    return summarise(persona, problems, answers)


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to a held-out problem."""

    text: str
    length: int
    id: str


def summarise(persona: Persona, problems: Sequence[Question], answers: Sequence[Answer | None]) -> Evaluation:
    """The evaluation of an answer per problem; None where no reply came."""
    answered = [(problem, answer) for problem, answer in zip(problems, answers, strict=True) if answer is not None]
    styles = [classify(answer.text) for _, answer in answered]
    solutions = [problem.read(answer.text) for problem, answer in answered]
    wanted = [satisfies(persona, style) for style in styles]
    sound = [solution.correct and solution.shows_work for solution in solutions]
    forms = [style.form for style in styles]
    return Evaluation(
        persona=persona,
        num_replies=len(answered),
        score=_mean(wanted),
        correct=_mean([solution.correct for solution in solutions]),
        shows_work=_mean([solution.shows_work for solution in solutions]),
        sound=_mean(sound),
        good=_mean([both and liked for both, liked in zip(sound, wanted, strict=True)]),
        mean_length=_mean([answer.length for _, answer in answered]),
        forms={form: forms.count(form) / len(forms) for form in sorted(set(forms))},
        num_failed=len(problems) - len(answered),
        ids=tuple(answer.id for _, answer in answered),
    )


def pooled(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Those of several personas as one, every reply counted alike; named after the first."""
    numbers = [each.num_replies for each in evaluations]

    def mean(values: Sequence[float]) -> float:
        return sum(value * number for value, number in zip(values, numbers, strict=True)) / max(1, sum(numbers))

    names = ("score", "correct", "shows_work", "sound", "good", "mean_length")
    return Evaluation(
        persona=evaluations[0].persona,
        num_replies=sum(numbers),
        **{name: mean([getattr(each, name) for each in evaluations]) for name in names},
        forms={form: mean([each.forms.get(form, 0.0) for each in evaluations]) for form in FORMS},
        num_failed=sum(each.num_failed for each in evaluations),
        ids=(),
    )


async def _ask(
    client: openai.AsyncOpenAI, request: dict[str, Any], headers: dict[str, str], stream: bool, wire: _Wire
) -> str | None:
    """One reply, or None when every attempt failed. The client's own retries are off, so that failures show."""
    plain = client.with_options(max_retries=0)
    for attempt in range(ATTEMPTS):
        try:
            if stream:
                return await _stream(plain, request, headers, wire)
            completion = await plain.chat.completions.create(**request, extra_headers=headers)
            return completion.choices[0].message.content or ""
        except openai.APIError as error:
            log.warning("event=request_failed attempt=%d error=%r cause=%r", attempt, error, error.__cause__)
            wire.num_failed += 1
            if attempt + 1 < ATTEMPTS:
                await asyncio.sleep(0.2 * 2**attempt)
    return None


async def _stream(client: openai.AsyncOpenAI, request: dict[str, Any], headers: dict[str, str], wire: _Wire) -> str:
    """The reply put together from its chunks, with the waits between them noted."""
    parts: list[str] = []
    last = time.perf_counter()
    num_chunks = 0
    async for chunk in await client.chat.completions.create(**request, stream=True, extra_headers=headers):
        now = time.perf_counter()
        if num_chunks:
            wire.longest_gap_s = max(wire.longest_gap_s, now - last)
        else:
            wire.first_chunk_s = max(wire.first_chunk_s, now - last)
        last, num_chunks = now, num_chunks + 1
        if chunk.choices and chunk.choices[0].delta.content:
            parts.append(chunk.choices[0].delta.content)
    return "".join(parts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
