"""The workers of a pool, as the pool sees them: found a seat on, watched, replaced, more or fewer of them.

    seat() ─► the worker with least to do ─► leave(worker)
       └─ all are full: one more is started, up to max_workers. Ray holds it until a node has the CPUs, and tells its
          autoscaler; until then nobody is sent there.
    each worker: ping, every heartbeat ─► silent: killed · an environment hung, or idle for long: no more seats, closed
                                           when the last is left

Knows handles on `EnvWorker` actors. Ignores what they do there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from clawrl.config import PoolSection
from clawrl.observe import metric
from clawrl.rollout.attempt import CLOSE_S, Health
from clawrl.rollout.post import RETRY_S, Post, insisted

log = logging.getLogger(__name__)

START_S = 600.0
"""A worker may wait so long for its share of the cluster and for its process; then another asks anew."""


@dataclass(slots=True, eq=False)
class Worker:
    """One of the crew. `load`: attempts that have a seat on it."""

    actor: Any
    post: Post
    up: bool = False
    leaving: bool = False
    load: int = 0
    health: Health | None = None
    busy_at: float = field(default_factory=time.monotonic)  # last
    watching: asyncio.Task[None] | None = None


class Crew:
    """Lives in the pool's event loop. `start_worker` gives the handle of a new worker."""

    def __init__(self, settings: PoolSection, start_worker: Callable[[], Any]) -> None:
        self._settings, self._start_worker = settings, start_worker
        self._workers: set[Worker] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._seats = settings.places + settings.spares  # of each
        self._most = settings.max_envs + settings.spares * settings.max_workers
        self.num_lost = 0
        self._refill()

    @property
    def healths(self) -> list[Health]:
        """Of the workers that are up."""
        return [worker.health for worker in self._workers if worker.health is not None]

    async def seat(self) -> Worker:
        """Wait for the worker that is to make an attempt; who asks first need not be first served."""
        while True:
            worker = self._freest()
            if worker is not None:
                worker.load += 1
                return worker
            self._grow()
            self._changed.clear()
            await self._changed.wait()

    def leave(self, worker: Worker) -> None:
        """The attempt has ended."""
        worker.load -= 1
        worker.busy_at = time.monotonic()
        if worker.leaving and worker.load == 0:
            self._end(worker)
        self._changed.set()

    def lose(self, worker: Worker, why: str) -> None:
        """It died or does not answer; told twice is told once."""
        if worker in self._workers:
            log.warning("event=worker_lost pool=%s why=%s", self._settings.name, why)
            self.num_lost += 1
            self._workers.discard(worker)
            ray.kill(worker.actor)
            self._refill()

    async def close(self) -> None:
        """Return when all are gone."""
        for worker in list(self._workers):
            if worker.watching is not None:
                worker.watching.cancel()
            self._end(worker)
        await asyncio.gather(*self._ending)

    def _freest(self) -> Worker | None:
        if sum(worker.load for worker in self._workers) >= self._most:
            return None
        free = [each for each in self._workers if each.up and not each.leaving and each.load < self._seats]
        return min(free, key=lambda each: each.load, default=None)

    def _grow(self) -> None:
        """Start another, or as many as are up, since growing by one takes long; fewer if that is the most."""
        staying = [worker for worker in self._workers if not worker.leaving]
        num_up = sum(worker.up for worker in staying)
        if num_up == len(staying):  # none is starting
            for _ in range(min(max(1, num_up), self._settings.max_workers - len(staying))):
                self._start()

    def _refill(self) -> None:
        while sum(not worker.leaving for worker in self._workers) < self._settings.min_workers:
            self._start()
        self._changed.set()

    def _start(self) -> None:
        actor = self._start_worker()
        worker = Worker(actor, Post(actor))
        self._workers.add(worker)
        worker.watching = asyncio.create_task(self._watch(worker))

    async def _watch(self, worker: Worker) -> None:
        """Ping it until it leaves or is lost."""
        wait_s = START_S
        try:
            while not worker.leaving:
                async with asyncio.timeout(wait_s):
                    health: Health = await insisted(worker.actor.ping.remote)
                worker.health = health
                if not worker.up:
                    worker.up, worker.busy_at = True, time.monotonic()
                    self._changed.set()
                self._let_go(worker, health)
                wait_s = self._settings.heartbeat_s
                await asyncio.sleep(min(wait_s, self._settings.idle_s))
        except (RayError, TimeoutError) as error:
            if not worker.up:
                await asyncio.sleep(RETRY_S)  # another would fare no better at once
            self.lose(worker, type(error).__name__)

    def _let_go(self, worker: Worker, health: Health) -> None:
        """Decide whether it stays."""
        metric("pool/envs_num").set(sum(each.environments for each in self.healths))
        idle = worker.load == 0 and time.monotonic() - worker.busy_at > self._settings.idle_s
        num_staying = sum(not each.leaving for each in self._workers)
        if health.hung or (idle and num_staying > self._settings.min_workers):
            log.info("event=worker_leaves pool=%s hung=%d", self._settings.name, health.hung)
            worker.leaving = True
            self._refill()
            if worker.load == 0:
                self._end(worker)

    def _end(self, worker: Worker) -> None:
        """Dismiss one that nobody has a seat on any more."""
        self._workers.discard(worker)
        task = asyncio.create_task(_dismiss(worker))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


async def _dismiss(worker: Worker) -> None:
    """Let it close its environments, then end its process."""
    with suppress(RayError, TimeoutError):
        async with asyncio.timeout(2 * CLOSE_S if worker.up else 0):
            await worker.actor.close.remote()
    ray.kill(worker.actor)
