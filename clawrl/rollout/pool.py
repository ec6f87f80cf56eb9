"""A pool of environments: groups of attempts at tasks, made as fast as the trainer takes their samples.

    buffer: how much waits? ─► a new group of G attempts ─► workers (Ray actors) ─► run_episode ─► journal: Episode
                                                              │ died                     └─► gateway: its turns
                                                              └─► "lost", and another worker makes the attempt again

Knows attempts, workers and the journal's calls. Ignores what an environment does and how samples are made of a group
(`comparing`). An attempt's session names it: asked for twice, a worker makes it once, and the journal keeps it once.
A pool that is killed leaves groups that never end and are never compared; it begins new ones.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium
import openai
import ray
from ray.exceptions import RayActorError

from clawrl.config import PoolSection
from clawrl.errors import EnvError, boundary
from clawrl.observe import metric
from clawrl.rollout.agent import Attempt, Caller, Limits, run_episode, told
from clawrl.types import Episode

log = logging.getLogger(__name__)

KEY = "CLAWRL_API_KEY"
"""The environment variable with the pools' API key, where the gateway asks for one."""
CREDIT_S = 0.2
RETRY_S = 1.0
ATTEMPTS = 3
"""So often an attempt is made whose worker dies."""
GRACE_S = 30.0
"""Beyond an attempt's own limit, after which its worker is taken for hung."""


def limits_of(settings: PoolSection) -> Limits:
    return Limits(
        settings.max_turns, settings.max_seconds, settings.max_observation_chars, settings.max_reply_tokens,
        settings.max_images,
    )  # fmt: skip


def make_env(settings: PoolSection) -> gymnasium.Env:
    """One environment of a pool. Raises EnvError if there is none of this name."""
    with boundary(EnvError, f"pools.{settings.name}: env={settings.env!r} cannot be made"):
        return gymnasium.make(settings.env, disable_env_checker=True, **settings.options)


def caller_of(settings: PoolSection, url: str, model: str, *, side: bool = False) -> Caller:
    client = openai.AsyncOpenAI(base_url=url, api_key=os.environ.get(KEY, "none"), timeout=settings.max_seconds)
    return Caller(client, model, settings.temperature, side, settings.name)


class EnvWorker:
    """Async actor: attempts side by side, each in an environment of its own, which is used again for the next."""

    def __init__(self, settings: PoolSection, url: str, model: str) -> None:
        self._settings, self._caller = settings, caller_of(settings, url, model)
        self._idle: list[gymnasium.Env] = []
        self._running: dict[str, asyncio.Task[Episode]] = {}

    async def run(self, attempt: Attempt) -> Episode:
        """The attempt's end; the same attempt asked for again is not made again."""
        task = self._running.get(attempt.session)
        if task is None:
            task = self._running[attempt.session] = asyncio.create_task(self._run(attempt))
            task.add_done_callback(lambda _: self._running.pop(attempt.session, None))
        return await asyncio.shield(task)

    async def _run(self, attempt: Attempt) -> Episode:
        env = self._idle.pop() if self._idle else await asyncio.to_thread(make_env, self._settings)
        episode = await run_episode(env, attempt, self._caller, limits_of(self._settings))
        if episode.status == "done":
            self._idle.append(env)
        else:  # in what state it is nobody knows
            await asyncio.to_thread(env.close)
        return episode

    async def pid(self) -> int:
        return os.getpid()


class Pool:
    """Async actor; it starts by itself. `journal` and `buffer` are handles, `start_worker` makes the i-th worker."""

    def __init__(
        self, settings: PoolSection, batch_size: int, journal: Any, buffer: Any, start_worker: Callable[[int], Any]
    ) -> None:
        self._settings, self._journal, self._buffer = settings, journal, buffer
        self._most_waiting = settings.batches_ahead * batch_size
        self._start_worker = start_worker
        self._workers = [start_worker(index) for index in range(settings.workers)]
        self._load: Counter[int] = Counter()
        self._counts: Counter[str] = Counter()
        self._groups: set[asyncio.Task[None]] = set()
        self._issuing = asyncio.get_running_loop().create_task(self._issue())

    async def stats(self) -> dict[str, int]:
        """Groups under way, and attempts by how they ended since the actor's start."""
        return {"groups_under_way": len(self._groups), **self._counts}

    async def workers(self) -> list[int]:
        """Their process ids."""
        return list(await asyncio.gather(*(worker.pid.remote() for worker in self._workers)))

    async def close(self) -> None:
        """Begin nothing more; attempts under way are given up."""
        tasks = [self._issuing, *self._groups]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self._workers:
            ray.kill(worker)

    async def _issue(self) -> None:
        while True:
            while len(self._groups) >= self._settings.groups:
                await asyncio.wait(self._groups, return_when=asyncio.FIRST_COMPLETED)
            await self._credit()
            task = asyncio.create_task(self._group())
            self._groups.add(task)
            task.add_done_callback(self._ended)

    async def _credit(self) -> None:
        """Wait until the trainer needs more: what it cannot take in time would be too old for it."""
        while True:
            try:
                stats = await self._buffer.stats.remote()
                if stats["size"] < self._most_waiting:
                    return
            except Exception as error:
                log.warning("event=buffer_unreachable error=%s retry_s=%g", type(error).__name__, RETRY_S)
                await asyncio.sleep(RETRY_S)
            await asyncio.sleep(CREDIT_S)

    async def _group(self) -> None:
        name, number = f"{self._settings.name}-{uuid.uuid4().hex[:12]}", random.getrandbits(31)
        size = self._settings.group_size
        attempts = [
            Attempt(self._settings.name, name, size, f"{name}-{index}", "train", number) for index in range(size)
        ]
        await asyncio.gather(*map(self._attempt, attempts))
        self._counts["groups"] += 1

    async def _attempt(self, attempt: Attempt) -> None:
        """One attempt to its recorded end, on another worker if its own dies."""
        for trial in range(ATTEMPTS):
            now = attempt if trial == 0 else replace(attempt, session=f"{attempt.session}-again{trial}")
            episode = await self._made(now, last=trial == ATTEMPTS - 1)
            await self._record(episode)
            if episode.status != "lost":
                return

    async def _made(self, attempt: Attempt, *, last: bool) -> Episode:
        """What became of it on the worker that has least to do."""
        index = min(range(len(self._workers)), key=lambda each: self._load[each])
        worker = self._workers[index]
        self._load[index] += 1
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.max_seconds + GRACE_S):
                return await worker.run.remote(attempt)
        except (RayActorError, TimeoutError) as error:
            self._replace(index, worker)
            reason = f"its worker died or hung ({type(error).__name__})"
            status = "error" if last else "lost"
        except Exception as error:
            status, reason = "error", told(error)
        finally:
            self._load[index] -= 1
        return Episode(
            attempt.session, attempt.source, attempt.group, "", attempt.group_size, status, None, (), reason,
            time.monotonic() - started, time.time(),
        )  # fmt: skip

    def _replace(self, index: int, worker: Any) -> None:
        """Start another worker in the place of one that is gone, once."""
        if self._workers[index] is worker:
            log.warning("event=worker_lost pool=%s worker=%d", self._settings.name, index)
            ray.kill(worker)
            self._workers[index] = self._start_worker(index)
            self._counts["workers_lost"] += 1

    async def _record(self, episode: Episode) -> None:
        self._counts[episode.status] += 1
        metric("pool/episodes_num").inc()
        while True:
            try:
                return await self._journal.append.remote(episode)
            except Exception as error:
                log.warning("event=journal_unreachable error=%s retry_s=%g", type(error).__name__, RETRY_S)
                await asyncio.sleep(RETRY_S)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._groups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("event=defect pool=%s", self._settings.name, exc_info=error)
