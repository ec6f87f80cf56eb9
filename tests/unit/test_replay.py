"""A recorded reply, given again in OpenAI's shapes."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from clawrl.serving.capture import ReplyAssembler
from clawrl.serving.replay import completion, events
from clawrl.testing import ScriptedPolicy
from clawrl.types import Turn

CALL = {"id": "call_1", "type": "function", "function": {"name": "calc", "arguments": '{"a": 2}'}}


@pytest.fixture(params=["words", "tools"])
def turn(request) -> Turn:
    from dataclasses import replace

    turn = ScriptedPolicy(seed=0).turn([{"role": "user", "content": "hello"}], num_tokens=5)
    if request.param == "tools":
        reply = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        turn = replace(turn, reply=reply, finish_reason="tool_calls")
    return turn


def test_the_completion_is_what_a_client_parses(turn):
    shown = ChatCompletion.model_validate(completion(turn, "clawrl"))
    assert shown.id == turn.id
    assert shown.choices[0].finish_reason == turn.finish_reason
    assert shown.choices[0].message.content == turn.reply["content"]
    assert shown.usage is not None
    assert shown.usage.completion_tokens == 5


def test_the_events_make_the_same_message(turn):
    said = list(events(turn, "clawrl", usage=True))
    assembler = ReplyAssembler()
    for event in said:
        assembler.add_events(event)
        ChatCompletionChunk.model_validate(json.loads(event.removeprefix("data: ")))
    assert assembler.message() == turn.reply
    assert (assembler.id, assembler.finish_reason) == (turn.id, turn.finish_reason)
    assert json.loads(said[-1].removeprefix("data: "))["usage"]["completion_tokens"] == 5
    assert len(list(events(turn, "clawrl", usage=False))) == len(said) - 1
