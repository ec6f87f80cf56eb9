"""The gateway's own socket: shared by replicas, closed with its replies ended, nobody refused."""

import asyncio
import socket
from contextlib import asynccontextmanager

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from clawrl.serving.listener import ClientGone, InTurn, Listener, while_connected
from jobs import free_port


class Busy:
    """An app that counts how many requests it answers at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def answer(self, request: Request) -> PlainTextResponse:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.05)
        self.now -= 1
        return PlainTextResponse("done")

    @property
    def app(self) -> Starlette:
        return Starlette(routes=[Route("/work", self.answer), Route("/other", self.answer)])


@asynccontextmanager
async def listening(app, port=None):
    port = port or free_port()
    listener = Listener(app, "127.0.0.1", port)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        try:
            yield client, listener
        finally:
            await listener.close()


@pytest.mark.parametrize(("keys", "most"), [(["a", "a", "a"], 1), (["a", "b", "c"], 3)])
async def test_requests_with_one_key_are_answered_in_turn(keys, most):
    busy = Busy()
    async with listening(InTurn(busy.app)) as (client, _):
        await asyncio.gather(*(client.get("/work", headers={"idempotency-key": key}) for key in keys))
    assert busy.most == most


async def test_a_second_replica_shares_the_port_and_outlives_the_first():
    port = free_port()
    async with listening(Busy().app, port) as (client, first), listening(Busy().app, port):
        await first.close()
        assert not first.alive
        for _ in range(8):  # new connections, any of which the kernel could have given to the first
            async with httpx.AsyncClient() as fresh:
                assert (await fresh.get(f"{client.base_url}/work")).status_code == 200


async def test_a_running_reply_ends_before_the_listener_does():
    async with listening(Busy().app) as (client, listener):
        reply = asyncio.create_task(client.get("/work"))
        await asyncio.sleep(0.02)
        await listener.close()
        assert (await reply).status_code == 200


async def test_the_peer_is_who_is_connected():
    async def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.client.host if request.client else "")

    async with listening(Starlette(routes=[Route("/", answer)])) as (client, _):
        assert (await client.get("/", headers={"X-Forwarded-For": "10.0.0.7"})).text == "127.0.0.1"


async def test_a_port_in_use_is_an_error():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            Listener(Busy().app, "127.0.0.1", other.getsockname()[1])


async def test_work_is_cancelled_when_its_client_leaves():
    cancelled = asyncio.Event()

    async def work():
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def answer(request: Request) -> PlainTextResponse:
        try:
            await while_connected(request, work())
        except ClientGone:
            return PlainTextResponse("nobody hears this")
        return PlainTextResponse("not reached")

    async with listening(Starlette(routes=[Route("/", answer)])) as (client, _):
        with pytest.raises(httpx.ReadTimeout):
            await client.get("/", timeout=0.1)
        await asyncio.wait_for(cancelled.wait(), 5)
