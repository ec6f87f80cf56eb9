"""A pool of environments: groups of attempts at tasks, made as fast as the trainer takes their samples.

    buffer: how much waits? ─► a group of G attempts ─► a seat each (`crew`) ─► its worker (`post`) ─► journal: Episode
                                                          │ the worker died          └─► gateway: its turns
                                                          └─► "lost", and another worker makes the attempt again

Knows groups, attempts and the journal's calls. Ignores what an environment does, where workers come from (`crew`) and
how samples are made of a group (`comparing`). A seat is a lease: it has a deadline, and the attempt's session names it,
so that asking twice makes one episode. A pool that is killed leaves groups that never end and are never compared; it
begins new ones.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError

from clawrl.config import PoolSection
from clawrl.observe import metric
from clawrl.rollout.attempt import Attempt, ended, told
from clawrl.rollout.crew import Crew, Worker
from clawrl.types import Episode

log = logging.getLogger(__name__)

CREDIT_S = 0.2
RETRY_S = 1.0
ATTEMPTS = 3
"""So often an attempt is made whose worker dies."""
PAUSE_S = 60.0
UNCOMPARED = 8
"""Groups that have ended and wait for the judge or the collector; no more begin while there are so many, or as many as
act side by side where that is more.
"""
GRACE_S = 30.0
"""Beyond what its own limits allow, after which an attempt's worker is taken for hung."""


def lease_s(settings: PoolSection) -> float:
    """The longest that an attempt may have its seat: to be made and reset, to act, to be graded, and as long again to
    wait for another that does so.
    """
    acting = settings.max_seconds + settings.max_grade_seconds
    return 2 * settings.max_seconds + acting * (2 if settings.spares else 1) + GRACE_S


def order_of(settings: PoolSection) -> random.Random:
    """Where the numbers of a pool's tasks come from: with a seed the same ones in every run."""
    return random.Random(None if settings.seed is None else f"{settings.name}/{settings.seed}")


class Pool:
    """Async actor; it starts by itself. `journal` and `buffer` are handles, `start_worker` makes a worker."""

    def __init__(
        self, settings: PoolSection, batch_size: int, journal: Any, buffer: Any, start_worker: Callable[[], Any]
    ) -> None:
        self._settings, self._journal, self._buffer = settings, journal, buffer
        self._most_waiting = settings.batches_ahead * batch_size
        self._most_uncompared = max(UNCOMPARED, settings.max_envs // settings.group_size)
        self._credited = 0.0  # until when groups may begin without asking again
        self._order = order_of(settings)
        self._crew = Crew(settings, start_worker)
        self._counts: Counter[str] = Counter()
        self._groups: Counter[str] = Counter()  # attempts that have not ended, of each group under way
        self._failures = 0  # attempts in a row that came to no outcome
        self._trouble = ""  # why the last of them did
        self._unrecorded: list[Episode] = []
        self._recording = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._begin(self._issue())

    async def stats(self) -> dict[str, int]:
        """Groups, workers and environments there are, and attempts by how they ended since the actor's start."""
        healths = self._crew.healths
        return {
            "groups_under_way": len(self._groups),
            "workers": len(healths),
            "workers_lost": self._crew.num_lost,
            "environments": sum(health.environments for health in healths),
            **self._counts,
        }

    async def trouble(self) -> str:
        """Why no attempt comes to an outcome, where a whole group's and more have not; else empty."""
        return self._trouble if self._failures > self._settings.group_size else ""

    async def workers(self) -> list[int]:
        """Their process ids."""
        return [health.pid for health in self._crew.healths]

    async def close(self) -> None:
        """Begin nothing more; attempts under way are given up. Returns when the workers are gone."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._crew.close()

    async def _issue(self) -> None:
        """Begin groups for ever. The next one waits until the attempts of the one before all have seats."""
        while True:
            await self._credit()
            await asyncio.sleep(self._pause_s())
            group, number = f"{self._settings.name}-{uuid.uuid4().hex[:12]}", self._order.getrandbits(31)
            size = self._settings.group_size
            self._groups[group] = size
            for index in range(size):
                attempt = Attempt(self._settings.name, group, size, f"{group}-{index}", "train", number)
                self._begin(self._attempt(attempt, await self._crew.seat()))

    def _pause_s(self) -> float:
        """Before the next group: none as a rule; longer and longer while all attempts fail, up to a minute."""
        groups = self._failures // self._settings.group_size
        return 0.0 if groups < 2 else min(PAUSE_S, 2.0 ** min(groups, 10))

    async def _credit(self) -> None:
        """Wait until the trainer needs more: what it cannot take in time would be too old for it. So would be what
        waits to be compared.
        """
        while time.monotonic() > self._credited:
            try:
                stats = await self._buffer.stats.remote()
                if stats["everyones"] < self._most_waiting:
                    waiting = await self._journal.groups_to_compare.remote(0, self._most_uncompared, 0.0)
                    if len(waiting) < self._most_uncompared:
                        self._credited = time.monotonic() + CREDIT_S
                        return
            except Exception as error:
                log.warning("event=buffer_unreachable error=%s retry_s=%g", type(error).__name__, RETRY_S)
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(CREDIT_S)

    async def _attempt(self, attempt: Attempt, worker: Worker) -> None:
        """One attempt to its recorded end, on another worker if its own dies."""
        episode = await self._made(attempt, worker)
        for trial in range(1, ATTEMPTS):
            if episode.status != "lost":
                break
            await self._record(episode)
            again = replace(attempt, session=f"{attempt.session}-again{trial}")
            episode = await self._made(again, await self._crew.seat())
        if episode.status == "lost":
            episode = replace(episode, status="error", reason=f"{episode.reason}, {ATTEMPTS} times")
        await self._record(episode)
        self._weigh(episode)
        self._groups[attempt.group] -= 1
        if not self._groups[attempt.group]:
            del self._groups[attempt.group]
            self._counts["groups"] += 1

    def _weigh(self, episode: Episode) -> None:
        """Count failures in a row; when a group's attempts have all failed, say so."""
        if episode.outcome is not None:
            self._failures = 0
            return
        self._failures, self._trouble = self._failures + 1, f"{episode.status}: {episode.reason}"
        if self._failures == self._settings.group_size + 1:
            log.warning("event=no_outcomes pool=%s reason=%s", self._settings.name, self._trouble)

    async def _made(self, attempt: Attempt, worker: Worker) -> Episode:
        """What became of it on the worker where it has its seat."""
        started = time.monotonic()
        lease = asyncio.timeout(lease_s(self._settings))
        try:
            async with lease:
                return await worker.post.make(attempt)
        except (RayActorError, TimeoutError) as error:
            self._crew.lose(worker, type(error).__name__)
            reason = "its worker died" if not lease.expired() else "its worker did not end it in time"
            return ended(attempt, "lost", reason, time.monotonic() - started)
        except Exception as error:
            return ended(attempt, "error", told(error), time.monotonic() - started)
        finally:
            self._crew.leave(worker)

    async def _record(self, episode: Episode) -> None:
        """Return when it is in the journal; those that end meanwhile go there together."""
        self._counts[episode.status] += 1
        metric("pool/episodes_num").inc()
        self._unrecorded.append(episode)
        async with self._recording:
            if self._unrecorded:  # nobody has taken it along
                episodes, self._unrecorded = self._unrecorded, []
                await self._append(episodes)

    async def _append(self, episodes: list[Episode]) -> None:
        while True:
            try:
                return await self._journal.append.remote(*episodes)
            except Exception as error:
                log.warning("event=journal_unreachable error=%s retry_s=%g", type(error).__name__, RETRY_S)
                await asyncio.sleep(RETRY_S)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("event=defect pool=%s", self._settings.name, exc_info=error)
