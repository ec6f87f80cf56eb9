"""Environments in their pool: what it costs, how many it carries, how fast each kind is, and what it leaves behind.

Knows the real pool, workers, journal and buffer, put together as `main` does, on a Ray cluster of its own. Ignores
models: replies are scripted, over HTTP where the pool is held against plain calls, else in the worker itself.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import psutil
import ray

import envs  # noqa: F401  (registers them)
from clawrl import main
from clawrl.config import BufferSection, JudgeSection, LearningSection, PoolSection
from clawrl.errors import ClawrlError
from clawrl.journal.actor import Journal
from clawrl.rollout.agent import run_episode
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.collector import Collector
from clawrl.rollout.pool import Pool
from clawrl.rollout.worker import CALLS, EnvWorker, caller_of, limits_of, make_env
from clawrl.training.buffer import ReplayBuffer
from jobs import free_port
from jobs.bench.figures import Figure, median_ratio, spread, table
from jobs.bench.programs import PATIENCE_S, program
from jobs.bench.simulated import MEAN_S, STEPS, GoldWorker

MODEL = "scripted"
SIDE_BY_SIDE = 32
CROWD_WORKERS = 4
MOST = 64
ENOUGH = 1.1
"""More environments at a time are tried until they bring less than this times the steps per second."""
END_S = 10.0
OPTIONS = {"clawrl/Terminal-v0": {"limits": "best_effort"}}


@dataclass(frozen=True, slots=True)
class Stage:
    """A journal in a file, a buffer over it, and who compares the groups."""

    path: Path
    journal: Any
    buffer: Any
    collector: Any

    @contextmanager
    def pool(self, settings: PoolSection, start_worker: Callable[[], Any]) -> Iterator[Any]:
        """A pool at work; ended without a trace."""
        pool: Any = ray.remote(Pool).options(num_cpus=0, max_concurrency=64)
        pool = pool.remote(settings, 10**6, self.journal, self.buffer, start_worker)
        try:
            yield pool
        finally:
            ray.get(pool.close.remote())
            ray.kill(pool)

    def steps(self, source: str, since: float, until: float) -> list[int]:
        """Of each episode that ended then. Raises ClawrlError if one was not solved."""
        words = "SELECT status, outcome, reason, rewards FROM episodes WHERE source = ? AND at >= ? AND at < ?"
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as database:
            rows = database.execute(words, (source, since, until)).fetchall()
        for status, _, reason, _ in rows:
            if status != "done":
                raise ClawrlError(f"{source}: an episode ended as {status} ({reason}); nothing is measured of such")
        return [len(json.loads(rewards)) for *_, rewards in rows]

    def watched(self, source: str, seconds: float) -> list[int]:
        """Steps of each episode that ends in the next seconds."""
        since = time.time()
        time.sleep(seconds)
        until = time.time()
        time.sleep(0.5)  # the last of them reach the journal
        return self.steps(source, since, until)


@contextmanager
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        main.join_ray()
        try:
            path = Path(folder) / "journal.sqlite"
            journal = _actor(Journal, f"sqlite:///{path}")
            buffer = _actor(ReplayBuffer, BufferSection(), journal)
            collector = _actor(Collector, journal, None, None, JudgeSection(), LearningSection(kl_weight=0))
            yield Stage(path, journal, buffer, collector)
        finally:
            ray.shutdown()


def _actor(kind: type, *given: Any) -> Any:
    actor: Any = ray.remote(kind)
    return actor.options(num_cpus=0, max_concurrency=1000).remote(*given)


def measure(*, crowd: int, episodes: int, rounds: int, seconds: float) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of all four questions; `seconds` is how long each rate is watched."""
    with stage() as here, endpoint() as url:
        overhead, pairs = _overhead(here, url, rounds, seconds)
        _say(overhead)
        share, carried = _crowd(here, crowd, seconds)
        _say(share)
        rates = [rate for name in registered() for rate in _rates(here, name, seconds)]
        leaks = _leaks(here, url, episodes)
        _say(*leaks)
    return [overhead, share, *rates, *leaks], {"overhead": pairs, "crowd": carried}


def registered() -> list[str]:
    """The names under which gymnasium makes our environments that have tasks to train on: BFCL is only measured."""
    ours = [name for name, spec in gymnasium.registry.items() if str(spec.entry_point).startswith("envs.")]
    return [name for name in ours if name != "clawrl/Bfcl-v0"]


def _say(*figures: Figure) -> None:
    """On the way to the table, since it takes minutes."""
    print(table(figures), file=sys.stderr, flush=True)


def _settings(name: str, number: int, workers: int = 1, **given: Any) -> PoolSection:
    return PoolSection(
        name=f"{name.rpartition('/')[2].lower()}",
        env=f"{'jobs.bench.simulated' if 'Simulated' in name else 'envs'}:{name}",
        min_envs=number,
        max_envs=number,
        envs_per_worker=-(-number // workers),
        **{"group_size": 8, **given},
    )


def _gold(settings: PoolSection) -> Callable[[], Any]:
    return partial(_start, GoldWorker, settings)


def _start(kind: type, settings: PoolSection, *given: Any) -> Any:
    worker: Any = ray.remote(kind)
    return worker.options(num_cpus=0, max_concurrency=CALLS).remote(settings, *given)


# -- what the pool costs -----------------------------------------------------------------------------------------------


@contextmanager
def endpoint() -> Iterator[str]:
    """The scripted endpoint, in a process of its own."""
    port = free_port()
    with program([sys.executable, "-m", "jobs.bench.endpoint", str(port)], f"http://127.0.0.1:{port}/"):
        yield f"http://127.0.0.1:{port}/v1"


def _overhead(here: Stage, url: str, rounds: int, seconds: float) -> tuple[Figure, dict[str, Any]]:
    """How much longer an episode takes in a pool than in a plain loop, as many side by side in one process each."""
    settings = _settings("clawrl/ToolCall-v0", SIDE_BY_SIDE)
    direct, pooled = [], []
    for _ in range(rounds):
        direct.append(_in_a_process(url, seconds))
        with here.pool(settings, partial(_start, EnvWorker, settings, url, MODEL)) as pool:
            _until_up(pool, SIDE_BY_SIDE)
            pooled.append(len(here.watched(settings.name, seconds)) / seconds)
    low, high = spread(direct, pooled)
    details = {"direct_per_s": direct, "pooled_per_s": pooled, "quartiles": [low - 1, high - 1]}
    return Figure("pool overhead, toolcall over HTTP", median_ratio(direct, pooled) - 1, "", at_most=0.1), details


def _in_a_process(url: str, seconds: float) -> float:
    """Episodes per second without a pool, in a process that does nothing else."""
    command = [sys.executable, "-c", f"from jobs.bench.envs import plain; plain({url!r}, {seconds})"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def plain(url: str, seconds: float) -> None:
    """Print the episodes per second that a plain loop makes."""
    settings = _settings("clawrl/ToolCall-v0", SIDE_BY_SIDE)
    print(asyncio.run(_plain(settings, url, seconds)) / seconds)


async def _plain(settings: PoolSection, url: str, seconds: float) -> int:
    caller, limits = caller_of(settings, url, MODEL), limits_of(settings)
    began = time.time() + 2.0
    ends: list[float] = []

    async def one(place: int) -> None:
        env, thread = make_env(settings), ThreadPoolExecutor(1)
        number = 0
        while time.time() < began + seconds:
            number += 1
            attempt = Attempt(settings.name, "plain", 1, f"plain-{place}-{number}", "train", place * 100_000 + number)
            episode = await run_episode(env, attempt, caller, limits, None, thread)
            assert episode.outcome == 1, episode
            ends.append(time.time())

    await asyncio.gather(*(one(place) for place in range(SIDE_BY_SIDE)))
    return sum(began <= at < began + seconds for at in ends)


def _done(pool: Any) -> int:
    stats: Any = ray.get(pool.stats.remote())
    return stats.get("done", 0)


def _until_up(pool: Any, number: int) -> None:
    """Wait until so many episodes were made: all are at work. Raises ClawrlError if one broke, or it takes long."""
    deadline = time.monotonic() + PATIENCE_S
    while _done(pool) < number:
        stats: Any = ray.get(pool.stats.remote())
        if stats.get("error") or time.monotonic() > deadline:
            raise ClawrlError(f"{number} episodes were not made within {PATIENCE_S:g} s, but {stats}")
        time.sleep(0.2)


# -- how many it carries -----------------------------------------------------------------------------------------------


def _crowd(here: Stage, number: int, seconds: float) -> tuple[Figure, dict[str, Any]]:
    """Steps per second of environments that sleep, of what as many would make if nothing else took time."""
    settings = _settings("clawrl/Simulated-v0", number, CROWD_WORKERS, max_turns=STEPS)
    ideal = number / MEAN_S
    with here.pool(settings, _gold(settings)) as pool:
        _until_up(pool, number)
        watched_s = max(seconds, 2 * STEPS * MEAN_S)
        found = sum(here.watched(settings.name, watched_s)) / watched_s
    return (
        Figure(f"{number} simulated, of ideal throughput", found / ideal, "", at_least=0.95),
        {"steps_per_s": found, "ideal_per_s": ideal, "workers": CROWD_WORKERS},
    )


def _rates(here: Stage, name: str, seconds: float) -> list[Figure]:
    """Steps per second by how many environments act at a time, up to what the machine carries; gold solutions act.

    One that does not work here (no browser, no image) is left out, and its reason told.
    """
    rates: list[Figure] = []
    number = 1
    while number <= MOST:
        settings = _settings(name, number, min(number, os.cpu_count() or 1), options=OPTIONS.get(name, {}))
        try:
            with here.pool(settings, _gold(settings)) as pool:
                _until_up(pool, number)
                rate = sum(here.watched(settings.name, seconds)) / seconds
        except ClawrlError as error:
            print(f"bench: {name} is left out: {error}", file=sys.stderr)
            break
        rates.append(Figure(f"{name}: steps, {number} at a time", rate, "/s"))
        _say(rates[-1])
        if number > 1 and rate < ENOUGH * rates[-2].value:
            break
        number *= 2
    return rates


# -- what it leaves behind ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """What a worker and its descendants hold; mounts are the machine's."""

    processes: int
    threads: int
    files: int
    mounts: int
    mib: float

    @classmethod
    def by(cls, pid: int) -> Held:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
        return cls(
            processes=len(family),
            threads=root.num_threads(),
            files=root.num_fds(),
            mounts=len(Path("/proc/mounts").read_text().splitlines()),
            mib=statistics.median(root.memory_info().rss for _ in range(5)) / 2**20,
        )


def _leaks(here: Stage, url: str, episodes: int) -> list[Figure]:
    """Growth of what a worker holds, from a tenth of the episodes to all of them, and of the pool's memory."""
    settings = _settings("clawrl/ToolCall-v0", SIDE_BY_SIDE)
    with here.pool(settings, partial(_start, EnvWorker, settings, url, MODEL)) as pool:
        _until_up(pool, max(SIDE_BY_SIDE, episodes // 10))
        (pid,) = ray.get(pool.workers.remote())
        before, mounts = Held.by(pid), Held.by(pid).mounts
        began = time.monotonic()
        while (done := _done(pool)) < episodes:
            if time.monotonic() - began > PATIENCE_S + episodes:
                raise ClawrlError(f"{done} of {episodes} episodes were made; it goes too slowly")
            time.sleep(1.0)
        after = Held.by(pid)
        assert ray.get(pool.workers.remote()) == [pid]
    name = f"after {done} episodes"
    return [
        Figure(f"{name}: processes more", after.processes - before.processes, at_most=0),
        Figure(f"{name}: threads more", after.threads - before.threads, at_most=2),
        Figure(f"{name}: files more", after.files - before.files, at_most=2),
        Figure(f"{name}: mounts more", after.mounts - mounts, at_most=0),
        Figure(f"{name}: memory, of before", after.mib / before.mib, at_most=1.05),
        Figure(f"{name}: processes left", float(not _gone(pid)), at_most=0),
    ]


def _gone(pid: int) -> bool:
    """Whether a process that was told to end has ended."""
    try:
        psutil.Process(pid).wait(END_S)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
