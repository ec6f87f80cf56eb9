"""One episode: an agent at an OpenAI-compatible endpoint takes its turns in an environment.

Knows the environment interface, the `openai` client and the limits of an episode. Ignores which model answers, where
environments run and what is learnt: the gateway captures the turns, since they come to it like anybody's.

    reset ─► messages, tools ─► chat.completions ─► assistant message ─► step ─► observations ─┐
      │          ▲                                                                            │
      │          └──────────────── until it is over, or a limit is reached ◄──────────────────┘
      └─► or an agent of its own, which asks the model as it likes, under a URL that names the session ─► grade

Whatever happens, the result is an Episode: a failure is its status and reason, never an exception.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import gymnasium

from clawrl.errors import EnvError, boundary
from clawrl.rollout.attempt import Attempt, ended, told
from clawrl.types import Episode, EpisodeStatus, Message

if TYPE_CHECKING:
    import openai

CUT = "\n… {left} characters left out …\n"
IMAGE_GONE = {"type": "text", "text": "[an earlier image]"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What an episode may take. Of a long observation head and tail are shown, of images the newest."""

    turns: int = 16
    seconds: float = 300.0
    observation_chars: int = 16_000
    reply_tokens: int = 512
    grade_seconds: float = 120.0  # beyond `seconds`, for the verdict on an attempt that was cut short
    images: int = 2


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
        request: dict[str, Any] = {"tools": list(tools)} if tools else {}
        answer = await self.client.chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=self.temperature,
            max_completion_tokens=limits.reply_tokens,
            user=self.user,
            extra_headers=self.headers(attempt),
            **request,
        )
        return answer.choices[0].message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})

    def headers(self, attempt: Attempt) -> dict[str, str]:
        """What the gateway is told of an attempt's turns."""
        named = {"X-Session-Id": attempt.session, "X-Source": attempt.source, "X-Group": attempt.group}
        return {**named, "X-Turn-Type": "side" if self.side else "main"}

    def url(self, attempt: Attempt) -> str:
        """The base URL that says the same, for who cannot send headers (`serving.prefix`)."""
        root = str(self.client.base_url).rstrip("/").removesuffix("/v1")
        named = f"session/{attempt.session}/source/{attempt.source}/group/{attempt.group}"
        return f"{root}/{named}/turns/{'side' if self.side else 'main'}/v1"


class Agent(Protocol):
    """Acts in an environment that was just reset, and asks the model itself; the rollout grades what it leaves.

    A plain function, called in a thread. `env.opening` and `env.tools` say what there is to do. `base_url` names the
    session, and so do the headers; every call to the model must have one or the other. It must end by itself within
    `limits.seconds`: nothing can stop it, and the verdict waits for it. Returns why it broke off; nothing if it ended
    well. What it raises is an error of its own, and the attempt has no outcome.
    """

    def __call__(
        self, env: Any, base_url: str, api_key: str, model: str, extra_headers: dict[str, str], limits: Limits, /
    ) -> str | None: ...


def load_agent(path: str, options: Mapping[str, Any]) -> Agent | None:
    """The agent `package.module:function` with its options; None, the turn loop, for an empty path.

    Raises EnvError if there is none, or it does not take what it is called with.
    """
    if not path:
        return None
    module, _, name = path.partition(":")
    with boundary(EnvError, f"agent={path!r} cannot be used with agent_options={dict(options)}"):
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(None, "", "", "", {}, Limits(), **options)
    return partial(function, **options)


async def run_episode(
    env: gymnasium.Env[tuple[Message, ...], Message],
    attempt: Attempt,
    caller: Caller,
    limits: Limits,
    agent: Agent | None = None,
    thread: Executor | None = None,
    place: AbstractAsyncContextManager[Any] | None = None,
) -> Episode:
    """Play one attempt to its end, by the turn loop or another agent. The environment is called in `thread` (of one
    worker; None: one of its own), so that a call that was given up at a time limit ends before the next begins.

    It is reset at once, acts while it has its `place`, and may take `limits.seconds` for each of the two.
    """
    if thread is None:
        thread = ThreadPoolExecutor(1)
        try:
            return await run_episode(env, attempt, caller, limits, agent, thread, place)
        finally:
            thread.shutdown(wait=False)
    run = _Run(env, attempt, caller, limits, agent, thread)
    started = time.monotonic()
    status, reason = await run.within(limits.seconds, run.begin)
    reset_s = time.monotonic() - started
    async with place or nullcontext():
        started = time.monotonic()
        if status == "done":
            status, reason = await run.within(limits.seconds, run.play)
        if run.outcome is None and status != "error" and run.task:
            graded, why = await run.within(limits.grade_seconds, run.grade)
            if graded != "done":
                status, reason = graded, f"{reason}; its verdict: {why}" if reason else why
    seconds = reset_s + time.monotonic() - started
    return ended(attempt, status, reason, seconds, task=run.task, outcome=run.outcome, rewards=tuple(run.rewards))


class _Run:
    """An episode under way."""

    def __init__(
        self, env: Any, attempt: Attempt, caller: Caller, limits: Limits, agent: Agent | None, thread: Executor
    ) -> None:
        self._env, self._attempt, self._caller, self._limits = env, attempt, caller, limits
        self._agent, self._thread = agent, thread
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
        except Exception as error:
            from openai import BadRequestError, OpenAIError  # the client has loaded them

            if isinstance(error, BadRequestError) and error.code == "context_length_exceeded":
                return "truncated", "the conversation is longer than the model's context"  # graded as it stands
            if isinstance(error, OpenAIError):
                return "error", f"no reply: {told(error)}"
            return ("timeout", f"longer than {seconds:g} s") if limit.expired() else ("error", told(error))

    async def begin(self) -> tuple[EpisodeStatus, str]:
        chosen = {"task": self._attempt.number, "split": self._attempt.split}
        seen, facts = await asyncio.wrap_future(self._thread.submit(self._env.reset, options=chosen))
        self.task, self._tools = facts["task"], facts["tools"]
        self._messages = self._shown(seen)
        return "done", ""

    async def play(self) -> tuple[EpisodeStatus, str]:
        return await (self._take_turns() if self._agent is None else self._leave_to(self._agent))

    async def _leave_to(self, agent: Agent) -> tuple[EpisodeStatus, str]:
        caller, attempt = self._caller, self._attempt
        asking = (caller.url(attempt), caller.client.api_key, caller.model, caller.headers(attempt))
        why = await asyncio.wrap_future(self._thread.submit(agent, self._env.unwrapped, *asking, self._limits))
        return ("truncated", str(why)) if why else ("done", "")

    async def _take_turns(self) -> tuple[EpisodeStatus, str]:
        for _ in range(self._limits.turns):
            shown = newest_images(self._messages, self._limits.images)
            action = await self._caller.reply(self._attempt, shown, self._tools, self._limits)
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
            self.outcome = float(await asyncio.wrap_future(self._thread.submit(self._env.unwrapped.verdict)))
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
    """The message with a text of over `most` characters cut in the middle, also where it is one part of several."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": _shortened(content, most)}
    if isinstance(content, list):
        parts = [{**part, "text": _shortened(part["text"], most)} if "text" in part else part for part in content]
        return {**message, "content": parts}
    return message


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    head = most // 2
    return text[:head] + CUT.format(left=len(text) - most) + text[len(text) - (most - head) :]


def newest_images(messages: list[Message], most: int) -> list[Message]:
    """The messages with only the `most` newest images; a word stands in the place of each older one."""
    shown, left = [], most
    for message in reversed(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = []
            for part in reversed(content):
                left -= part.get("type") == "image_url"
                parts.append(part if left >= 0 or part.get("type") != "image_url" else IMAGE_GONE)
            message = {**message, "content": parts[::-1]}
        shown.append(message)
    return shown[::-1]
