"""`/v1/responses` as the chat request that it amounts to, and back."""

import json
from dataclasses import replace

import pytest
from echo_door import door

from clawrl.config import PolicySection
from clawrl.errors import GatewayError
from clawrl.serving.responses import (
    ResponseAssembler,
    Responses,
    chat_messages,
    items_before,
    items_of,
    referred,
    reply_of,
)
from clawrl.serving.sessions import digest
from clawrl.testing import ScriptedPolicy

CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "calc", "arguments": '{"a": 1}'}
SAID = {
    "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
    "content": [{"type": "output_text", "text": "four", "annotations": []}],
}  # fmt: skip
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}


def answer(*output, status="completed"):
    return {"id": "resp_1", "status": status, "output": list(output)}


def test_a_text_is_a_users_message():
    chat = Responses().read({"input": "hi", "instructions": "be brief"}, PolicySection())
    assert chat["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]


def test_a_conversation_is_the_same_on_either_route():
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "two plus two?"}]},
        THOUGHT, SAID, CALL, {"type": "function_call_output", "call_id": "call_1", "output": "4"},
    ]  # fmt: skip
    calls = [{"id": "x", "type": "function", "function": {"name": "calc", "arguments": '{"a":1}'}}]
    chat = [
        {"role": "user", "content": "two plus two?"},
        {"role": "assistant", "content": "four", "tool_calls": calls},
        {"role": "tool", "content": "4"},
    ]
    assert digest(chat_messages(items)) == digest(chat)


def test_what_was_answered_is_what_comes_back():
    """The digest after a reply is that of the history in which a client sends it back."""
    reply, reason = reply_of(answer(THOUGHT, SAID, CALL))
    assert (reply["content"], reply["reasoning"], reason) == ("four", "hm", "tool_calls")
    asked = chat_messages("two plus two?")
    history = chat_messages([{"role": "user", "content": "two plus two?"}, THOUGHT, SAID, CALL])
    assert digest([*asked, reply]) == digest(history)


@pytest.mark.parametrize(
    ("response", "reason"),
    [(answer(SAID), "stop"), (answer(CALL), "tool_calls"), (answer(SAID, status="incomplete"), "length")],
)
def test_finish_reasons(response, reason):
    assert reply_of(response)[1] == reason


def test_streamed_events_add_up():
    deltas = [{"type": "response.output_text.delta", "delta": each} for each in ("fo", "ur")]
    assembler = ResponseAssembler()
    for event in deltas:
        assembler.add_events(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n")
    assert assembler.message()["content"] == "four", "of a reply that breaks off"
    last = {"type": "response.completed", "response": answer(SAID)}
    assembler.add_events(f"event: response.completed\ndata: {json.dumps(last)}\n\n")
    assert (assembler.id, assembler.finish_reason, assembler.message()["content"]) == ("resp_1", "stop", "four")


def test_items_lead_back_to_the_conversation():
    messages = chat_messages(
        [
            {"role": "user", "content": "q"},
            SAID,
            CALL,
            {"type": "function_call_output", "call_id": "call_1", "output": "4"},
        ]
    )
    turn = ScriptedPolicy().turn(messages)
    assert digest(chat_messages(items_before(turn))) == digest([*messages, turn.reply])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input must be a text"),
        ({"input": []}, "input must be a text"),
        ({"input": [1]}, "input must be a text"),
        ({"input": [{"role": "robot", "content": "x"}]}, r"input\[0\].role is 'robot'"),
        ({"input": [{"role": "user", "content": 3}]}, r"input\[0\].content is neither"),
        ({"input": "x", "background": True}, "background responses are not served"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens=0"),
        ({"input": "x", "instructions": 3}, "instructions is no text"),
    ],
)
def test_what_cannot_be_read_is_refused(body, message):
    with pytest.raises(GatewayError, match=message):
        Responses().read(body, PolicySection())


async def test_an_unknown_previous_response_is_404(tmp_path):
    async with door(tmp_path) as clawrl, clawrl.client() as client:
        for id in ("resp_nothing", 7, "a\x00"):
            refused = await client.post("/v1/responses", json={"input": "x", "previous_response_id": id})
            assert refused.status_code == 404
            assert refused.json()["error"]["param"] == "previous_response_id"


def test_items_are_named_after_their_response():
    """One name for an item in all events of a stream, whichever request it is of; words are left alone."""
    surface, request = Responses(), "a" * 32
    begun = surface.shown(f'data: {{"response":{{"id":"resp_{request}","output":[]}}}}\n\n')
    assert begun == f'data: {{"response":{{"id":"resp_{request}","output":[]}}}}\n\n'
    added = surface.shown('data: {"item":{"id":"fc_12ab","type":"function_call"}}\n\n')
    assert json.loads(added[6:])["item"]["id"] == f"fc_{request}_0"
    rest = [{"item_id": "fc_12ab", "delta": '"id":"fc_12ab"'}, {"id": "msg_77"}, {"id": "fc_34cd"}, {"id": "call_12"}]
    shown = json.loads(surface.shown(json.dumps(rest)))
    assert shown[0] == {"item_id": f"fc_{request}_0", "delta": '"id":"fc_12ab"'}
    assert [each["id"] for each in shown[1:]] == [f"msg_{request}_0", f"fc_{request}_1", "call_12"]


def test_a_reference_stands_for_what_was_said():
    turn = ScriptedPolicy().turn([{"role": "user", "content": "?"}])
    calls = [{"id": f"call_{n}", "type": "function", "function": {"name": f"f{n}", "arguments": "{}"}} for n in (0, 1)]
    turn = replace(turn, reply={"role": "assistant", "content": "four", "tool_calls": calls})
    assert referred({"id": f"fc_{'b' * 32}_3"}) == (f"resp_{'b' * 32}", "fc", 3)
    assert referred({"id": "msg_1"}) is None
    assert items_of(turn, "msg", 0) == [{"type": "message", "role": "assistant", "content": "four"}]
    assert [items_of(turn, "fc", n)[0]["call_id"] for n in range(4)] == ["call_0", "call_1"] * 2
    assert items_of(turn, "rs", 0) == []


async def test_references_are_resolved_for_whom_they_belong_to(tmp_path):
    async with door(tmp_path) as clawrl, clawrl.client() as client:
        first = (await client.post("/v1/responses", json={"input": "one", "user": "ann"})).json()["id"]
        item = {"type": "item_reference", "id": f"msg_{first.removeprefix('resp_')}_0"}
        talk = [{"role": "user", "content": "one"}, item, {"role": "user", "content": "two"}]
        second = await client.post("/v1/responses", json={"input": talk, "user": "ann"})
        assert second.status_code == 200, second.text
        ((messages, parent, _),) = clawrl.rows(
            f"SELECT messages, parent, seq FROM turns WHERE id = '{second.json()['id']}'"
        )
        assert (json.loads(messages)[1]["content"], parent) == ("1: one", first)
        for user, asked in (("eve", item), ("ann", {**item, "id": "msg_1"}), ("ann", {"type": "item_reference"})):
            refused = await client.post("/v1/responses", json={"input": [asked, talk[2]], "user": user})
            assert (refused.status_code, refused.json()["error"]["param"]) == (404, "input")


async def test_embeddings_are_a_clear_404(tmp_path):
    async with door(tmp_path) as clawrl, clawrl.client() as client:
        refused = await client.post("/v1/embeddings", json={"input": "x"})
        assert refused.status_code == 404
        assert "embeddings are not served here" in refused.json()["error"]["message"]
        unknown = await client.get("/v1/nothing")
        assert (unknown.status_code, set(unknown.json()["error"])) == (404, {"message", "type", "param", "code"})
        assert (await client.put("/v1/models")).status_code == 405
