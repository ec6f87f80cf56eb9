"""One episode: an agent at an OpenAI-compatible endpoint takes its turns in an environment.

Knows the environment interface, the `openai` client and the limits of an episode. Ignores which model answers, where
environments run and what is learnt: the gateway captures the turns, since they come to it like anybody's.

    reset ─► messages, tools ─► chat.completions ─► assistant message ─► step ─► observations ─┐
                 ▲                                                                            │
                 └──────────────── until it is over, or a limit is reached ◄──────────────────┘

Whatever happens, the result is an Episode: a failure is its status and reason, never an exception.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import gymnasium
import openai

from clawrl.errors import ClawrlError
from clawrl.types import Episode, EpisodeStatus, Message

CUT = "\n… {left} characters left out …\n"


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may take. An observation that is too long is shown by its head and tail."""

    turns: int = 16
    seconds: float = 300.0
    observation_chars: int = 16_000
    reply_tokens: int = 512
    grade_seconds: float = 120.0  # beyond `seconds`, for the verdict on an attempt that was cut short


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which task of which environment, and what it is called."""

    source: str
    group: str
    group_size: int
    session: str
    split: str
    number: int  # of the task


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks for replies, and how. `side`: the turns are measured and never trained on."""

    client: openai.AsyncOpenAI
    model: str
    temperature: float = 1.0
    side: bool = False
    user: str = "local"

    async def reply(self, attempt: Attempt, messages: list[Message], tools: tuple[Any, ...], limits: Limits) -> Message:
        """The assistant message, as it goes into the history. Raises openai.OpenAIError."""
        headers = {"X-Session-Id": attempt.session, "X-Source": attempt.source, "X-Group": attempt.group}
        request: dict[str, Any] = {"tools": list(tools)} if tools else {}
        answer = await self.client.chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=self.temperature,
            max_completion_tokens=limits.reply_tokens,
            user=self.user,
            extra_headers={**headers, "X-Turn-Type": "side" if self.side else "main"},
            **request,
        )
        return answer.choices[0].message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})


async def run_episode(
    env: gymnasium.Env[tuple[Message, ...], Message],
    attempt: Attempt,
    caller: Caller,
    limits: Limits,
    thread: Executor | None = None,
    place: AbstractAsyncContextManager[Any] | None = None,
) -> Episode:
    """Play one attempt to its end. The environment is called in `thread` (of one worker; None: one of its own), so that
    a call that was given up at a time limit ends before the next begins.

    It is reset at once, acts while it has its `place`, and may take `limits.seconds` for each of the two.
    """
    if thread is None:
        thread = ThreadPoolExecutor(1)
        try:
            return await run_episode(env, attempt, caller, limits, thread, place)
        finally:
            thread.shutdown(wait=False)
    run = _Run(env, attempt, caller, limits, thread)
    started = time.monotonic()
    status, reason = await run.within(limits.seconds, run.begin)
    reset_s = time.monotonic() - started
    async with place or nullcontext():
        started = time.monotonic()
        if status == "done":
            status, reason = await run.within(limits.seconds, run.play)
        if run.outcome is None and status in ("truncated", "timeout") and run.task:
            graded, why = await run.within(limits.grade_seconds, run.grade)
            if graded != "done":
                status, reason = graded, f"{reason}; its verdict: {why}"
    seconds = reset_s + time.monotonic() - started
    return ended(attempt, status, reason, seconds, task=run.task, outcome=run.outcome, rewards=tuple(run.rewards))


def ended(
    attempt: Attempt,
    status: EpisodeStatus,
    reason: str,
    seconds: float,
    *,
    task: str = "",
    outcome: float | None = None,
    rewards: tuple[float, ...] = (),
) -> Episode:
    """The record of an attempt that ends now."""
    return Episode(
        session=attempt.session,
        source=attempt.source,
        group=attempt.group,
        task=task,
        group_size=attempt.group_size,
        status=status,
        outcome=outcome,
        rewards=rewards,
        reason=reason,
        seconds=seconds,
        at=time.time(),
    )


class _Run:
    """An episode under way."""

    def __init__(self, env: Any, attempt: Attempt, caller: Caller, limits: Limits, thread: Executor) -> None:
        self._env, self._attempt, self._caller, self._limits, self._thread = env, attempt, caller, limits, thread
        self._messages: list[Message] = []
        self._tools: tuple[Any, ...] = ()
        self._step: Future[Any] | None = None  # it goes on when time is up
        self.task = ""
        self.rewards: list[float] = []
        self.outcome: float | None = None

    async def within(
        self, seconds: float, stage: Callable[[], Awaitable[tuple[EpisodeStatus, str]]]
    ) -> tuple[EpisodeStatus, str]:
        """(status, reason) at the end of a stage, however it ends."""
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await stage()
        except openai.OpenAIError as error:
            return "error", f"no reply: {told(error)}"
        except Exception as error:
            return ("timeout", f"longer than {seconds:g} s") if limit.expired() else ("error", told(error))

    async def begin(self) -> tuple[EpisodeStatus, str]:
        chosen = {"task": self._attempt.number, "split": self._attempt.split}
        seen, facts = await asyncio.wrap_future(self._thread.submit(self._env.reset, options=chosen))
        self.task, self._tools = facts["task"], facts["tools"]
        self._messages = self._shown(seen)
        return "done", ""

    async def play(self) -> tuple[EpisodeStatus, str]:
        for _ in range(self._limits.turns):
            action = await self._caller.reply(self._attempt, self._messages, self._tools, self._limits)
            self._step = self._thread.submit(self._env.step, action)
            seen = await self._answer(self._step)
            if self.outcome is not None:
                return "done", ""
            self._messages += [action, *self._shown(seen)]
        return "truncated", f"more than {self._limits.turns} turns"

    async def grade(self) -> tuple[EpisodeStatus, str]:
        """The verdict on an attempt that was cut short: its last step's, if that ends it after all."""
        if self._step is not None and not self._step.cancelled():
            await self._answer(self._step)
        if self.outcome is None:
            self.outcome = float(await asyncio.wrap_future(self._thread.submit(self._env.unwrapped.grade)))
        return "done", ""

    async def _answer(self, step: Future[Any]) -> tuple[Message, ...]:
        seen, reward, terminated, _, facts = await asyncio.wrap_future(step)
        self._step = None
        outcome = facts["outcome"] if terminated else None
        self.rewards.append(float(reward) - (outcome or 0.0))
        self.outcome = outcome
        return seen

    def _shown(self, messages: tuple[Message, ...]) -> list[Message]:
        return [cut(message, self._limits.observation_chars) for message in messages]


def cut(message: Message, most: int) -> Message:
    """The message with a text of more than `most` characters cut in the middle."""
    text = message.get("content")
    if not isinstance(text, str) or len(text) <= most:
        return message
    head = most // 2
    return {**message, "content": text[:head] + CUT.format(left=len(text) - most) + text[len(text) - (most - head) :]}


def told(error: Exception) -> str:
    """What went wrong, on one line."""
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, ClawrlError) else f"{type(error).__name__}: {words}"
