"""Requests that wait: held with a sign of life, in order, and refused only beyond a bound."""

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest
from echo_door import Echo, Pieces, door

from clawrl.config import GatewaySection
from clawrl.errors import GatewayError
from clawrl.serving.admission import MINUTE_S, Admission, Spending
from clawrl.serving.keys import add_key

HI = {"messages": [{"role": "user", "content": "hi"}]}


class Slow(Echo):
    """Thinks for a while before it speaks."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.now, self.most, self.cancelled = seconds, 0, 0, 0

    def chat(self, body: dict[str, Any], request: str, user: str = "") -> Any:
        return Thinking(self, super().chat(body, request, user))


class Thinking:
    def __init__(self, slow: Slow, pieces: Pieces) -> None:
        self._slow, self._pieces, self._thought = slow, pieces, False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._thought:
            self._slow.now += 1
            self._slow.most = max(self._slow.most, self._slow.now)
            try:
                await asyncio.sleep(self._slow.seconds)
            finally:
                self._slow.now -= 1
            self._thought = True
        return await anext(self._pieces)

    def cancel(self) -> None:
        self._slow.cancelled += 1


async def chat(clawrl, body: dict, **headers: str):
    async with clawrl.client(0, **headers) as client:
        return await client.post("/v1/chat/completions", json=body, timeout=30)


async def test_a_held_stream_shows_signs_of_life_and_is_served(tmp_path):
    async with door(tmp_path, policy=Slow(0.5), gateway={"keep_alive_s": 0.1}) as clawrl:
        answer = await chat(clawrl, {**HI, "stream": True})
        chunks = [json.loads(event[6:]) for event in answer.text.split("\n\n") if event.startswith("data: {")]
        empty = [chunk for chunk in chunks if chunk["choices"][0]["delta"] == {} and "model" in chunk]
        assert 2 <= len(empty) <= 5
        assert {chunk["id"] for chunk in chunks} == {clawrl.rows("SELECT id FROM turns")[0][0]}
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert said == "1: hi"
        assert answer.text.endswith("data: [DONE]\n\n")


async def test_a_quick_stream_has_none(tmp_path):
    async with door(tmp_path, gateway={"keep_alive_s": 0.2}) as clawrl:
        answer = await chat(clawrl, {**HI, "stream": True})
        assert '"model"' not in answer.text


async def test_requests_beyond_the_slots_wait_their_turn(tmp_path):
    slow = Slow(0.05)
    async with door(tmp_path, policy=slow, gateway={"max_concurrent_requests": 2}) as clawrl:
        answers = await asyncio.gather(*(chat(clawrl, HI) for _ in range(6)))
        assert [answer.status_code for answer in answers] == [200] * 6
        assert slow.most == 2


async def test_beyond_the_bound_on_waiting_they_are_told_when_to_come_again(tmp_path):
    bounds = {"max_concurrent_requests": 1, "max_waiting": 2}
    async with door(tmp_path, policy=Slow(0.2), gateway=bounds) as clawrl:
        answers = await asyncio.gather(*(chat(clawrl, HI) for _ in range(5)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(refused) == 2
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
        assert (await chat(clawrl, HI)).status_code == 200


async def test_one_key_does_not_take_the_others_slots(tmp_path):
    slow = Slow(0.1)
    async with door(tmp_path, policy=slow, gateway={"key_concurrent": 1, "key_waiting": 1}) as clawrl:
        greedy, modest = (add_key(tmp_path / "keys.json", user)[1] for user in ("greedy", "modest"))
        answers = await asyncio.gather(
            *(chat(clawrl, HI, authorization=f"Bearer {greedy}") for _ in range(4)),
            chat(clawrl, HI, authorization=f"Bearer {modest}"),
        )
        assert [answer.status_code for answer in answers].count(429) == 2
        assert answers[-1].status_code == 200
        assert slow.most == 2


async def test_who_leaves_while_held_leaves_nothing_behind(tmp_path):
    slow = Slow(5)
    async with door(tmp_path, policy=slow, gateway={"max_concurrent_requests": 1, "keep_alive_s": 0.05}) as clawrl:
        port = clawrl._gateways[0]._settings.port
        body = json.dumps({**HI, "stream": True}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head.encode() + body)
            assert b"200 OK" in await reader.readline()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
        async with asyncio.timeout(1):
            while slow.now or slow.cancelled < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert clawrl._gateways[0]._answering.num_waiting == 0
        assert not clawrl._gateways[0]._answering._admission._free.locked()


def test_tokens_of_the_last_minute():
    spending = Spending(100)
    spending.add(60, 0.0)
    assert spending.ready_in(1.0) == 0
    spending.add(60, 10.0)
    assert spending.ready_in(20.0) == pytest.approx(MINUTE_S - 20)
    assert spending.ready_in(60.5) == 0
    spending.add(500, 61.0)
    assert spending.ready_in(62.0) == pytest.approx(59.0)
    assert spending.ready_in(121.5) == 0


async def test_a_key_that_spent_its_tokens_is_held(monkeypatch):
    admission = Admission(GatewaySection(key_tokens_per_minute=10, key_waiting=1))
    await admission.enter("k")
    admission.leave("k")
    admission.spend("k", 50)
    held = asyncio.create_task(admission.enter("k"))
    await asyncio.sleep(0.05)
    assert not held.done()
    await admission.enter("other")
    with pytest.raises(GatewayError, match="key_waiting=1") as caught:
        await admission.enter("k")
    assert caught.value.status == 429
    assert 50 < (caught.value.retry_after or 0) <= 60
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    assert admission.num_waiting == 0
