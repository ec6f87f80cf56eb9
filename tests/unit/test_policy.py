"""How a policy replica follows the versions: what is asked again, and what it is given up for."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clawrl.errors import JournalError, PolicyError, WeightSyncError
from clawrl.serving import policy
from clawrl.serving.policy import Policy
from clawrl.types import Canary, Publication, Swap

CANARY = Canary((np.array([1, 2], np.int32),), (np.array([-2.0], np.float32),))


class Store:
    """Publishes version 1; the calls in `fails` fail twice each."""

    def __init__(self, *fails: str) -> None:
        self._left = dict.fromkeys(fails, 2)
        self.reports: list[Swap] = []
        self.done = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            if self._left.get(name, 0):
                self._left[name] -= 1
                raise JournalError("the journal is away") if name != "bucket" else WeightSyncError("no such bucket")
            return await getattr(self, f"_{name}")(*arguments)

        return SimpleNamespace(remote=call)

    async def _wait(self, replica: str, current: int, timeout_s: float) -> Publication | None:
        if current == 1:
            self.done.set()
            await asyncio.sleep(timeout_s)
            return None
        return Publication(1, 2, CANARY)

    async def _bucket(self, number: int, index: int) -> list[Any]:
        return [f"bucket {index}"]

    async def _report(self, swap: Swap) -> None:
        self.reports.append(swap)


class Engine:
    """Takes weights over, or breaks off."""

    def __init__(self, broken: str | None) -> None:
        self.version, self.taken, self._broken = 0, 0, broken

    async def take_over(self, version: int, num_buckets: int) -> float:
        self.taken += 1
        if self._broken == "take_over":
            raise RuntimeError("half of the weights")
        self.version = version
        return 1.0

    async def canary_logprobs(self, canary: Canary) -> tuple[np.ndarray, ...]:
        if self._broken == "canary" and self.version == 1:
            raise RuntimeError("no scores")
        return (np.array([-2.0 if self.version == 1 else -3.0], np.float32),)

    async def generates(self) -> None:
        pass


def replica(monkeypatch: pytest.MonkeyPatch, store: Store, broken: str | None = None) -> Policy:
    monkeypatch.setattr(policy, "RETRY_S", 0.001)
    monkeypatch.setattr(policy.ray, "wait", lambda refs, fetch_local: (refs, []))
    monkeypatch.setattr(policy, "metric", lambda name: SimpleNamespace(observe=print, set=print))
    made = Policy.__new__(Policy)
    made.replica, made._store, made._engine = "one", store, Engine(broken)  # type: ignore[assignment]
    made._failure, made._canary_logprobs, made._adapters = None, None, None
    return made


@pytest.mark.parametrize("fails", [(), ("wait",), ("bucket",), ("report",), ("wait", "bucket", "report")])
async def test_what_says_nothing_of_the_weights_is_asked_again(monkeypatch, fails):
    store = Store(*fails)
    following = replica(monkeypatch, store)
    task = asyncio.create_task(following._follow_for_ever())
    await asyncio.wait_for(store.done.wait(), 5)
    task.cancel()
    assert [(swap.version, swap.canary_error, swap.canary_moved) for swap in store.reports] == [(1, 0.0, 1.0)]
    assert following._engine.taken == 1, "a report that fails is no reason to swap again"  # type: ignore[attr-defined]
    await following.check_health()


@pytest.mark.parametrize("broken", ["take_over", "canary"])
async def test_a_replica_whose_weights_are_uncertain_is_given_up(monkeypatch, broken):
    store = Store()
    following = replica(monkeypatch, store, broken)
    await asyncio.wait_for(following._follow_for_ever(), 5)
    assert store.reports == []
    with pytest.raises(PolicyError, match="replica one cannot serve"):
        await following.check_health()
