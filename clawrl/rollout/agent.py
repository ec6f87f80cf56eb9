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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
    env: gymnasium.Env[tuple[Message, ...], Message], attempt: Attempt, caller: Caller, limits: Limits
) -> Episode:
    """Play one attempt to its end. The environment is called in a thread of its own, one call at a time."""
    started = time.monotonic()
    with _OneThread() as thread:
        run = _Run(env, attempt, caller, limits, thread)
        status, reason = await run.play(started + limits.seconds)
        outcome = run.outcome
        if outcome is None and status in ("truncated", "timeout") and run.task:
            try:
                outcome = float(await thread.call(env.unwrapped.grade))  # type: ignore[attr-defined]
            except Exception as error:
                status, reason = "error", told(error)
    return Episode(
        session=attempt.session,
        source=attempt.source,
        group=attempt.group,
        task=run.task,
        group_size=attempt.group_size,
        status=status,
        outcome=outcome,
        rewards=tuple(run.rewards),
        reason=reason,
        seconds=time.monotonic() - started,
        at=time.time(),
    )


class _OneThread:
    """Calls one after the other: one that was given up at a time limit ends before the next begins."""

    def __enter__(self) -> _OneThread:
        self._executor = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=False)

    async def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(
            self._executor, partial(function, *arguments, **named)
        )  # fmt: skip


class _Run:
    """An episode under way."""

    def __init__(self, env: Any, attempt: Attempt, caller: Caller, limits: Limits, thread: _OneThread) -> None:
        self._env, self._attempt, self._caller, self._limits = env, attempt, caller, limits
        self._call = thread.call
        self.task = ""
        self.rewards: list[float] = []
        self.outcome: float | None = None

    async def play(self, deadline: float) -> tuple[EpisodeStatus, str]:
        """(status, reason) at the end."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._play()
        except TimeoutError:
            return "timeout", f"longer than {self._limits.seconds:g} s"
        except openai.OpenAIError as error:
            return "error", f"no reply: {told(error)}"
        except Exception as error:
            return "error", told(error)

    async def _play(self) -> tuple[EpisodeStatus, str]:
        chosen = {"task": self._attempt.number, "split": self._attempt.split}
        seen, facts = await self._call(self._env.reset, options=chosen)
        self.task, tools = facts["task"], facts["tools"]
        messages = self._shown(seen)
        for _ in range(self._limits.turns):
            action = await self._caller.reply(self._attempt, messages, tools, self._limits)
            seen, reward, terminated, _, facts = await self._call(self._env.step, action)
            outcome = facts.get("outcome")
            self.rewards.append(float(reward) - (outcome or 0.0))
            if terminated:
                self.outcome = outcome
                return "done", ""
            messages += [action, *self._shown(seen)]
        return "truncated", f"more than {self._limits.turns} turns"

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
