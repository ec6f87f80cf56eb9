"""How a policy replica follows the versions: what is asked again, and what it is given up for."""

import asyncio
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clawrl.errors import JournalError, PolicyError, WeightSyncError
from clawrl.serving import policy
from clawrl.serving.policy import Policy
from clawrl.types import EMA, GROUP, Bucket, Canary, Publication, Swap, Withdrawal

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

    async def _wait(self, replica: str, versions: dict[str, int | None], timeout_s: float) -> Publication | None:
        if versions[GROUP] == 1:
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

    def adapter(self, user: str) -> None:
        return None

    async def canary_logprobs(self, canary: Canary, adapter: None) -> tuple[np.ndarray, ...]:
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
    made._failure, made._adapters = None, None
    served: dict[str, int | None] = {GROUP: 0}
    made._versions, made._canaries, made._taking_over = served, {}, defaultdict(asyncio.Lock)
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


class Users:
    """A store in which Ann has a version of her own, and the replica that asks it; an adapter is its number here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.news: asyncio.Queue[Publication | Withdrawal] = asyncio.Queue()
        self.away = False
        self.hangs: asyncio.Event | None = None
        self.switched: list[tuple[str, int | None]] = []
        self.policy = replica(monkeypatch, self)  # type: ignore[arg-type]
        self.policy._engine, self.policy._meeting, self.policy._reporting = self, {}, set()  # type: ignore[assignment]
        self.policy._adapters, self.policy._personal = SimpleNamespace(), True  # type: ignore[assignment]
        self.policy._write_adapters = lambda publication, buckets: [publication.number]  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self, f"_{name}"))

    async def _meet(self, replica: str, user: str) -> Publication | None:
        self.calls.append(("meet", user))
        await (asyncio.sleep(0.01) if self.hangs is None else self.hangs.wait())
        if self.away:
            raise JournalError("away")
        return Publication(4, 1, CANARY, {}, "ann") if user == "ann" else None

    async def _wait(self, replica: str, versions: dict[str, int | None], timeout_s: float) -> Any:
        self.calls.append(("wait", versions))
        return await self.news.get()

    async def _bucket(self, number: int, index: int) -> list[Any]:
        return ["bucket"]

    async def _report(self, swap: Swap) -> None:
        self.calls.append(("report", swap.version))

    def adapter(self, user: str) -> None:
        return None

    async def add_adapter(self, version: int, folder: Any, *, patient: bool) -> int:
        assert not patient
        return version

    async def canary_logprobs(self, canary: Canary, adapter: int | None) -> tuple[np.ndarray, ...]:
        return (np.array([-2.0 - (adapter or 0)], np.float32),)

    def switch(self, adapter: int | None, scope: str, average: int | None = None) -> None:
        self.switched.append((scope, adapter))


async def test_a_user_is_met_once_and_served_their_own_from_the_first_request(monkeypatch):
    users = Users(monkeypatch)
    await asyncio.gather(*(users.policy._meet(user) for user in ("ann", "ann", "ben")))
    assert users.switched == [("ann", 4)]
    assert users.policy._versions == {GROUP: 0, "ann": 4, "ben": None}
    await users.policy._meet("ann")
    await asyncio.gather(*users.policy._reporting)
    assert sorted(users.calls) == [("meet", "ann"), ("meet", "ben"), ("report", 4)]


async def test_what_fails_on_its_way_in_leaves_nothing(monkeypatch, tmp_path):
    """The version is asked for again, and written into new folders."""
    users = Users(monkeypatch)
    folders = [tmp_path / name for name in ("adapter", "average")]
    dropped: list[Any] = []

    async def add_adapter(version: int, folder: Path, *, patient: bool) -> str:
        if folder.name == "average":
            raise RuntimeError("no memory")
        return folder.name

    def write(publication: Publication, buckets: Any) -> list[Path]:
        for each in folders:
            each.mkdir()
        return folders

    users.policy._write_adapters = write  # type: ignore[assignment]
    users.add_adapter, users.unload_if_idle = add_adapter, dropped.append  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="no memory"):
        await users.policy._switch_adapter(Publication(4, 1, CANARY, {}, "ann"), [])
    assert (dropped, [each.name for each in tmp_path.iterdir()]) == (["adapter"], ["adapter"])
    assert users.switched == []


def test_a_full_disk_keeps_no_half_adapter(monkeypatch, tmp_path):
    replicas = replica(monkeypatch, Store())
    replicas._adapters = SimpleNamespace(folder=tmp_path)  # type: ignore[assignment]
    names = ("model.weight", f"{EMA}model.weight")
    bucket = Bucket(names, ("float32",) * 2, ((2,),) * 2, (np.zeros(2, np.float32),) * 2)
    monkeypatch.setattr(policy.ray, "get", lambda ref: bucket)
    written = replicas._write_adapters(Publication(4, 1, CANARY, {"r": 8}), ["ref"])  # type: ignore[list-item]
    assert [sorted(each.name for each in folder.iterdir()) for folder in written] == [
        ["adapter_config.json", "adapter_model.safetensors"]
    ] * 2

    def full(tensors: Any, file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        replicas._write_adapters(Publication(5, 1, CANARY, {"r": 8}), ["ref"])  # type: ignore[list-item]
    assert sorted(tmp_path.iterdir()) == sorted(written)


async def test_a_met_users_versions_are_followed_and_withdrawn(monkeypatch):
    users = Users(monkeypatch)
    await users.policy._meet("ben")
    for news in (Publication(5, 1, CANARY, {}, "ben"), Publication(5, 1, CANARY, {}, "ben"), Withdrawal("ben")):
        users.news.put_nowait(news)
        await users.policy._follow(1.0)
    assert users.switched == [("ben", 5), ("ben", None)], "what is served already is not loaded again"
    assert [call for call in users.calls if call[0] == "wait"] == [
        ("wait", {GROUP: 0, "ben": None}),
        ("wait", {GROUP: 0, "ben": 5}),
        ("wait", {GROUP: 0, "ben": 5}),
    ]


async def test_nobody_is_refused_while_the_store_is_away(monkeypatch):
    users = Users(monkeypatch)
    users.away = True
    await users.policy._meet("ann")
    assert (users.switched, users.policy._versions) == ([], {GROUP: 0, "ann": None})


async def test_who_has_not_asked_for_long_is_forgotten(monkeypatch):
    monkeypatch.setattr(policy, "KEPT_USERS", 2)
    users = Users(monkeypatch)
    for user in ("ann", "ben", "eve", "joe"):
        await users.policy._meet(user)
    assert list(users.policy._versions) == [GROUP, "ann", "joe"], "a crowd of names evicts nobody who has a version"
    assert users.switched == [("ann", 4), ("ben", None), ("eve", None)]


async def test_a_store_that_does_not_answer_holds_nobody_up(monkeypatch):
    """The first request waits a little and gets everyone's; the user's own comes when it comes."""
    monkeypatch.setattr(policy, "MEET_S", 0.02)
    users = Users(monkeypatch)
    users.hangs = asyncio.Event()
    await asyncio.wait_for(users.policy._meet("ann"), 5)
    assert users.switched == []
    users.hangs.set()
    await asyncio.wait_for(users.policy._meeting["ann"], 5)
    assert users.switched == [("ann", 4)]
