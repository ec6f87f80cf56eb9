"""A recorded reply once more, for a request that a client sent twice: the same words, the same id, no new turn.

Pure: knows OpenAI's response shapes and a Turn. Ignores HTTP and where the turn came from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from clawrl.types import Turn


def completion(turn: Turn, model: str) -> dict[str, Any]:
    """The `chat.completion` object of a recorded turn."""
    choice = {"index": 0, "message": turn.reply, "logprobs": None, "finish_reason": turn.finish_reason}
    return {**_head(turn, model, "chat.completion"), "choices": [choice], "usage": _usage(turn)}


def events(turn: Turn, model: str, *, usage: bool) -> Iterator[str]:
    """Its server-sent events, the final `[DONE]` left out; `usage` adds the chunk of `stream_options.include_usage`."""
    head = _head(turn, model, "chat.completion.chunk")
    delta = dict(turn.reply)
    if calls := delta.pop("tool_calls", None):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    for choice in (
        {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None},
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": turn.finish_reason},
    ):
        yield _event({**head, "choices": [choice]})
    if usage:
        yield _event({**head, "choices": [], "usage": _usage(turn)})


def _head(turn: Turn, model: str, kind: str) -> dict[str, Any]:
    return {"id": turn.id, "object": kind, "created": int(turn.started), "model": model}


def _usage(turn: Turn) -> dict[str, int]:
    asked, said = len(turn.capture.prompt_ids), len(turn.capture.completion_ids)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"
