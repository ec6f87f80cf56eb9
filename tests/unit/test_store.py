"""The weight store over a real journal, without Ray: appends that failed once they were committed, offers at once."""

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clawrl.config import VersionsSection
from clawrl.errors import JournalError
from clawrl.journal.actor import Journal
from clawrl.training import weights
from clawrl.training.weights import Head, WeightStore
from clawrl.types import GROUP, Canary, Swap, WeightVersion

CANARY = Canary((np.array([1, 2], np.int32),), (np.array([-2.0], np.float32),))


class Unsure:
    """A journal's handle; each of the calls in `breaks` is carried out, and then fails."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.breaks = journal, []

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any, **named: Any) -> Any:
            answer = await getattr(self.journal, name)(*arguments, **named)
            if name in self.breaks:
                self.breaks.remove(name)
                raise JournalError("the connection broke")
            return answer

        return SimpleNamespace(remote=call)


@pytest.fixture
async def handle(tmp_path):
    handle = Unsure(Journal(f"sqlite:///{tmp_path / 'journal.sqlite'}"))
    yield handle
    await handle.journal.close()


@pytest.fixture
async def store(handle, tmp_path, monkeypatch) -> WeightStore:
    monkeypatch.setattr(weights, "metric", lambda name: SimpleNamespace(set=print, inc=print))
    monkeypatch.setattr(weights, "model_folder", Path)
    monkeypatch.setattr(weights, "write_checkpoint", lambda folder, *_: folder.mkdir())
    monkeypatch.setattr(weights, "read_canary", lambda folder: CANARY)
    return WeightStore(VersionsSection(keep=1, keep_in_memory=1), handle, str(tmp_path), "/base")


async def offer(store: WeightStore, number: int) -> bool:
    """A version without tensors."""
    store._held[number] = {}
    version = WeightVersion(number, number - 1, "full", None, (f"sample-{number}",), {}, 0.0)
    return await store.offer(version, 0, CANARY)


def swap(number: int) -> Swap:
    return Swap(number, "one", 1.0, 0.0, 1.0, float(number))


async def test_a_version_that_was_recorded_after_all_is_known(store, handle):
    waiting = asyncio.create_task(store.wait("one", {GROUP: 0}, 10.0))
    handle.breaks.append("record_version")
    with pytest.raises(JournalError):
        await offer(store, 1)
    assert await store.latest() == Head(1, 2)
    publication = await asyncio.wait_for(waiting, 5)
    assert publication is not None
    assert publication.number == 1
    assert await offer(store, 1), "offered again, it is known"
    assert await offer(store, 2)


async def test_what_was_decided_after_all_is_known(store, handle):
    await offer(store, 1)
    handle.breaks.append("append")
    with pytest.raises(JournalError):
        await store.report(swap(1))
    assert (await store.status())["states"] == {0: "retired", 1: "serving"}
    await store.report(swap(1))
    assert [event.state for event in await handle.journal.version_events()] == ["candidate", "serving", "retired"]


async def test_who_was_told_of_the_registry_before_decides_on_what_is_recorded(store, handle):
    await offer(store, 1)
    handle.breaks.append("append")
    rolled_back, reported = await asyncio.gather(store.rollback(0), store.report(swap(1)), return_exceptions=True)
    assert isinstance(rolled_back, JournalError)
    assert reported is None
    assert (await store.status())["states"] == {0: "serving", 1: "rejected"}
    assert [event.state for event in await handle.journal.version_events()] == ["candidate", "rejected"]


async def test_what_an_offer_has_just_written_is_not_taken_for_old(store, tmp_path, monkeypatch):
    remove = weights._remove_others

    def remove_slowly(folder: Path, stay: set) -> None:
        time.sleep(0.1)
        remove(folder, stay)

    monkeypatch.setattr(weights, "_remove_others", remove_slowly)
    assert await asyncio.gather(offer(store, 1), offer(store, 2)) == [True, True]
    assert (tmp_path / "versions" / "2").is_dir()


async def test_nothing_of_a_forgotten_version_is_left_of_the_trainers_state(store, tmp_path):
    names = {"1-from-0", "2-from-1", "3-from-2", "12-from-11", ".3-from-2.unfinished", ".13-from-1.unfinished"}
    for name in names:
        (tmp_path / "trainer" / "group" / name).mkdir(parents=True)
    await offer(store, 1)
    await offer(store, 2)  # and 3 was never recorded
    (tmp_path / "versions" / ".3.unfinished").mkdir()
    store._remove_traces(await store._known(), [2])
    assert {path.name for path in (tmp_path / "trainer" / "group").iterdir()} == {"1-from-0", "12-from-11"}
    assert {path.name for path in (tmp_path / "versions").iterdir()} == {"2"}
