"""A pool of environments between a real journal, a real buffer and an endpoint with scripted replies."""

import json
import os
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from handles import Here

from clawrl.config import BufferSection, JudgeSection, LearningSection, PoolSection
from clawrl.journal.actor import Journal
from clawrl.rollout.collector import Collector
from clawrl.rollout.pool import Pool
from clawrl.rollout.worker import start_worker
from clawrl.training.buffer import ReplayBuffer
from clawrl.types import Sample
from envs.sandbox import SandboxSpec
from envs.sandbox.labels import remove_tree
from envs.sandbox.opening import refusal
from jobs.bench.endpoint import Endpoint, play_stock

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(600)]
PATIENCE_S = 180.0
BATCH = 4
BEST_EFFORT = SandboxSpec("base", limits="best_effort")


def ask(reference: Any) -> Any:
    return ray.get(reference, timeout=PATIENCE_S)


def say_yes(messages: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "yes"}


class House:
    """A journal in a folder, a buffer over it, a collector, an endpoint, and pools that live there."""

    def __init__(self, folder: Path, script: Callable[..., Any] = say_yes) -> None:
        self.folder, self.path = folder, folder / "journal.sqlite"
        self.journal: Any = ray.remote(Journal).options(num_cpus=0).remote(f"sqlite:///{self.path}")
        settings = BufferSection(batch_size=BATCH)
        self.buffer: Any = ray.remote(ReplayBuffer).options(num_cpus=0).remote(settings, self.journal)
        self._here = Here()  # a pool begins no groups while too many wait to be compared
        self._here.start(Collector, self.journal, None, None, JudgeSection(), LearningSection(kl_weight=0))
        self.endpoint = Endpoint(script)
        self.endpoint.__enter__()
        self.pools: list[Any] = []

    def settings(self, **given: Any) -> PoolSection:
        """Of a pool with two workers of two environments each, in this trouble or none."""
        trouble = {name: given.pop(name) for name in ("trouble", "at", "once", "seconds") if name in given}
        defaults = {
            "name": "odd", "env": "odd_env:clawrl/Odd-v0", "options": {"folder": str(self.folder), **trouble},
            "group_size": 4, "min_envs": 4, "max_envs": 4, "envs_per_worker": 2, "heartbeat_s": 10.0,
        }  # fmt: skip
        return PoolSection.model_validate({**defaults, **given})

    def starting(self, settings: PoolSection) -> Callable[[], Any]:
        sandboxes = {"runtime_env": {"env_vars": {"CLAWRL_SANDBOX_HOME": os.environ.get("CLAWRL_SANDBOX_HOME", "")}}}
        return partial(start_worker, settings, self.endpoint.url, "scripted", "none", "test", **sandboxes)

    def pool(self, **given: Any) -> Any:
        settings = self.settings(**given)
        pool: Any = ray.remote(Pool).options(num_cpus=0)
        self.pools.append(pool.remote(settings, BATCH, self.journal, self.buffer, self.starting(settings)))
        return self.pools[-1]

    def episodes(self, where: str = "1 = 1") -> list[dict[str, Any]]:
        ask(self.journal.counts.remote())  # it is there
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute(f"SELECT * FROM episodes WHERE {where} ORDER BY seq")]

    def complete(self) -> dict[str, list[dict[str, Any]]]:
        """The groups whose attempts have all ended."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for episode in self.episodes():
            groups.setdefault(episode["group"], []).append(episode)
        return {
            name: each
            for name, each in groups.items()
            if sum(one["status"] != "lost" for one in each) == each[0]["group_size"]
        }

    def fill_buffer(self) -> None:
        """A batch of samples waits for the trainer."""
        tokens = np.arange(3, dtype=np.int32)
        samples = [
            Sample(str(number), "ann", "chat", tokens, tokens > 0, tokens * 0.5, None, None, None, 0, 0, 1.0, 4.0)
            for number in range(BATCH)
        ]
        ask(self.journal.append.remote(*samples))
        until(lambda: ask(self.buffer.stats.remote())["size"] == BATCH)

    def log(self) -> list[list[str]]:
        with suppress(FileNotFoundError):
            return [line.split() for line in (self.folder / "log").read_text().splitlines()]
        return []

    def close(self) -> None:
        for pool in self.pools:
            with suppress(Exception):
                ask(pool.close.remote())
            ray.kill(pool)
        self._here.end()
        for actor in (self.buffer, self.journal):
            ray.kill(actor)
        self.endpoint.__exit__()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    opened = House(tmp_path)
    yield opened
    opened.close()


def until(condition: Callable[[], Any]) -> Any:
    """What it gives once that is something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)
    return found


def steps_of_all(workers: int, log: list[list[str]]) -> list[str]:
    """The worker of each step since so many had made one: they do not start at the same moment."""
    made = [pid for where, pid in log if where == "step"]
    firsts = [made.index(pid) for pid in set(made)]
    return made[max(firsts) :] if len(firsts) == workers else []


def test_groups_are_made_of_attempts_at_one_task_and_recorded(house: House):
    pool = house.pool()
    groups = until(lambda: len(found := house.complete()) >= 3 and found)
    for group in list(groups.values())[:3]:
        assert [each["status"] for each in group] == ["done"] * 4
        assert [each["outcome"] for each in group] == [1.0] * 4
        assert [json.loads(each["rewards"]) for each in group] == [[0.0, 0.0]] * 4
        assert len({each["task"] for each in group}) == 1
        assert all(house.endpoint.requests[each["session"]] == 2 for each in group)
    assert ask(pool.stats.remote())["done"] >= 12
    steps = until(lambda: len(found := steps_of_all(2, house.log())) >= 24 and Counter(found))
    assert min(steps.values()) > 0.3 * max(steps.values()), "attempts are spread over both workers"


def test_the_stock_task_is_solved_through_the_pool(tmp_path: Path):
    house = House(tmp_path, play_stock)
    try:
        house.pool(env="envs:clawrl/ToolCall-v0", options={"invented": 0.5})
        group = next(iter(until(house.complete).values()))
        assert [(each["status"], each["outcome"]) for each in group] == [("done", 1.0)] * 4
    finally:
        house.close()


def test_a_killed_worker_loses_its_attempts_and_others_make_them(house: House):
    pool = house.pool(seconds=0.3)
    until(lambda: sum(where == "step" for where, _ in house.log()) > 4)
    os.kill(ask(pool.workers.remote())[0], signal.SIGKILL)
    lost = until(lambda: house.episodes("status = 'lost'"))
    group = lost[0]["group"]
    episodes = until(lambda: house.complete().get(group))
    assert lost[0]["reason"] == "its worker died"
    assert lost[0]["outcome"] is None
    done = [each for each in episodes if each["status"] != "lost"]
    assert [each["outcome"] for each in done] == [1.0] * 4
    assert f"{lost[0]['session']}-again1" in {each["session"] for each in done}
    assert until(lambda: len(ask(pool.workers.remote())) == 2)
    assert ask(pool.stats.remote())["workers_lost"] == 1


def test_a_task_that_kills_its_workers_is_given_up(house: House):
    house.pool(trouble="kill", group_size=2, min_envs=1, max_envs=1, envs_per_worker=1)
    group = next(iter(until(house.complete).values()))
    assert Counter(each["status"] for each in group) == {"lost": 4, "error": 2}
    assert group[-1]["reason"] == "its worker died, 3 times"


def test_a_frozen_worker_is_replaced(house: House):
    house.pool(trouble="freeze", once=True, heartbeat_s=3.0)
    lost = until(lambda: house.episodes("status = 'lost'"))
    episodes = until(lambda: house.complete().get(lost[0]["group"]))
    assert sum(each["status"] == "done" for each in episodes) == 4


def test_a_hung_environment_costs_its_own_attempt_and_then_its_worker(house: House):
    pool = house.pool(
        trouble="hang", once=True, max_seconds=1.0, max_grade_seconds=1.0, max_close_seconds=1.0, envs_per_worker=4
    )
    (broken,) = until(lambda: house.episodes("status <> 'done'"))
    assert broken["status"] == "timeout"
    assert broken["reason"] == "longer than 1 s; its verdict: longer than 1 s"
    (before,) = {int(pid) for where, pid in house.log() if where == "step"}
    until(lambda: before not in ask(pool.workers.remote()) and not psutil.pid_exists(before))
    begun = len(house.complete())
    until(lambda: len(house.complete()) > begun)
    assert house.episodes("status NOT IN ('done', 'timeout')") == []
    assert ask(pool.stats.remote())["workers_lost"] == 0


def test_an_environment_that_raises_is_an_episode_and_the_pool_goes_on(house: House):
    house.pool(trouble="raise", once=True)
    until(lambda: len(house.complete()) >= 2)
    (broken,) = house.episodes("status <> 'done'")
    assert (broken["status"], broken["outcome"]) == ("error", None)
    assert broken["reason"] == "RuntimeError: odd things happen"


def test_a_pool_that_comes_to_nothing_says_why_and_another_goes_on(house: House):
    bad, good = house.pool(name="bad", options={"colour": "red"}), house.pool(name="good")
    assert "cannot be made" in until(lambda: ask(bad.trouble.remote()))
    until(lambda: len([each for each in house.episodes("source = 'good'") if each["status"] == "done"]) >= 12)
    assert ask(good.trouble.remote()) == ""


def test_no_group_begins_while_the_trainer_has_enough(house: House):
    house.fill_buffer()
    pool = house.pool()
    until(lambda: len(ask(pool.workers.remote())) == 2)
    time.sleep(1)
    assert (house.log(), house.episodes()) == ([], [])
    assert ask(house.buffer.take.remote(1, 10.0)) is not None
    assert until(house.complete)


def test_the_pool_grows_while_attempts_wait_and_shrinks_when_idle(house: House):
    pool = house.pool(min_envs=1, max_envs=8, envs_per_worker=2, seconds=0.3, idle_s=1.0)
    until(lambda: len(ask(pool.workers.remote())) == 4)
    pids = set(ask(pool.workers.remote()))
    house.fill_buffer()
    until(lambda: len(ask(pool.workers.remote())) == 1)
    until(lambda: sum(psutil.pid_exists(pid) for pid in pids) == 1)
    assert ask(pool.stats.remote())["workers_lost"] == 0
    assert Counter(where for where, _ in house.log())["close"] >= 6, "environments are closed, not killed"
    assert house.episodes("status <> 'done'") == []


def test_more_are_asked_for_than_the_cluster_can_hold(house: House):
    """They are pending in Ray, and nobody is sent there."""
    pool = house.pool(min_envs=4, max_envs=8, envs_per_worker=2, cpus_per_worker=3.0)
    until(lambda: len(ask(pool.workers.remote())) == 2)  # of eight CPUs; the others would need three each
    begun = len(house.complete())
    until(lambda: len(house.complete()) >= begun + 10)
    assert len(ask(pool.workers.remote())) == 2
    assert house.episodes("status <> 'done'") == []


def test_close_ends_every_process_and_every_environment(house: House):
    pool = house.pool(seconds=0.2)
    until(lambda: len(house.complete()) >= 1)
    pids = ask(pool.workers.remote())
    ask(pool.close.remote())
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert sum(where == "close" for where, _ in house.log()) == 4


def test_a_pool_that_is_killed_takes_its_workers_along(house: House):
    pool = house.pool()
    pids = until(lambda: len(found := ask(pool.workers.remote())) == 2 and found)
    ray.kill(pool)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.fixture
def sandboxes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where they are kept; everybody may pass through it, as sandboxes of another user need."""
    folder = Path(tempfile.mkdtemp(prefix="clawrl-pool-", dir="/tmp"))
    folder.chmod(0o755)
    monkeypatch.setenv("CLAWRL_SANDBOX_HOME", str(folder))
    yield folder
    remove_tree(folder)


def test_the_next_pool_removes_the_sandboxes_of_one_that_was_killed(sandboxes: Path, house: House):
    backend = next((each for each in ("bwrap", "unshare") if not refusal(each, BEST_EFFORT)), "process")
    terminal = {
        "env": "envs:clawrl/Terminal-v0", "options": {"backend": backend, "limits": "best_effort"}, "group_size": 2,
        "min_envs": 2, "max_envs": 2, "envs_per_worker": 1, "max_turns": 1000,
    }  # fmt: skip
    killed = house.pool(**terminal)
    boxes = until(lambda: len(found := set((sandboxes / "boxes").glob("*/label.json"))) == 2 and found)
    pids = ask(killed.workers.remote())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    ray.kill(killed)
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert {each for each in boxes if each.exists()} == boxes, "nobody had the time to close them"
    house.fill_buffer()  # so that the next one makes none
    house.pool(**terminal)
    until(lambda: not any((sandboxes / "boxes").iterdir()))
