"""What the engine sampled, collected as it streams by: tokens, log-probabilities, versions, and the reply message.

Pure: knows the shape of vLLM's outputs and of OpenAI's chunks, imports neither. Nothing here tokenizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clawrl.errors import PolicyError
from clawrl.types import Capture, Message, VersionSpan


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """The last piece of a reply: what was captured."""

    capture: Capture
    model_version: int  # the newest version that sampled a token


@dataclass(frozen=True, slots=True)
class Refused:
    """The engine's serving layer refused the request; `body` has OpenAI's error shape."""

    status: int
    body: dict[str, Any]


@dataclass(slots=True)
class Recorder:
    """Collects what one request sampled into a Capture. `support` is k of the top-k kept."""

    support: int
    version: int | None = None  # of the adapter that answers; None: the engine says which weights sampled a token
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    _token_ids: list[np.ndarray] = field(default_factory=list)
    _logprobs: list[np.ndarray] = field(default_factory=list)
    _spans: tuple[VersionSpan, ...] = ()

    def add(self, output: Any) -> None:
        """Take one vLLM RequestOutput (delta kind); of several choices the first."""
        if not self.prompt_ids and output.prompt_token_ids is not None:
            self.prompt_ids = list(output.prompt_token_ids)
        completion = next((each for each in output.outputs if not each.index), None)
        if completion is None:
            return
        self.completion_ids.extend(completion.token_ids)
        if completion.finish_reason is not None:
            self.finish_reason = completion.finish_reason
            self._spans = tuple(
                VersionSpan(int(span.version) if self.version is None else self.version, span.start, span.end)
                for span in completion.weight_versions or ()
            )

    def add_logprobs(self, rows: Any) -> None:
        """Take vLLM's LogprobsLists of the next n positions, [n, 1 + at least k]: the sampled token, the top by rank.

        Copied, since they lie in the engine's messages, which hold those of other requests too.
        """
        width = 1 + self.support
        self._token_ids.append(np.array(rows.logprob_token_ids[:, :width], np.int32))
        self._logprobs.append(np.array(rows.logprobs[:, :width], np.float32))

    def finish(self) -> Finished:
        """The whole capture. Raises PolicyError if the engine never finished the reply.

        Raises ValueError if the engine's log-probabilities or version spans do not cover it.
        """
        if self.finish_reason is None:
            raise PolicyError("the engine ended a reply without a finish reason; nothing of it was captured")
        none = [np.empty((0, 1 + self.support))]
        kept = slice(len(self.completion_ids))  # what was sampled beyond a stop string is no part of the reply
        token_ids = np.concatenate(self._token_ids or none)[kept].astype(np.int32)
        logprobs = np.concatenate(self._logprobs or none)[kept].astype(np.float32)
        capture = Capture(
            prompt_ids=np.asarray(self.prompt_ids, np.int32),
            completion_ids=np.asarray(self.completion_ids, np.int32),
            logprobs=np.ascontiguousarray(logprobs[:, 0]),
            top_ids=np.ascontiguousarray(token_ids[:, 1:]),
            top_logprobs=np.ascontiguousarray(logprobs[:, 1:]),
            versions=self._spans,
        )
        newest = max((span.version for span in self._spans), default=0)
        return Finished(capture, newest)


@dataclass(slots=True)
class ReplyAssembler:
    """Puts streamed OpenAI chunks together into the assistant message a client would keep."""

    id: str = ""
    finish_reason: str = ""
    _content: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add_events(self, events: str) -> None:
        """Take whole server-sent events (`data: {...}` and a blank line each)."""
        for event in events.split("\n\n"):
            if event.startswith("data: {"):
                self.add_chunk(json.loads(event[6:]))

    def add_chunk(self, chunk: dict[str, Any]) -> None:
        self.id = chunk.get("id") or self.id
        for choice in chunk.get("choices", ()):
            if choice.get("index"):
                continue
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            delta = choice["delta"]
            self._content.append(delta.get("content") or "")
            self._reasoning.append(delta.get("reasoning") or delta.get("reasoning_content") or "")
            for call in delta.get("tool_calls") or ():
                self._add_call(call)

    def _add_call(self, delta: dict[str, Any]) -> None:
        call = self._calls.setdefault(
            delta.get("index") or 0, {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
        )
        call["id"] = delta.get("id") or call["id"]
        function = delta.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""

    def message(self) -> Message:
        """The assistant message; content is None where only tools were called."""
        calls = [self._calls[index] for index in sorted(self._calls)]
        return reply_message("".join(self._content), "".join(self._reasoning), calls)


def reply_message(content: str | None, reasoning: str | None, tool_calls: list[dict[str, Any]] | None) -> Message:
    """An assistant message with only the keys that say something."""
    message: Message = {"role": "assistant", "content": content or (None if tool_calls else "")}
    if reasoning:
        message["reasoning"] = reasoning
    if tool_calls:
        message["tool_calls"] = tool_calls
    return message
