"""A pool's worker without Ray: attempts in real environments, against an endpoint with scripted replies."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawrl.config import PoolSection
from clawrl.rollout import worker
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.worker import EnvWorker, make_env, remove_leftovers
from clawrl.types import Episode
from jobs.bench.endpoint import Endpoint

pytestmark = pytest.mark.timeout(30)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(lambda messages: {"role": "assistant", "content": "yes"}) as opened:
        yield opened


@pytest.fixture
async def start(tmp_path: Path, endpoint: Endpoint) -> AsyncIterator[Callable[..., EnvWorker]]:
    """Starts workers with odd environments: `trouble`, and settings of the pool."""
    started = []

    def start(trouble: dict[str, Any], **given: Any) -> EnvWorker:
        options = {"folder": str(tmp_path), **trouble}
        settings = PoolSection(name="odd", env="odd_env:clawrl/Odd-v0", options=options, **given)
        started.append(EnvWorker(settings, endpoint.url, "scripted"))
        return started[-1]

    endpoint.requests.clear()
    yield start
    for each in started:
        await each.close()


def attempt(session: str) -> Attempt:
    return Attempt("odd", "group", 2, session, "train", 7)


def visits(folder: Path) -> list[str]:
    """What was asked of the environments, in order."""
    return [line.split()[0] for line in (folder / "log").read_text().splitlines()]


async def made(working: EnvWorker, *sessions: str) -> list[Episode]:
    """Each of the sessions to its end, in their order."""
    await working.begin(*map(attempt, sessions))
    found: dict[str, Episode] = {}
    while not found.keys() >= set(sessions):
        found |= {each.session: each for each in await working.ended(list(found))}
    return [found[session] for session in sessions]


async def test_environments_are_used_again(start, tmp_path):
    working = start({})
    for session in ("a", "b"):
        (episode,) = await made(working, session)
        assert (episode.status, episode.outcome, episode.rewards) == ("done", 1.0, (0.0, 0.0))
    assert visits(tmp_path) == ["reset", "step", "step", "grade"] * 2
    assert (await working.ping()).environments == 1
    await working.close()
    assert visits(tmp_path)[-1] == "close"
    assert (await working.ping()).environments == 0


async def test_the_same_attempt_is_made_once_while_it_lasts_and_after(start, endpoint):
    working = start({"seconds": 0.1})
    await working.begin(attempt("a"))
    await made(working, "a")
    await working.begin(attempt("a"))
    await made(working, "b")
    assert endpoint.requests == {"a": 2, "b": 2}


async def test_an_end_is_told_until_it_is_taken(start):
    working = start({})
    (episode,) = await made(working, "a")
    assert await working.ended([]) == [episode]
    await working.begin(attempt("b"))
    assert [each.session for each in await working.ended(["a"])] == ["b"]


async def test_only_the_newest_attempts_are_remembered(start, endpoint, monkeypatch):
    monkeypatch.setattr(worker, "KEPT", 2)
    working = start({})
    for session in "abcda":
        await made(working, session)
    assert endpoint.requests == {"a": 4, "b": 2, "c": 2, "d": 2}


@pytest.mark.parametrize("at", ["reset", "step", "grade"])
async def test_an_environment_that_raises_is_a_reason_and_not_used_again(start, tmp_path, at):
    working = start({"trouble": "raise", "at": at, "once": True})
    (broken,) = await made(working, "a")
    assert (broken.status, broken.outcome, broken.reason) == ("error", None, "RuntimeError: odd things happen")
    (episode,) = await made(working, "b")
    assert episode.status == "done"
    assert "close" in visits(tmp_path)


async def test_an_environment_that_cannot_be_made_is_a_reason(start):
    (broken,) = await made(start({"colour": "red"}), "a")
    assert broken.status == "error"
    assert "pools.odd: env='odd_env:clawrl/Odd-v0' cannot be made" in broken.reason


async def test_one_that_raises_when_it_is_closed_harms_nobody(start):
    working = start({"trouble": "raise", "at": "close"})
    (episode,) = await made(working, "a")
    assert episode.status == "done"
    await working.close()
    assert (await working.ping()).environments == 0


async def test_an_endpoint_that_does_not_answer_is_a_reason(tmp_path):
    settings = PoolSection(name="odd", env="odd_env:clawrl/Odd-v0", options={"folder": str(tmp_path)}, max_seconds=9)
    (broken,) = await made(EnvWorker(settings, "http://127.0.0.1:9/v1", "scripted"), "a")
    assert (broken.status, broken.outcome) == ("error", None)
    assert broken.reason.startswith("no reply: APIConnectionError")


async def test_a_step_under_way_when_time_is_up_counts_if_it_ends_the_episode(start, tmp_path):
    (episode,) = await made(start({"seconds": 1.0}, max_seconds=1.8), "a")
    assert (episode.status, episode.outcome, episode.reason) == ("timeout", 1.0, "longer than 1.8 s")
    assert visits(tmp_path).count("grade") == 1, "a verdict may be asked once"


async def test_a_step_under_way_that_does_not_is_waited_for_and_then_graded(start, tmp_path):
    (episode,) = await made(start({"seconds": 0.9}, max_seconds=0.8), "a")
    assert (episode.status, episode.outcome) == ("timeout", 0.5)
    assert visits(tmp_path)[:3] == ["reset", "step", "grade"]


async def test_too_many_turns_are_graded_as_they_stand(start):
    (episode,) = await made(start({}, max_turns=1), "a")
    assert (episode.status, episode.outcome, episode.reason) == ("truncated", 0.5, "more than 1 turns")


async def test_a_reset_that_takes_too_long_has_no_outcome(start):
    (episode,) = await made(start({"trouble": "nap", "at": "reset"}, max_seconds=0.1), "a")
    assert (episode.status, episode.outcome) == ("timeout", None)


async def test_a_call_that_hangs_keeps_its_own_thread_only(start):
    trouble = {"trouble": "nap", "naps": 7.0, "once": True}
    working = start(trouble, max_seconds=3.0, max_grade_seconds=0.2, max_close_seconds=0.1)
    episodes = await made(working, "a", "b", "c")
    assert sorted(each.status for each in episodes) == ["done", "done", "timeout"]
    while not (await working.ping()).hung:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    while (await working.ping()).hung:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    assert (await working.ping()).environments == 2, "it came back and was closed"


async def test_places_bound_who_acts_and_spares_are_reset_ahead(start, tmp_path):
    working = start({"seconds": 0.2}, max_envs=2, envs_per_worker=2, spares=1)
    started = time.monotonic()
    episodes = await made(working, "a", "b", "c")
    seconds = time.monotonic() - started
    assert seconds >= 0.8, "two steps of two, then of one"
    assert sorted(visits(tmp_path)[:5]) == ["reset"] * 3 + ["step"] * 2
    assert max(each.seconds for each in episodes) <= seconds - 0.3, "waiting for a place is not the attempt's time"


async def test_settings_are_turned_into_workers():
    settings = PoolSection(name="odd", env="odd", min_envs=20, max_envs=40, envs_per_worker=32)
    assert (settings.min_workers, settings.max_workers, settings.places) == (1, 2, 20)
    with pytest.raises(ValueError, match="min_envs=2 is above max_envs=1; lower it"):
        PoolSection(name="odd", env="odd", min_envs=2, max_envs=1)
    with pytest.raises(ValueError, match="spares=2 is more than the 1 that act in a worker; lower it"):
        PoolSection(name="odd", env="odd", max_envs=1, spares=2)


async def test_what_outlives_a_process_carries_the_machines_label(monkeypatch):
    """And what has a label of its own keeps it."""
    from envs.terminal.env import TerminalEnv

    asked: list[str] = []
    monkeypatch.setattr(TerminalEnv, "reconcile", classmethod(lambda cls, run: asked.append(run)))
    for options in ({}, {"run": "mine"}):
        settings = PoolSection(name="terminal", env="envs:clawrl/Terminal-v0", options=options)
        remove_leftovers(settings)
        env: Any = make_env(settings).unwrapped
        assert env._kept.run == asked[-1]
    assert asked == [worker.label(PoolSection(name="x", env="x")), "mine"]
