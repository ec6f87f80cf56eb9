"""OpenAI's own Python client, unmodified, against the real server: what it sends, it understands the answers of."""

from __future__ import annotations

from typing import Any, Literal, cast

import openai
import pytest
from pydantic import BaseModel
from running import Server

from envs.toolcall.stock import TOOLS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


class Answer(BaseModel):
    apples: Literal[7, 8]


def asked(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_a_conversation_is_paired(server: Server):
    client, talk = server.client(), asked("SDK: Tom has 3 apples and buys 4 more. How many?")
    first = client.chat.completions.create(model="clawrl", messages=talk, max_tokens=80)
    talk += [first.choices[0].message.model_dump(exclude_none=True), {"role": "user", "content": "Are you sure?"}]
    second = client.chat.completions.create(model="clawrl", messages=talk, max_tokens=80)
    turn = server.journal().turn(second.id)
    assert turn is not None
    assert (turn.parent, turn.kind, turn.index) == (first.id, "main", 1)


def test_streaming_with_usage(server: Server):
    stream = server.client().chat.completions.create(
        model="clawrl",
        messages=asked("SDK: what is 2 + 2?"),
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=50,
    )
    chunks = list(stream)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


def test_the_stream_helper_and_a_tool_round_trip(server: Server):
    client, talk = server.client(), asked('How many "pears" are at "market" and "barn" together?')
    tools, named = cast(Any, TOOLS), cast(Any, {"type": "function", "function": {"name": "lookup"}})
    with client.chat.completions.stream(
        model="clawrl", messages=talk, tools=tools, tool_choice=named, max_tokens=200, temperature=0
    ) as stream:
        first = stream.get_final_completion()
    calls = first.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.name == "lookup"
    talk.append(first.choices[0].message.model_dump(exclude_none=True, exclude={"parsed"}))
    talk.append({"role": "tool", "tool_call_id": calls[0].id, "content": "42"})
    second = client.chat.completions.create(model="clawrl", messages=talk, tools=tools, max_tokens=60)
    turn = server.journal().turn(second.id)
    assert turn is not None
    assert turn.parent == first.id, turn.reason


def test_parse_gives_the_model_asked_for(server: Server):
    parsed = server.client().chat.completions.parse(
        model="clawrl", messages=asked("SDK: 3 apples and 4 more?"), response_format=Answer, max_tokens=100
    )
    assert parsed.choices[0].message.parsed is not None
    assert parsed.choices[0].message.parsed.apples in (7, 8)


def test_responses(server: Server):
    client = server.client()
    whole = client.responses.create(model="clawrl", input="SDK: what is 5 + 6?", max_output_tokens=60)
    assert whole.output_text
    with client.responses.stream(model="clawrl", input="SDK: what is 6 + 6?", max_output_tokens=60) as stream:
        final = stream.get_final_response()
    assert final.output_text
    parsed = client.responses.parse(model="clawrl", input="SDK: 3 and 4?", text_format=Answer, max_output_tokens=100)
    assert parsed.output_parsed is not None


def test_errors_are_the_classes_the_client_knows(server: Server):
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.embeddings.create(model="clawrl", input="x")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=asked("x"))
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.chat.completions.create(model="clawrl", messages=asked("word " * 6000))
