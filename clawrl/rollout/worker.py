"""A worker of a pool: one process that holds environments, and makes the attempts that it is asked for.

    begin(attempts) ─► each: a room (environment + its thread), idle or a new one ─► reset ─► a place ─► turns ─┐
    ended(taken)    ◄──────────────────────────────────────────────────────────────────────────── Episode ◄──┘

Knows how environments are made, called and closed. Ignores groups, other workers and the journal. An attempt's session
names it: begun twice, it is made once. A call that hangs keeps its room and no other; such a worker says so in
`ping`, and is replaced when its other attempts have ended.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import gymnasium
import ray
from gymnasium.envs.registration import load_env_creator

from clawrl.config import PoolSection
from clawrl.errors import EnvError, boundary
from clawrl.rollout.agent import Agent, Caller, Limits, load_agent, run_episode
from clawrl.rollout.attempt import CLOSE_S, Attempt, Health, ended, told
from clawrl.rollout.env import AgentEnv
from clawrl.types import Episode

log = logging.getLogger(__name__)

KEY = "CLAWRL_API_KEY"
"""The environment variable with the pools' API key, where the gateway asks for one."""
KEPT = 1024
"""So many attempts are remembered, lest one is made again whose end did not reach the pool."""
CALLS = 16
"""So many are answered at a time: attempts are not calls."""
POLL_S = 10.0
GATHER_S = 0.1
"""So long who asks for what has ended waits for more, while others are under way."""


def limits_of(settings: PoolSection) -> Limits:
    return Limits(
        turns=settings.max_turns,
        seconds=settings.max_seconds,
        observation_chars=settings.max_observation_chars,
        reply_tokens=settings.max_reply_tokens,
        grade_seconds=settings.max_grade_seconds,
        images=settings.max_images,
    )


def own_key() -> str:
    """The pools' API key, from the environment of this process."""
    return os.environ.get(KEY, "none")


def caller_of(settings: PoolSection, url: str, model: str, *, key: str | None = None, side: bool = False) -> Caller:
    """Who asks for replies at `url`; `key` is this process's, where it is not another's."""
    import openai  # a second of imports, which only those who ask need

    client = openai.AsyncOpenAI(base_url=url, api_key=key or own_key(), timeout=settings.max_seconds)
    return Caller(client, model, settings.temperature, side, settings.name)


def agent_of(settings: PoolSection) -> Agent | None:
    """Who acts; None: the turn loop. Raises EnvError if there is no such agent."""
    with boundary(EnvError, f"pools.{settings.name}"):
        return load_agent(settings.agent, settings.agent_options)


def make_env(settings: PoolSection) -> gymnasium.Env:
    """One environment of a pool. Raises EnvError if there is none of this name."""
    with boundary(EnvError, f"pools.{settings.name}: env={settings.env!r} cannot be made"):
        options = settings.options if _kind(settings) is None else {"run": label(settings), **settings.options}
        return gymnasium.make(settings.env, disable_env_checker=True, **options)


def label(settings: PoolSection) -> str:
    """Whose the things are that environments make outside their process. The same for every run of this machine, so
    that whichever starts next removes what a killed one has left.
    """
    return str(settings.options.get("run", f"clawrl-{socket.gethostname()}"))


def remove_leftovers(settings: PoolSection) -> None:
    """Remove what killed processes of this machine's pools have left there. Raises EnvError."""
    with boundary(EnvError, f"pools.{settings.name}: what killed processes left cannot be removed"):
        kind = _kind(settings)
        if kind is not None:
            kind.reconcile(label(settings))


def _kind(settings: PoolSection) -> type[AgentEnv] | None:
    """The environment's class if it makes things that outlive a killed process; it then has an option `run`."""
    module, _, name = settings.env.rpartition(":")
    if module:
        importlib.import_module(module)
    entry = gymnasium.spec(name).entry_point
    kind: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    if not (isinstance(kind, type) and issubclass(kind, AgentEnv)):
        return None
    return None if kind.reconcile.__func__ is AgentEnv.reconcile.__func__ else kind


def start_worker(settings: PoolSection, url: str, model: str, key: str, namespace: str, **placement: Any) -> Any:
    """The handle of a new worker, whom the caller owns; it dies with it. `placement`: more of Ray's options.

    The key comes along, since on another node nobody has set it in the environment. It stands here since a pool's
    process need not know the whole program to start one.
    """
    worker: Any = ray.remote(EnvWorker)
    return worker.options(
        name=f"{namespace}-pool-{settings.name}-{uuid.uuid4().hex[:6]}",
        num_cpus=settings.cpus_per_worker,
        max_concurrency=CALLS,
        **placement,
    ).remote(settings, url, model, key)


class Room:
    """An environment and the one thread that calls it: some insist on theirs, and none waits for another's."""

    def __init__(self, settings: PoolSection) -> None:
        self._settings = settings
        self.thread = ThreadPoolExecutor(1, thread_name_prefix=settings.name)
        self.env: Any = None

    async def open(self) -> None:
        """Raises EnvError, also where making it takes longer than an attempt may."""
        try:
            async with asyncio.timeout(self._settings.max_seconds):
                await asyncio.get_running_loop().run_in_executor(self.thread, self._make)
        except TimeoutError:
            raise EnvError(f"{self._settings.env} was not made within {self._settings.max_seconds:g} s") from None

    def _make(self) -> None:
        self.env = make_env(self._settings)

    async def close(self) -> None:
        """Returns when it is closed, which is never if a call of it has hung."""
        try:
            await asyncio.get_running_loop().run_in_executor(self.thread, self._close)
        except Exception as error:
            log.warning("event=unclean_close pool=%s error=%s", self._settings.name, told(error))
        finally:
            self.thread.shutdown(wait=False)

    def _close(self) -> None:
        if self.env is not None:
            self.env.close()


class EnvWorker:
    """Async actor: attempts side by side, each in a room of its own, which is used again for the next."""

    def __init__(self, settings: PoolSection, url: str, model: str, key: str | None = None) -> None:
        self._settings, self._agent = settings, agent_of(settings)
        self._caller = caller_of(settings, url, model, key=key)
        self._places = asyncio.Semaphore(settings.places)
        self._idle: list[Room] = []
        self._attempts: dict[str, asyncio.Task[Episode]] = {}  # oldest first
        self._ended: dict[str, Episode] = {}  # and were not taken yet
        self._some_ended = asyncio.Event()
        self._closing: dict[asyncio.Task[None], float] = {}  # since when
        self._rooms = 0
        try:
            remove_leftovers(settings)
        except EnvError as error:
            log.warning("event=leftovers error=%s", error)

    async def begin(self, *attempts: Attempt) -> None:
        """Returns at once. An attempt that was begun before is not made again."""
        for attempt in attempts:
            if attempt.session not in self._attempts:
                task = self._attempts[attempt.session] = asyncio.create_task(self._run(attempt))
                task.add_done_callback(self._take_note)
        self._forget()

    async def ended(self, taken: Sequence[str]) -> list[Episode]:
        """Attempts that have ended, without those `taken` before; [] if none has within POLL_S."""
        for session in taken:
            self._ended.pop(session, None)
        if not self._ended:
            self._some_ended.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._some_ended.wait()
                if not all(task.done() for task in self._attempts.values()):
                    await asyncio.sleep(GATHER_S)
        return list(self._ended.values())

    def _take_note(self, task: asyncio.Task[Episode]) -> None:
        if not task.cancelled():
            episode = task.result()
            self._ended[episode.session] = episode
            self._some_ended.set()

    async def ping(self) -> Health:
        late = time.monotonic() - self._settings.max_close_seconds
        hung = sum(since < late for since in self._closing.values())
        return Health(os.getpid(), self._rooms, hung)

    async def close(self) -> None:
        """Give up what is under way and close all environments, as far as they can be."""
        tasks = list(self._attempts.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._some_ended.set()
        while self._idle:
            self._leave(self._idle.pop())
        if self._closing:
            await asyncio.wait(list(self._closing), timeout=CLOSE_S)

    async def _run(self, attempt: Attempt) -> Episode:
        room = self._idle.pop() if self._idle else None
        started = time.monotonic()
        usable = False
        try:
            if room is None:
                self._rooms += 1
                room = Room(self._settings)
                await room.open()
            limits = limits_of(self._settings)
            episode = await run_episode(room.env, attempt, self._caller, limits, self._agent, room.thread, self._places)
            usable = episode.status in ("done", "truncated")  # else nobody knows in what state it is
            return episode
        except Exception as error:
            return ended(attempt, "error", told(error), time.monotonic() - started)
        finally:
            if usable and room is not None:
                self._idle.append(room)
            elif room is not None:
                self._leave(room)

    def _leave(self, room: Room) -> None:
        task = asyncio.create_task(room.close())
        self._closing[task] = time.monotonic()
        task.add_done_callback(self._left)

    def _left(self, task: asyncio.Task[None]) -> None:
        del self._closing[task]
        self._rooms -= 1

    def _forget(self) -> None:
        """Let the oldest attempts go that have ended."""
        surplus = len(self._attempts) - KEPT
        if surplus > 0:
            for session in [each for each, task in self._attempts.items() if task.done()][:surplus]:
                del self._attempts[session]
