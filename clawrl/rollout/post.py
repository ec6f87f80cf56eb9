"""A worker's post: attempts go to it and their ends come back, as many to a call as there are.

    make(attempt) ─► outgoing ─► worker.begin(…) ─┐
         ▲                                        ▼
         └── whoever waits for it ◄── worker.ended(taken): those that ended since, after a short gathering

A call from process to process costs milliseconds, and with it one in ten short episodes. Knows the two methods of
`EnvWorker`. What is sent twice, because the network did not bring the answer, is made once, and taken once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError

from clawrl.rollout.attempt import Attempt
from clawrl.types import Episode

RETRY_S = 1.0


class Post:
    """Lives in the pool's event loop; `actor` is the worker's handle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._outgoing: list[Attempt] = []
        self._waiting: dict[str, asyncio.Future[Episode]] = {}
        self._taken: list[str] = []
        self._flows: dict[str, asyncio.Task[None]] = {}

    async def make(self, attempt: Attempt) -> Episode:
        """The attempt's end. Raises RayActorError if the worker dies before."""
        future = self._waiting[attempt.session] = asyncio.get_running_loop().create_future()
        self._outgoing.append(attempt)
        for flow in (self._send, self._collect):
            if flow.__name__ not in self._flows:
                self._flows[flow.__name__] = asyncio.create_task(self._guarded(flow))
        try:
            return await future
        finally:
            del self._waiting[attempt.session]

    async def _guarded(self, flow: Callable[[], Any]) -> None:
        """What a flow raises, all who wait are told."""
        try:
            await flow()
        except Exception as error:
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(error)
        finally:
            del self._flows[flow.__name__]

    async def _send(self) -> None:
        while self._outgoing:
            await asyncio.sleep(0)  # who gets a seat at the same time goes along
            attempts, self._outgoing = self._outgoing, []
            await insisted(self._actor.begin.remote, *attempts)

    async def _collect(self) -> None:
        while self._waiting:
            episodes: list[Episode] = await insisted(self._actor.ended.remote, self._taken)
            self._taken = [episode.session for episode in episodes]
            for episode in episodes:
                future = self._waiting.get(episode.session)
                if future is not None and not future.done():
                    future.set_result(episode)
            await asyncio.sleep(0)  # they go on, and may have more to send


async def insisted(call: Callable[..., Any], *given: Any) -> Any:
    """The actor's answer; asked for again where the network did not bring it. Raises RayError once it is dead."""
    while True:
        try:
            return await call(*given)
        except ActorUnavailableError:
            await asyncio.sleep(RETRY_S)
