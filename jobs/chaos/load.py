"""A steady load of streaming users, who note for every request what became of it.

Knows OpenAI's server-sent events over plain HTTP: no retries, so that every failure is seen. A reply counts as
acknowledged when its stream ended with `[DONE]`: from then on its turn must never be lost.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import aiohttp

FOLLOW_UPS = ("Please just give me the answer.", "No, that is wrong.", "Too long. Only the number, please.", "Thanks!")
REPLY_TOKENS = 64
THINKING_S = 1.5
"""Between a reply and the user's next message, in the mean; without it 16 users are more than two cores can judge."""
PAUSE_S = 0.2
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request as its client saw it; times in seconds since the epoch."""

    started: float
    ended: float
    turn: str | None  # the response id, once any event told it
    error: str | None  # None: acknowledged


@dataclass(slots=True)
class Load:
    """`users` conversations side by side, for as long as the context is open."""

    url: str
    users: int
    requests: list[Request] = field(default_factory=list)
    _tasks: list[asyncio.Task] = field(default_factory=list)

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._talk(user)) for user in range(self.users)]
        return self

    async def __aexit__(self, *failure: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def acknowledged(self) -> list[str]:
        return [request.turn for request in self.requests if request.error is None and request.turn]

    async def _talk(self, user: int) -> None:
        rng, conversation = random.Random(user), 0
        timeout = aiohttp.ClientTimeout(total=None, sock_read=PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as http:
            while True:
                conversation += 1
                a, b = rng.randrange(2, 30), rng.randrange(2, 30)
                messages = [{"role": "user", "content": f"Tom has {a} apples and buys {b} more. How many has Tom?"}]
                for _ in range(3):
                    reply = await self._ask(http, messages, f"chaos-{user}-{conversation}")
                    if reply is None:
                        await asyncio.sleep(PAUSE_S)
                        break
                    messages += [
                        {"role": "assistant", "content": reply},
                        {"role": "user", "content": rng.choice(FOLLOW_UPS)},
                    ]
                    await asyncio.sleep(rng.uniform(0, 2 * THINKING_S))

    async def _ask(self, http: aiohttp.ClientSession, messages: list[dict[str, str]], session: str) -> str | None:
        body = {"messages": messages, "stream": True, "max_tokens": REPLY_TOKENS}
        started, turn, text, error = time.time(), None, [], "the stream ended without [DONE]"
        try:
            async with http.post(
                f"{self.url}/chat/completions", json=body, headers={"X-Session-Id": session}
            ) as response:
                if response.status != 200:
                    error = f"HTTP {response.status}: {(await response.text())[:200]}"
                else:
                    async for line in response.content:
                        if line.startswith(b"data: [DONE]"):
                            error = None
                        elif line.startswith(b"data: "):
                            event = json.loads(line[6:])
                            if "error" in event:
                                error = event["error"]["message"]
                                break
                            turn = event.get("id") or turn
                            text += [choice["delta"].get("content") or "" for choice in event["choices"]]
        except (aiohttp.ClientError, OSError, TimeoutError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        self.requests.append(Request(started, time.time(), turn, error))
        return None if error else "".join(text)
