"""Who is answered now, who is held, and who is refused: bounds on requests and tokens, of all and of each API key.

Pure asyncio. Ignores HTTP and keys' secrets. A held request costs a client nothing but time, while a refused one makes
agents rewrite their prompts; so only what exceeds a bound on waiting is refused.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from clawrl.config import GatewaySection
from clawrl.errors import GatewayError

MINUTE_S = 60.0
RETRY_S = 5.0


@dataclass(slots=True)
class Spending:
    """Tokens of one key in the last minute."""

    limit: int
    spent: deque[tuple[float, int]] = field(default_factory=deque)
    total: int = 0

    def add(self, tokens: int, now: float) -> None:
        self.spent.append((now, tokens))
        self.total += tokens

    def ready_in(self, now: float) -> float:
        """Seconds until less than the limit was spent in the minute before."""
        while self.spent and self.spent[0][0] <= now - MINUTE_S:
            self.total -= self.spent.popleft()[1]
        left = self.total
        for at, tokens in self.spent:
            if left < self.limit:
                break
            left -= tokens
            if left < self.limit:
                return at + MINUTE_S - now
        return 0.0


class Admission:
    """One per gateway replica. `key` names an API key, or whoever comes without."""

    def __init__(self, settings: GatewaySection) -> None:
        self._settings = settings
        self._free = asyncio.Semaphore(settings.max_concurrent_requests)
        self._mine: dict[str, asyncio.Semaphore] = {}
        self._spending: dict[str, Spending] = {}
        self._waiting: Counter[str] = Counter()
        self.num_waiting = 0

    async def enter(self, key: str) -> None:
        """Hold the request until it may be answered; then `leave` gives its place on.

        Raises GatewayError 429 if too many are held already.
        """
        mine = self._mine.setdefault(key, asyncio.Semaphore(self._settings.key_concurrent or sys.maxsize))
        if mine.locked() or self._free.locked() or self._ready_in(key) > 0:
            self._require_room(key)
        self._waiting[key] += 1
        self.num_waiting += 1
        try:
            while (wait_s := self._ready_in(key)) > 0:  # noqa: ASYNC110 (time alone ends it)
                await asyncio.sleep(wait_s)
            await mine.acquire()
            try:
                await self._free.acquire()
            except BaseException:
                mine.release()
                raise
        finally:
            self._waiting[key] -= 1
            self.num_waiting -= 1

    def leave(self, key: str) -> None:
        """The request was answered, or given up."""
        self._mine[key].release()
        self._free.release()

    def spend(self, key: str, tokens: int) -> None:
        """Tokens that a request of this key read and wrote."""
        limit = self._settings.key_tokens_per_minute
        if limit is not None:
            self._spending.setdefault(key, Spending(limit)).add(tokens, time.monotonic())

    def _ready_in(self, key: str) -> float:
        spending = self._spending.get(key)
        return 0.0 if spending is None else spending.ready_in(time.monotonic())

    def _require_room(self, key: str) -> None:
        for held, bound, name in (
            (self.num_waiting, self._settings.max_waiting, "max_waiting"),
            (self._waiting[key], self._settings.key_waiting, "key_waiting"),
        ):
            if held >= bound:
                again = max(RETRY_S, math.ceil(self._ready_in(key)))
                raise GatewayError(
                    f"{held} requests wait already (gateway.{name}={bound}); try again in {again:g} s",
                    status=429,
                    code="rate_limit_exceeded",
                    retry_after=again,
                )
