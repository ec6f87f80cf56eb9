"""When adapters come into an engine and leave it, without one: what is asked of vLLM is written down."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clawrl.config import PolicySection
from clawrl.serving import engine as module
from clawrl.serving.engine import Engine


class Llm:
    """Takes adapters and gives them up."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(add_request=print)
        self.loaded: list[int] = []
        self.names: list[str] = []

    async def add_lora(self, request: Any) -> None:
        self.loaded.append(request.lora_int_id)
        self.names.append(request.lora_name)

    async def remove_lora(self, number: int) -> None:
        self.loaded.remove(number)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(module, "UNLOAD_AFTER_S", 0.01)
    return Engine(Llm(), None, PolicySection(), support=4, adapters_in_batch=2)


def folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name


async def test_an_adapter_leaves_with_its_last_request(engine, tmp_path):
    first = await engine.add_adapter(1, folder(tmp_path, "1"))
    engine.switch(first)
    with engine._held(first):
        engine.switch(await engine.add_adapter(2, folder(tmp_path, "2")))
        await asyncio.sleep(0.05)
        assert engine._llm.loaded == [1, 2]
    await asyncio.sleep(0.05)
    assert engine._llm.loaded == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert engine.version == 2


async def test_one_version_loaded_again_has_another_name(engine, tmp_path):
    for name in ("a", "b"):
        await engine.add_adapter(7, folder(tmp_path, name))
    assert len(set(engine._llm.names)) == 2


async def test_a_version_waits_while_long_replies_hold_all_places(engine, tmp_path):
    """A request of a third adapter would wait in the engine; so the third is not switched to."""
    first = await engine.add_adapter(1, folder(tmp_path, "1"))
    engine.switch(first)
    with engine._held(first):
        second = await engine.add_adapter(2, folder(tmp_path, "2"))
        engine.switch(second)
        with engine._held(second):
            third = asyncio.create_task(engine.add_adapter(3, folder(tmp_path, "3")))
            await asyncio.sleep(0.05)
            assert not third.done()
        assert (await asyncio.wait_for(third, 5)).version == 3


async def test_a_user_has_their_own_or_everyones(engine, tmp_path):
    everyones = await engine.add_adapter(1, folder(tmp_path, "1"))
    engine.switch(everyones)
    own = await engine.add_adapter(2, folder(tmp_path, "2"), patient=False)
    engine.switch(own, "ann")
    assert (engine.adapter("ann"), engine.adapter("ben"), engine.version) == (own, everyones, 1)
    engine.switch(await engine.add_adapter(3, folder(tmp_path, "3"), patient=False), "ann")
    await asyncio.sleep(0.05)
    assert engine._llm.loaded == [1, 3], "what was Ann's leaves, what is everyone's stays"
    engine.switch(None, "ann")
    await asyncio.sleep(0.05)
    assert (engine.adapter("ann"), engine._llm.loaded) == (everyones, [1])


async def test_a_moving_average_scores_and_goes_with_its_policy(engine, tmp_path):
    assert engine._scoring("ema", "ann") is None, "there is no version yet"
    everyones, average = [await engine.add_adapter(1, folder(tmp_path, name)) for name in ("1", "1-average")]
    engine.switch(everyones, average=average)
    assert [engine._scoring(each, "ann") for each in ("frozen", "current", "ema")] == [None, everyones, average]
    own = await engine.add_adapter(2, folder(tmp_path, "2"))
    engine.switch(own, "ann")
    assert engine._scoring("ema", "ann") is own, "a version without an average is where one begins"
    assert engine._scoring("ema", "ben") is average
    owns = await engine.add_adapter(3, folder(tmp_path, "3"))
    engine.switch(owns, "ann", await engine.add_adapter(3, folder(tmp_path, "3-average")))
    assert engine._scoring("ema", "ann").folder.name == "3-average"
    assert engine.adapter("ann") is owns, "which answers"
    engine.switch(None, "ann")
    engine.switch(None)
    await asyncio.sleep(0.05)
    assert engine._llm.loaded == []


async def test_a_users_version_does_not_wait_for_a_place(engine, tmp_path):
    """Where each user has an adapter, all places are taken all the time."""
    held = [await engine.add_adapter(number, folder(tmp_path, str(number)), patient=False) for number in (1, 2)]
    with engine._held(held[0]), engine._held(held[1]):
        assert (await asyncio.wait_for(engine.add_adapter(3, folder(tmp_path, "3"), patient=False), 5)).version == 3


async def test_every_prompt_of_a_users_request_is_answered_by_their_own(engine, tmp_path, monkeypatch):
    own = await engine.add_adapter(2, folder(tmp_path, "2"), patient=False)
    engine.switch(own, "ann")
    asked: list[Any] = []

    async def generate(prompt: Any, params: Any, request_id: str, **options: Any):
        asked.append((request_id, options.get("lora_request")))
        yield SimpleNamespace(prompt_token_ids=None, outputs=[])

    engine._llm.generate = generate
    engine.record("cmpl-a-0", "ann")
    for request in ("cmpl-a-0", "cmpl-a-1", "cmpl-b-0"):
        async for _ in engine.generate({}, SimpleNamespace(logprobs=None, stop=None, extra_args=None), request):
            pass
    assert asked == [("cmpl-a-0", own.request), ("cmpl-a-1", own.request), ("cmpl-b-0", None)]
    engine.forget("cmpl-a-0")
    assert engine._askers == {}
