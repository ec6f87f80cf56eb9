"""What requests leave in the journal, and what not: a real gateway and journal, a policy that echoes."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from echo_door import Door, door

from clawrl.serving.redaction import REDACTED

KEY = "AKIA" + "IOSFODNN7EXAMPLE"


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
            gateway._placing.following.cancel()
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
                gateway._placing.following.cancel()  # it hears of nothing
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
                while not clawrl._gateways[1]._placing.opt_outs.concern("ann"):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert await _talk(clawrl, conversations[0], "the secret goes on", stream=stream, replica=1)
            assert not await _talk(clawrl, [], "recorded too", stream=stream)
            assert clawrl.recorded() == ["recorded", "recorded too"]
            assert b"secret" not in clawrl.files()

    run(scenario)
