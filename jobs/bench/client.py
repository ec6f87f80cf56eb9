"""A client that costs little: streams chat completions over HTTP and notes when bytes arrive.

Knows OpenAI's server-sent events. Parses only each reply's last event, so that it takes as little as it can from the
cores that the measured system runs on; what it takes counts against that system all the same.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import aiohttp

from jobs.bench.figures import Stream

DONE = b"data: [DONE]"
Conversation = Sequence[dict[str, Any]]
Question = TypeVar("Question")


def session() -> aiohttp.ClientSession:
    """Keeps connections open between requests and waits for ever."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), trust_env=False
    )


async def stream_all(
    http: aiohttp.ClientSession, url: str, asked: Sequence[Sequence[Conversation]], num_tokens: int
) -> list[Stream]:
    """Ask for one reply to each conversation: of each list one after the other, of all lists at the same time."""
    return await side_by_side(asked, lambda messages: stream(http, url, messages, num_tokens))


async def side_by_side(
    asked: Sequence[Sequence[Question]], answer: Callable[[Question], Awaitable[Stream]]
) -> list[Stream]:
    """The answers to all questions: of each list one after the other, of all lists at the same time."""

    async def in_turn(questions: Sequence[Question]) -> list[Stream]:
        return [await answer(question) for question in questions]

    return [each for answers in await asyncio.gather(*map(in_turn, asked)) for each in answers]


async def reply(
    http: aiohttp.ClientSession, url: str, messages: Conversation, headers: dict[str, str] | None = None, **more: Any
) -> tuple[str, str]:
    """(id, text) of one reply. Raises aiohttp.ClientError for one that fails; `more` is what else the request says."""
    body = {"model": "clawrl", "messages": list(messages), **more}
    async with http.post(f"{url}/chat/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        answer = await response.json()
    return answer["id"], answer["choices"][0]["message"]["content"] or ""


async def stream(http: aiohttp.ClientSession, url: str, messages: Conversation, num_tokens: int, **more: Any) -> Stream:
    """One streamed reply of exactly `num_tokens` tokens; a failure is told in `Stream.error`, not raised.

    `more` is what else the request says.
    """
    body = {
        "model": "clawrl",
        "messages": list(messages),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 1.0,
        **more,
    }
    started, parts, arrivals, events, first = time.time(), [], [], 0, None
    try:
        async with http.post(f"{url}/chat/completions", json=body) as response:
            async for part in response.content.iter_any():
                now = time.time()
                parts.append(part)
                arrivals.append(now)
                events += part.count(b"\n\n")
                if first is None and events >= 2:  # the first event only names the role
                    first = now
            status = response.status
    except aiohttp.ClientError as error:
        return Stream(started, (), time.time(), time.time(), 0, f"{type(error).__name__}: {error}")
    ended = time.time()
    num, problem = _tokens_of(status, b"".join(parts), num_tokens)
    return Stream(started, tuple(arrivals), first or ended, ended, num, problem)


def _tokens_of(status: int, raw: bytes, wanted: int) -> tuple[int, str | None]:
    """How many tokens a reply had by its own account, and what is wrong with it."""
    if status != 200:
        return 0, f"HTTP {status}: {raw[:200]!r}"
    events = raw.strip().split(b"\n\n")
    if events[-1] != DONE:
        return 0, f"the stream ended with {events[-1][:200]!r}"
    usage = json.loads(events[-2][len(b"data: ") :]).get("usage") or {}
    num = int(usage.get("completion_tokens", 0))
    return num, None if num == wanted else f"{num} tokens instead of {wanted}"
