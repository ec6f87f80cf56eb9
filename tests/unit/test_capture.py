"""What the engine sampled, put together from what it streams."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from clawrl.errors import PolicyError
from clawrl.serving.capture import Recorder, ReplyAssembler
from clawrl.types import VersionSpan


@dataclass
class Rows:
    """The fields of vLLM's LogprobsLists: the sampled token first at each position, then the top by rank."""

    logprob_token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass
class Completion:
    token_ids: list[int]
    finish_reason: str | None = None
    weight_versions: list[Any] | None = None
    index: int = 0


@dataclass
class Span:
    version: str
    start: int
    end: int


@dataclass
class Output:
    prompt_token_ids: list[int]
    outputs: list[Completion] = field(default_factory=list)


def rows(*positions: list[tuple[int, float]]) -> Rows:
    pairs = np.array(positions)
    return Rows(pairs[..., 0].astype(np.int64), pairs[..., 1].astype(np.float32))


def test_deltas_add_up_to_one_capture():
    recorder = Recorder(support=2)
    recorder.add_logprobs(rows([(7, -1.5), (3, -0.5), (7, -1.5)]))
    recorder.add(Output([1, 2], [Completion([7])]))
    recorder.add_logprobs(rows([(3, -0.1), (3, -0.1), (9, -3.0)]))
    recorder.add_logprobs(rows([(2, -0.7), (2, -0.7), (5, -1.0)]))
    spans = [Span("4", 0, 1), Span("5", 1, 3)]
    recorder.add(Output([1, 2], [Completion([3, 2], "stop", spans)]))
    finished = recorder.finish()
    capture = finished.capture
    assert capture.prompt_ids.tolist() == [1, 2]
    assert capture.completion_ids.tolist() == [7, 3, 2]
    np.testing.assert_allclose(capture.logprobs, [-1.5, -0.1, -0.7])
    assert capture.top_ids.tolist() == [[3, 7], [3, 9], [2, 5]]
    assert capture.versions == (VersionSpan(4, 0, 1), VersionSpan(5, 1, 3))
    assert finished.model_version == 5


def test_a_client_that_asked_for_more_logprobs_does_not_widen_the_capture():
    recorder = Recorder(support=1)
    recorder.add_logprobs(rows([(7, -1.5), (3, -0.5), (7, -1.5), (8, -2.0)]))
    recorder.add(Output([1], [Completion([7], "stop", [Span("0", 0, 1)])]))
    assert recorder.finish().capture.top_ids.tolist() == [[3]]


def test_an_unfinished_reply_is_no_capture():
    recorder = Recorder(support=0)
    recorder.add_logprobs(rows([(7, -1.5)]))
    recorder.add(Output([1], [Completion([7])]))
    with pytest.raises(PolicyError, match="without a finish reason"):
        recorder.finish()


def test_missing_version_spans_are_an_error_not_a_guess():
    recorder = Recorder(support=0)
    recorder.add_logprobs(rows([(7, -1.5)]))
    recorder.add(Output([1], [Completion([7], "stop", None)]))
    with pytest.raises(ValueError, match="cover 0 tokens of 1"):
        recorder.finish()


def test_a_token_without_logprobs_is_an_error_not_a_guess():
    recorder = Recorder(support=1)
    recorder.add_logprobs(rows([(7, -1.5), (7, -1.5)]))
    recorder.add(Output([1], [Completion([7, 8], "stop", [Span("0", 0, 2)])]))
    with pytest.raises(ValueError, match="rows"):
        recorder.finish()


def event(delta: dict, finish: str | None = None) -> str:
    import json

    return "data: " + json.dumps({"id": "chatcmpl-1", "choices": [{"delta": delta, "finish_reason": finish}]}) + "\n\n"


def test_chunks_become_the_message_a_client_keeps():
    assembler = ReplyAssembler()
    assembler.add_events(event({"role": "assistant", "content": ""}) + event({"content": "fo"}))
    assembler.add_events(event({"content": "ur"}, "stop"))
    assert assembler.message() == {"role": "assistant", "content": "four"}
    assert (assembler.id, assembler.finish_reason) == ("chatcmpl-1", "stop")


def test_tool_call_deltas_are_joined_by_index():
    assembler = ReplyAssembler()
    assembler.add_events(event({"reasoning": "look it up"}))
    assembler.add_events(event({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "calc"}}]}))
    assembler.add_events(event({"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]}))
    assembler.add_events(event({"tool_calls": [{"index": 1, "id": "b", "function": {"name": "look"}}]}))
    assembler.add_events(event({"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]}, "tool_calls"))
    message = assembler.message()
    assert message["content"] is None
    assert message["reasoning"] == "look it up"
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "calc", "arguments": '{"x": 1}'},
        {"name": "look", "arguments": ""},
    ]
