"""The OpenAI surface over a real engine: every route, streamed or not, captured alike, every ending told right."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest
from fuzzing import fuzz
from running import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

QUESTION: Any = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does Tom have?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Compute an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "integer", "enum": [7, 8]}},
    "required": ["answer"],
    "additionalProperties": False,
}
SIDE = {"X-Turn-Type": "side"}


def turn_of(server: Server, id: str) -> Any:
    turn = server.journal().turn(id)
    assert turn is not None, f"{id} is not in the journal"
    return turn


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"max_tokens": 3, "ignore_eos": True}, "length"),
        ({"max_tokens": 300, "temperature": 0}, "stop"),
        ({"max_tokens": 300, "stop": ["e"]}, "stop"),
        ({"tools": [TOOL], "tool_choice": "required", "max_tokens": 300, "temperature": 0}, "tool_calls"),
    ],
    ids=["length", "eos", "stop", "tools"],
)
def test_a_chat_ends_as_it_says(server: Server, asked: dict, reason: str, stream: bool):
    body = {"messages": QUESTION, "stream": stream, "unknown_extra_key": {"is": "tolerated"}, **asked}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=SIDE, timeout=60)
    assert response.status_code == 200, response.text
    if stream:
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
        id, told = chunks[0]["id"], [each for each in reasons if each is not None]
        assert reasons[-1] is not None, "it is told last"
    else:
        id, told = response.json()["id"], [response.json()["choices"][0]["finish_reason"]]
    assert told == [reason]
    turn = turn_of(server, id)
    assert turn.finish_reason == reason
    assert len(turn.capture.completion_ids) == len(turn.capture.logprobs) > 0


def test_a_seed_repeats_a_reply(server: Server):
    client = server.client().chat.completions
    asked: Any = {"model": "clawrl", "messages": QUESTION, "seed": 7, "max_tokens": 40, "extra_headers": SIDE}
    said = [client.create(**asked) for _ in range(2)]
    assert said[0].choices[0].message.content == said[1].choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_are_a_side_turn_of_the_first(server: Server, stream: bool):
    body = {"messages": QUESTION, "n": 3, "max_tokens": 24, "stream": stream, "ignore_eos": True}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    said = ["", "", ""]
    if stream:
        chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        assert not [chunk for chunk in chunks if "error" in chunk]
        id = chunks[0]["id"]
        for choice in (choice for chunk in chunks for choice in chunk["choices"]):
            said[choice["index"]] += choice["delta"].get("content") or ""
    else:
        id = response.json()["id"]
        for choice in response.json()["choices"]:
            said[choice["index"]] = choice["message"]["content"]
    turn = turn_of(server, id)
    assert (turn.kind, turn.reply["content"]) == ("side", said[0])
    assert len(turn.capture.completion_ids) == len(turn.capture.logprobs) == 24
    assert turn.reason.startswith("n=3")


def test_a_schema_binds_the_reply(server: Server):
    shape: Any = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    answer = server.client().chat.completions.create(
        model="clawrl", messages=QUESTION, response_format=shape, extra_headers=SIDE
    )
    assert json.loads(answer.choices[0].message.content or "")["answer"] in (7, 8)


@pytest.mark.parametrize("stream", [False, True])
def test_completions(server: Server, stream: bool):
    asked: Any = {"model": "clawrl", "prompt": "2 + 2 =", "max_tokens": 8, "stream": stream, "logprobs": 2}
    answer: Any = server.client().completions.create(**asked, extra_body={"ignore_eos": True})
    if stream:
        chunks = list(answer)
        id = chunks[0].id
        said = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    else:
        id, said = answer.id, answer.choices[0].text
        assert answer.choices[0].finish_reason == "length"
    turn = turn_of(server, id)
    assert (turn.kind, turn.reply["content"], turn.finish_reason) == ("side", said, "length")
    assert len(turn.capture.completion_ids) == 8


@pytest.mark.parametrize("stream", [False, True])
def test_responses_are_turns_of_a_conversation(server: Server, stream: bool):
    """By the whole history, and by previous_response_id."""
    client = server.client()

    def ask(**asked: Any) -> Any:
        if not stream:
            return client.responses.create(model="clawrl", **asked)
        events: Any = list(client.responses.create(model="clawrl", stream=True, **asked))
        assert events[0].type == "response.created"
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        assert text == events[-1].response.output_text
        return events[-1].response

    items: Any = [{"role": "user", "content": f"What is 7 + 5? {stream}"}]
    first = ask(input=items, max_output_tokens=60)
    items += [item.model_dump(exclude_none=True) for item in first.output]
    items.append({"role": "user", "content": "Are you sure?"})
    second = ask(input=items, max_output_tokens=60)
    third = ask(input="Thank you.", previous_response_id=second.id, max_output_tokens=60)
    turns = [turn_of(server, each.id) for each in (first, second, third)]
    assert [turn.parent for turn in turns] == [None, first.id, second.id], [turn.reason for turn in turns]
    assert len({turn.session for turn in turns}) == 1
    assert [turn.kind for turn in turns] == ["main"] * 3
    assert turns[0].reply["content"] == first.output_text
    assert all(len(turn.capture.completion_ids) == len(turn.capture.logprobs) > 0 for turn in turns)


def test_a_response_that_is_cut_says_so(server: Server):
    answer = server.client().responses.create(
        model="clawrl", input="Count to a thousand.", max_output_tokens=4, extra_body={"ignore_eos": True}
    )
    assert answer.status == "incomplete"
    assert turn_of(server, answer.id).finish_reason == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_generation_and_is_recorded_as_cut_off(server: Server, stream: bool):
    body = {"messages": QUESTION, "stream": stream, "max_tokens": 1900, "ignore_eos": True}
    headers = {"X-Session-Id": f"left-{stream}"}
    url, id = f"{server.url}/v1/chat/completions", ""
    with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, headers=headers, timeout=0.7) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and '"content":"' in line:
                id = json.loads(line[6:])["id"]
                break
    left = time.monotonic()
    server.wait_for("the engine to be idle", lambda: server.status()["policy"]["streams"] == 0, timeout_s=5)
    assert time.monotonic() - left < 4  # a second, as a rule; the whole reply takes ten, and the machine may be busy
    server.wait_for("the record", lambda: server.journal().last_turn("local", f"left-{stream}"), timeout_s=5)
    last = server.journal().last_turn("local", f"left-{stream}")
    assert last is not None
    turn = turn_of(server, last[0])
    assert turn.finish_reason == "abort"
    assert len(turn.capture.completion_ids) == 0, "nothing of it can be trained on"
    if stream:
        assert turn.id == id
        assert turn.reply["content"]


def test_schemathesis_finds_nothing(server: Server):
    """Against the served document: no 5xx, and every answer as the document says, whatever the engine is asked."""
    fuzz(server.url, examples=15, least=8)
