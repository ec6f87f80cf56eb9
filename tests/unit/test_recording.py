"""What requests leave in the journal, and what not: a real gateway and journal in this process, a policy that echoes.

Only Ray's calls are replaced, by awaiting the method itself.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from clawrl.config import GatewaySection, PolicySection, PrivacySection
from clawrl.journal.actor import Journal
from clawrl.journal.store import JournalReader
from clawrl.serving.capture import Finished
from clawrl.serving.gateway import Gateway
from clawrl.serving.redaction import REDACTED
from clawrl.types import Capture, VersionSpan

KEY = "AKIA" + "IOSFODNN7EXAMPLE"


class Local:
    """A handle on an object of this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        return Method(getattr(self._actor, method))

    def options(self, **_: Any) -> "Local":
        return self


class Method:
    def __init__(self, method: Callable) -> None:
        self.remote = method


class Echo:
    """A policy that answers `<n>: <the last message>`."""

    def __init__(self) -> None:
        self._answered = 0

    def chat(self, body: dict[str, Any], _: str) -> "Pieces":
        self._answered += 1
        return Pieces(f"chatcmpl-{self._answered}", f"{self._answered}: {body['messages'][-1]['content']}", body)


class Pieces:
    """What streams from a policy replica."""

    def __init__(self, id: str, said: str, body: dict[str, Any]) -> None:
        tokens = np.frombuffer(said.encode(), np.uint8).astype(np.int32)
        capture = Capture(
            tokens, tokens, tokens * np.float32(-0.5), tokens[:, None], tokens[:, None] * np.float32(-0.5),
            (VersionSpan(0, 0, len(tokens)),),
        )  # fmt: skip
        if body.get("stream"):
            deltas = [{"delta": {"content": letter}, "finish_reason": None} for letter in said]
            chunks = [{"id": id, "choices": [each]} for each in [*deltas, {"delta": {}, "finish_reason": "stop"}]]
            pieces = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        else:
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            pieces = [json.dumps({"id": id, "choices": [choice]})]
        self._left = iter([*pieces, Finished(capture, 0)])

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        try:
            return next(self._left)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self) -> None: ...


class Served(Gateway):
    """Serve awaits `__del__`; here the door does, and the interpreter has nothing left to do."""

    def __del__(self) -> None: ...


class Door:
    """Gateway replicas over one journal, and a client of theirs."""

    def __init__(self, url: str, journal: Journal, gateways: list[Gateway]) -> None:
        self.url, self.journal, self._gateways = url, journal, gateways

    async def say(self, messages: list, *, user: str = "ann", replica: int = 0, stream=False, **headers: str) -> Any:
        """Append a reply to `messages`; returns whether the client was told that nothing is recorded."""
        body = {"messages": messages, "user": user, "stream": stream}
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        transport = httpx.ASGITransport(self._gateways[replica]._app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://clawrl") as client:
            response = await client.post("/v1/chat/completions", json=body, headers=told)
        assert response.status_code == 200, response.text
        if stream:
            events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
            reply = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        else:
            reply = response.json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": reply})
        return response.headers.get("x-clawrl-recorded") == "no"

    async def heard(self, user: str, session: str | None = None, *, replica: int = 0, train: bool = False) -> None:
        """A replica knows of a word within a second."""
        async with asyncio.timeout(1):
            while self._gateways[replica]._opt_outs.cover(user, session) is train:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def recorded(self) -> list[str]:
        """The last message of every turn in the journal, in order."""
        return [json.loads(messages)[-1]["content"] for (messages,) in self.rows("SELECT messages FROM turns")]

    def followed(self) -> list[str]:
        """The last message of every next state."""
        return [json.loads(messages)[-1]["content"] for (messages,) in self.rows("SELECT messages FROM next_states")]

    def rows(self, query: str) -> list[Any]:
        with closing(JournalReader(self.url)) as reader, reader.database.reader.connect() as connection:
            return list(connection.exec_driver_sql(query + " ORDER BY seq"))

    def files(self) -> bytes:
        return b"".join(file.read_bytes() for file in Path(self.url.removeprefix("sqlite:///")).parent.iterdir())


@asynccontextmanager
async def door(folder: Path, replicas: int = 1, **privacy: Any) -> AsyncIterator[Door]:
    url = f"sqlite:///{folder}/journal.sqlite"
    journal, gateways = Journal(url), []
    for _ in range(replicas):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        gateway: Any = object.__new__(Served)
        settings = PrivacySection.model_validate(privacy)
        policy = Local(Echo())
        await gateway.__init__(GatewaySection(port=port), PolicySection(), policy, Local(journal), {}, {}, settings)
        gateways.append(gateway)
    try:
        yield Door(url, journal, gateways)
    finally:
        await journal.close()
        for gateway in gateways:
            await Gateway.__del__(gateway)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


pytestmark = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


async def _talk(door: Door, messages: list, text: str, **how: Any) -> bool:
    messages.append(user(text))
    return await door.say(messages, **how)


def run(scenario: Callable[[], Any]) -> None:
    asyncio.run(scenario())


def test_who_consents_is_recorded(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            messages = []
            assert [await _talk(clawrl, messages, text, stream=stream) for text in ("one", "two")] == [False, False]
            assert (clawrl.recorded(), clawrl.followed()) == (["one", "two"], ["two"])

    run(scenario)


def test_the_header_opts_the_conversation_out_from_there_on(tmp_path, stream):
    """Without session ids: what was said before stays, is paired with nothing later, and never trains."""

    async def scenario():
        async with door(tmp_path, replicas=2) as clawrl:
            messages = []
            assert not await _talk(clawrl, messages, "before", stream=stream)
            assert not await _talk(clawrl, messages, "with a next state", stream=stream)
            assert len(await clawrl.journal.pairs_to_judge(0, 10, 0)) == 1
            assert await _talk(clawrl, messages, "secret one", stream=stream, x_train="no")
            assert await _talk(clawrl, messages, "secret two", stream=stream)
            await clawrl.heard("ann", clawrl.rows("SELECT session FROM turns")[0][0], replica=1)
            assert await _talk(clawrl, messages, "secret three", stream=stream, replica=1)
            assert (clawrl.recorded(), clawrl.followed()) == (["before", "with a next state"], ["with a next state"])
            assert await clawrl.journal.pairs_to_judge(0, 10, 0) == []
            assert not await _talk(clawrl, [], "another conversation", stream=stream)
            assert b"secret" not in clawrl.files()

    run(scenario)


def test_from_its_first_message_on(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            messages, others = [], []
            assert await _talk(clawrl, messages, "secret", stream=stream, x_train="no")
            assert await _talk(clawrl, messages, "secret still", stream=stream)
            assert not await _talk(clawrl, others, "hello", stream=stream, user="bob")
            assert clawrl.recorded() == ["hello"]
            assert b"secret" not in clawrl.files()

    run(scenario)


def test_a_session_by_its_id(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            for text, how, unrecorded in (
                ("one", {"x_session_id": "s"}, False),
                ("two", {"x_session_id": "s", "x_train": "no"}, True),
                ("three", {"x_session_id": "s"}, True),
                ("title of three", {"x_session_id": "s", "x_turn_type": "side"}, True),
                ("four", {"x_session_id": "t"}, False),
            ):
                assert await _talk(clawrl, [], text, stream=stream, **how) is unrecorded, text
            assert (clawrl.recorded(), clawrl.followed()) == (["one", "four"], [])

    run(scenario)


def test_an_opt_in_is_for_conversations_begun_after_it(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            await clawrl.journal.consent("ann", False)
            await clawrl.heard("ann")
            messages = []
            assert await _talk(clawrl, messages, "secret", stream=stream)
            await clawrl.journal.consent("ann", True)
            await clawrl.heard("ann", train=True)
            assert await _talk(clawrl, messages, "its history holds the secret", stream=stream)
            assert not await _talk(clawrl, [], "afresh", stream=stream)
            assert clawrl.recorded() == ["afresh"]
            assert b"secret" not in clawrl.files()

    run(scenario)


def test_the_journal_refuses_what_a_replica_that_has_not_heard_yet_sends(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            gateway = clawrl._gateways[0]
            gateway._following.cancel()
            messages = []
            await _talk(clawrl, messages, "one", stream=stream)
            await clawrl.journal.consent("ann", False)
            await _talk(clawrl, messages, "secret", stream=stream)
            await _talk(clawrl, messages, "secret too", stream=stream)
            assert (clawrl.recorded(), clawrl.followed()) == (["one"], [])
            assert b"secret" not in clawrl.files()

    run(scenario)


def test_configured_users_are_not_recorded(tmp_path, stream):
    async def scenario():
        async with door(tmp_path, opt_out_users=["ann"]) as clawrl:
            assert await _talk(clawrl, [], "secret", stream=stream)
            assert not await _talk(clawrl, [], "hello", stream=stream, user="bob")
            assert clawrl.recorded() == ["hello"]

    run(scenario)


def test_a_retry_that_opts_out_is_not_answered_from_the_journal(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            first, again = [], []
            await _talk(clawrl, first, "one", stream=stream, idempotency_key="k")
            assert await _talk(clawrl, again, "one", stream=stream, idempotency_key="k", x_train="no")
            assert first[-1] != again[-1]

    run(scenario)


def test_secrets_never_reach_the_journal_and_conversations_still_pair(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            messages = []
            for text in ("hello", f"use {KEY}", "thanks"):
                assert not await _talk(clawrl, messages, text, stream=stream)
            assert KEY in messages[3]["content"], "the client gets what the policy said"
            assert clawrl.recorded() == ["hello", f"use {REDACTED}", "thanks"]
            assert clawrl.followed() == [f"use {REDACTED}", "thanks"]
            assert len(set(clawrl.rows("SELECT session FROM turns"))) == 1
            [(_, judged, _)] = await clawrl.journal.pairs_to_judge(0, 10, 0)
            assert judged.messages[-1]["content"] == "hello", "those with the key in their prompt do not train"
            assert b"thanks" in clawrl.files()
            assert KEY.encode() not in clawrl.files()
            assert np.frombuffer(KEY.encode(), np.uint8).astype(np.int32).tobytes() not in clawrl.files()

    run(scenario)


def test_a_redacted_reply_is_not_replayed(tmp_path, stream):
    async def scenario():
        async with door(tmp_path) as clawrl:
            first, again = [], []
            await _talk(clawrl, first, f"use {KEY}", stream=stream, idempotency_key="k")
            await _talk(clawrl, again, f"use {KEY}", stream=stream, idempotency_key="k")
            assert KEY in again[-1]["content"]
            assert clawrl.rows("SELECT key FROM turns") == [('["ann", "k"]',), (None,)], "both were answered"

    run(scenario)


@pytest.mark.parametrize("mark", [{"idempotency_key": "k"}, {"x_stainless_retry_count": "1"}], ids=["key", "retry"])
def test_a_retry_is_answered_from_the_journal_unless_its_user_opted_out(tmp_path, stream, mark):
    async def scenario():
        async with door(tmp_path, replicas=2) as clawrl:
            for gateway in clawrl._gateways[1:]:
                gateway._following.cancel()  # it hears of nothing
            first, again, heard, unheard = [], [], [], []
            await _talk(clawrl, [], "so that its next answer is its second", stream=stream, replica=1, user="bob")
            await _talk(clawrl, [], "so are those of the first", stream=stream)
            await _talk(clawrl, [], "and its third", stream=stream)
            await _talk(clawrl, first, "one", stream=stream, **mark)
            await _talk(clawrl, again, "one", stream=stream, **mark)
            assert again == first
            await clawrl.journal.consent("ann", False)
            await clawrl.heard("ann")
            await _talk(clawrl, heard, "one", stream=stream, **mark)
            await _talk(clawrl, unheard, "one", stream=stream, replica=1, **mark)
            assert heard != first
            assert unheard != first

    run(scenario)


@pytest.mark.parametrize("words", [{"user": "bob"}, {"x_session_id": "t"}, {"x_source": "x"}, {"x_turn_type": "side"}])
def test_a_retry_of_another_request_is_answered_anew(tmp_path, stream, words):
    async def scenario():
        async with door(tmp_path) as clawrl:
            first, again = [], []
            await _talk(clawrl, first, "one", stream=stream)
            await _talk(clawrl, again, "one", stream=stream, x_stainless_retry_count="1", **words)
            assert again != first
            assert clawrl.recorded() == ["one", "one"]

    run(scenario)


def test_conversations_that_opt_out_leave_no_word_each_and_withdraw_nothing(tmp_path, stream):
    async def scenario():
        async with door(tmp_path, replicas=2) as clawrl:
            await _talk(clawrl, [], "recorded", stream=stream)
            conversations: list[list] = [[], [], []]
            for messages in conversations:
                for text, how in (("secret", {"x_train": "no"}), ("secret still", {"x_train": "no"})):
                    assert await _talk(clawrl, messages, text, stream=stream, **how)
            assert await clawrl.journal.withdrawals(-1, 0) == 0
            assert clawrl.rows("SELECT session FROM consents WHERE conversation IS NULL") == [("",)]
            async with asyncio.timeout(10):
                while not clawrl._gateways[1]._opt_outs.concern("ann"):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await _talk(clawrl, conversations[0], "the secret goes on", stream=stream, replica=1)
            assert not await _talk(clawrl, [], "recorded too", stream=stream)
            assert clawrl.recorded() == ["recorded", "recorded too"]
            assert b"secret" not in clawrl.files()

    run(scenario)
