"""A worker's post without a network, or with a bad one."""

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from clawrl.rollout import post
from clawrl.rollout.attempt import Attempt, ended
from clawrl.rollout.post import Post
from clawrl.types import Episode

pytestmark = pytest.mark.timeout(30)


class Worker:
    """Makes every attempt in no time. `calls` and `made` count; `lose` says how many answers are lost."""

    def __init__(self, lose: int = 0, dies: bool = False) -> None:
        self.calls: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self._ended: dict[str, Episode] = {}
        self._lose, self._dies = lose, dies

    async def begin(self, *attempts: Attempt) -> None:
        for attempt in attempts:
            if attempt.session not in self.made:
                self.made[attempt.session] += 1
                self._ended[attempt.session] = ended(attempt, "done", "", 0.0)
        self._answer("begin")

    async def ended(self, taken: list[str]) -> list[Episode]:
        for session in taken:
            del self._ended[session]
        if self._dies:
            raise ActorDiedError
        while not self._ended:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        self._answer("ended")
        return list(self._ended.values())

    def _answer(self, call: str) -> None:
        self.calls[call] += 1
        if self.calls[call] <= self._lose:
            raise ActorUnavailableError("lost on the way", None)


def handle(worker: Worker) -> Any:
    return SimpleNamespace(begin=SimpleNamespace(remote=worker.begin), ended=SimpleNamespace(remote=worker.ended))


def attempts(*sessions: str) -> list[Attempt]:
    return [Attempt("odd", "group", 2, session, "train", 7) for session in sessions]


async def all_made(mail: Post, *sessions: str) -> list[str]:
    episodes = await asyncio.gather(*map(mail.make, attempts(*sessions)))
    return [episode.session for episode in episodes]


async def test_what_is_asked_for_together_goes_in_one_call():
    worker = Worker()
    mail = Post(handle(worker))
    assert await all_made(mail, *"abcdefgh") == list("abcdefgh")
    assert worker.calls == {"begin": 1, "ended": 1}
    assert await all_made(mail, "i", "j") == ["i", "j"]
    assert set(worker.made.values()) == {1}


async def test_lost_answers_are_asked_for_again_and_nothing_is_made_twice(monkeypatch):
    monkeypatch.setattr(post, "RETRY_S", 0.01)
    worker = Worker(lose=2)
    assert await all_made(Post(handle(worker)), "a", "b") == ["a", "b"]
    assert worker.made == {"a": 1, "b": 1}
    assert worker.calls["begin"] == 3


async def test_all_who_wait_are_told_of_a_worker_s_death():
    mail = Post(handle(Worker(dies=True)))
    told = await asyncio.gather(*map(mail.make, attempts("a", "b")), return_exceptions=True)
    assert [type(each) for each in told] == [ActorDiedError, ActorDiedError]


async def test_who_gives_up_waiting_disturbs_nobody():
    mail = Post(handle(Worker()))
    first, second = (asyncio.create_task(mail.make(attempt)) for attempt in attempts("a", "b"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).session == "b"
