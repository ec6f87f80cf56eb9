"""OpenAI's routes as one gateway sees them: what a request asks, and the reply it got, each in its route's own shape.

Pure. Knows the shapes of chat completions and completions (`responses` has the third). Ignores HTTP and the engine,
whose own serving classes read the requests and write the answers.
"""

from __future__ import annotations

import json
import time
from typing import Any, Protocol

from clawrl.config import PolicySection
from clawrl.errors import GatewayError
from clawrl.serving.bodies import validate_chat, validate_common
from clawrl.serving.capture import ReplyAssembler, reply_message
from clawrl.types import Message

DONE = "data: [DONE]\n\n"


class Assembler(Protocol):
    """Puts streamed events together into the assistant message a client would keep."""

    id: str
    finish_reason: str

    def add_events(self, events: str) -> None: ...
    def message(self) -> Message: ...


class Surface(Protocol):
    """One route. `method` is the policy's that answers it."""

    path: str
    method: str
    last_event: str

    def read(self, body: dict[str, Any], settings: PolicySection) -> dict[str, Any]:
        """The request as a chat request (messages, tools, …), for identity and capture. Raises GatewayError."""
        ...

    def id(self, request: str) -> str: ...
    def shown(self, piece: str) -> str: ...
    def answered(self, answer: dict[str, Any]) -> tuple[Message, str]:
        """(reply, finish reason) of a whole answer."""
        ...

    def assembler(self) -> Assembler: ...
    def silence(self, id: str, model: str) -> str: ...
    def failure(self, body: dict[str, Any]) -> str:
        """The event of an error, given in OpenAI's shape."""
        ...


class Chat:
    """`/v1/chat/completions`."""

    path, method, last_event = "/v1/chat/completions", "chat", DONE

    def read(self, body: dict[str, Any], settings: PolicySection) -> dict[str, Any]:
        validate_chat(body, settings)
        return body

    def id(self, request: str) -> str:
        return f"chatcmpl-{request}"

    def shown(self, piece: str) -> str:
        """With `reasoning_content` beside `reasoning`: clients read one or the other."""
        if '"reasoning":' not in piece:
            return piece
        if not piece.startswith("data:"):
            answer = json.loads(piece)
            _show_reasoning(answer)
            return json.dumps(answer, separators=(",", ":"))
        return "".join(_shown_event(event) for event in piece.split("\n\n") if event)

    def answered(self, answer: dict[str, Any]) -> tuple[Message, str]:
        choice = answer["choices"][0]
        message = choice["message"]
        reply = reply_message(message.get("content"), message.get("reasoning"), message.get("tool_calls"))
        return reply, choice["finish_reason"]

    def assembler(self) -> Assembler:
        return ReplyAssembler()

    def silence(self, id: str, model: str) -> str:
        """A chunk with an empty delta: comments do not count with every client."""
        return _event(_chunk(id, model, {"delta": {}}))

    def failure(self, body: dict[str, Any]) -> str:
        return _event(body)


class Completions:
    """`/v1/completions`: a text goes on. Nobody asked anybody, so it is a side turn."""

    path, method, last_event = "/v1/completions", "complete", DONE

    def read(self, body: dict[str, Any], settings: PolicySection) -> dict[str, Any]:
        prompt = body.get("prompt")
        if not isinstance(prompt, (str, list)) or not prompt:
            raise GatewayError("prompt must be a text, or a list of texts or tokens", param="prompt")
        validate_common(body, settings, ("max_tokens",))
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        return {"messages": [{"role": "user", "content": text}], "user": body.get("user"), "n": body.get("n")}

    def id(self, request: str) -> str:
        return f"cmpl-{request}"

    def shown(self, piece: str) -> str:
        return piece

    def answered(self, answer: dict[str, Any]) -> tuple[Message, str]:
        choice = answer["choices"][0]
        return reply_message(choice["text"], None, None), choice["finish_reason"]

    def assembler(self) -> Assembler:
        return TextAssembler()

    def silence(self, id: str, model: str) -> str:
        return _event({**_chunk(id, model, {"text": ""}), "object": "text_completion"})

    def failure(self, body: dict[str, Any]) -> str:
        return _event(body)


class TextAssembler:
    """The first choice of a streamed text completion."""

    def __init__(self) -> None:
        self.id = self.finish_reason = ""
        self._text: list[str] = []

    def add_events(self, events: str) -> None:
        for event in events.split("\n\n"):
            if event.startswith("data: {"):
                chunk = json.loads(event[6:])
                self.id = chunk.get("id") or self.id
                for choice in chunk.get("choices") or ():
                    if not choice.get("index"):
                        self.finish_reason = choice.get("finish_reason") or self.finish_reason
                        self._text.append(choice.get("text") or "")

    def message(self) -> Message:
        return reply_message("".join(self._text), None, None)


def _chunk(id: str, model: str, choice: dict[str, Any]) -> dict[str, Any]:
    choices = [{"index": 0, **choice, "logprobs": None, "finish_reason": None}]
    head = {"id": id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model}
    return {**head, "choices": choices}


def _shown_event(event: str) -> str:
    if not event.startswith("data: {"):
        return f"{event}\n\n"
    chunk = json.loads(event[6:])
    _show_reasoning(chunk)
    return _event(chunk)


def _show_reasoning(answer: dict[str, Any]) -> None:
    for choice in answer.get("choices") or ():
        said = choice.get("delta") or choice.get("message") or {}
        if said.get("reasoning") is not None:
            said["reasoning_content"] = said["reasoning"]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"
