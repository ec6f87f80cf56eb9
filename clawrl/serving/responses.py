"""`/v1/responses`: its items and events, as chat messages and back.

Pure. Knows OpenAI's shapes of this route. Ignores HTTP and the engine, whose own serving class reads and answers it.
What it asks is recorded as the chat request that it amounts to, so that a conversation is known on either route.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from clawrl.config import PolicySection
from clawrl.errors import GatewayError
from clawrl.serving.bodies import ROLES, validate_common
from clawrl.serving.capture import reply_message
from clawrl.serving.normalisers import content_text
from clawrl.types import Message, Tool, Turn

_TEXT_PARTS = ("input_text", "output_text", "text")
_RESPONSE = re.compile(r'"resp_([0-9a-f]{32})"')
_ITEM = re.compile(r'("(?:id|item_id)": ?)"(msg|rs|fc)_([0-9a-f]+)"')
_OWN_ITEM = re.compile(r"(msg|rs|fc)_([0-9a-f]{32})_(\d+)")


class Responses:
    """The route, for one request. The engine keeps no responses: `previous_response_id` and references to items are
    resolved from the journal beforehand, which is why the ids of items name their response.
    """

    path, method, last_event = "/v1/responses", "respond", ""

    def __init__(self) -> None:
        self._request = ""
        self._items: dict[str, str] = {}  # the engine's ids of them, and ours

    def read(self, body: dict[str, Any], settings: PolicySection) -> dict[str, Any]:
        if body.get("background"):
            raise GatewayError("background responses are not served; leave it out", param="background")
        if not isinstance(body.get("instructions"), str | None):
            raise GatewayError("instructions is no text", param="instructions")
        validate_common(body, settings, ("max_output_tokens",))
        messages = chat_messages(body.get("input"))
        if body.get("instructions"):
            messages.insert(0, {"role": "system", "content": body["instructions"]})
        shared = ("user", "prompt_cache_key", "chat_template_kwargs")
        tools = [tool for tool in map(chat_tool, body.get("tools") or ()) if tool is not None]
        return {"messages": messages, "tools": tools, **{key: body.get(key) for key in shared}}

    def id(self, request: str) -> str:
        return f"resp_{request}"

    def shown(self, piece: str) -> str:
        named = _RESPONSE.search(piece) if not self._request else None
        self._request = named[1] if named else self._request
        return _ITEM.sub(self._named, piece) if self._request else piece

    def _named(self, found: re.Match[str]) -> str:
        key, kind, _ = found.groups()
        number = sum(each.startswith(kind) for each in self._items)
        return f'{key}"{self._items.setdefault(f"{kind}_{found[3]}", f"{kind}_{self._request}_{number}")}"'

    def answered(self, answer: dict[str, Any]) -> tuple[Message, str]:
        return reply_of(answer)

    def assembler(self) -> ResponseAssembler:
        return ResponseAssembler()

    def silence(self, id: str, model: str) -> str:
        """No event is empty here, and clients insist on the order of those there are."""
        return ": held\n\n"

    def failure(self, body: dict[str, Any]) -> str:
        error = body["error"]
        event = {"type": "error", "sequence_number": 0, **{key: error.get(key) for key in ("code", "message", "param")}}
        return f"event: error\ndata: {json.dumps(event)}\n\n"


class ResponseAssembler:
    """Puts streamed events together into the assistant message; before the end, from the deltas there were."""

    def __init__(self) -> None:
        self.id = self.finish_reason = ""
        self._text: list[str] = []
        self._answer: dict[str, Any] | None = None

    def add_events(self, events: str) -> None:
        for event in events.split("\n\n"):
            _, separator, data = event.partition("data: ")
            if separator:
                self._add(json.loads(data))

    def _add(self, event: dict[str, Any]) -> None:
        if event["type"] == "response.output_text.delta":
            self._text.append(event["delta"])
        elif event["type"] in ("response.completed", "response.incomplete"):
            answer = self._answer = event["response"]
            self.id, self.finish_reason = answer["id"], reply_of(answer)[1]

    def message(self) -> Message:
        return reply_message("".join(self._text), None, None) if self._answer is None else reply_of(self._answer)[0]


def reply_of(answer: dict[str, Any]) -> tuple[Message, str]:
    """(assistant message, finish reason) of a response."""
    texts, thoughts, calls = [], [], []
    for item in answer["output"]:
        if item["type"] == "message":
            texts.append(_text(item.get("content")))
        elif item["type"] == "reasoning":
            thoughts.append(_text(item.get("content")))
        elif item["type"] == "function_call":
            calls.append(_call(item))
    reason = "tool_calls" if calls else "stop"
    if answer.get("status") == "incomplete":
        reason = "length"
    return reply_message("".join(texts), "".join(thoughts), calls), reason


def chat_messages(given: Any) -> list[Message]:
    """`input` as chat messages. Raises GatewayError naming what cannot be read."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise GatewayError("input must be a text, or a list with at least one item", param="input")
    messages: list[Message] = []
    for position, item in enumerate(given):
        kind = item.get("type") or "message"
        if kind == "message":
            messages.append(_message(item, f"input[{position}]"))
        elif kind == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(_call(item))
        elif kind == "function_call_output":
            output = item.get("output")
            content = output if isinstance(output, str) else _text(output)
            messages.append({"role": "tool", "tool_call_id": str(item.get("call_id")), "content": content})
    if not messages:
        raise GatewayError("input has no message", param="input")
    return messages


def _message(item: dict[str, Any], where: str) -> Message:
    role, content = item.get("role"), item.get("content")
    if role not in ROLES or role == "tool":
        raise GatewayError(f"{where}.role is {role!r}; use user, assistant, system or developer", param=f"{where}.role")
    if not isinstance(content, str | None) and not (
        isinstance(content, list) and all(isinstance(part, dict) for part in content)
    ):
        raise GatewayError(f"{where}.content is neither text nor a list of parts", param=f"{where}.content")
    if isinstance(content, list) and all(part.get("type") in _TEXT_PARTS for part in content):
        content = _text(content)
    return {"role": role, "content": content}


def chat_tool(tool: dict[str, Any]) -> Tool | None:
    """A function as the chat route names it; None for tools of another kind."""
    if tool.get("type") != "function":
        return None
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def items_before(turn: Turn) -> list[dict[str, Any]]:
    """The conversation up to and with a turn's reply, as input items; its instructions are not carried over."""
    items: list[dict[str, Any]] = []
    messages: Sequence[Message] = turn.messages
    if messages[0]["role"] == "system":
        messages = messages[1:]
    for message in (*messages, turn.reply):
        text = content_text(message.get("content"))
        if message["role"] == "tool":
            call = message.get("tool_call_id")
            items.append({"type": "function_call_output", "call_id": call, "output": text})
            continue
        if text or not message.get("tool_calls"):
            items.append({"type": "message", "role": message["role"], "content": text})
        for call in message.get("tool_calls") or ():
            items.append({"type": "function_call", "call_id": call.get("id"), **call["function"]})
    return items


def referred(item: dict[str, Any]) -> tuple[str, str, int] | None:
    """(response id, kind, number) of an `item_reference`; None if it is none that was made here."""
    own = _OWN_ITEM.fullmatch(str(item.get("id")))
    return (f"resp_{own[2]}", own[1], int(own[3])) if own else None


def items_of(turn: Turn, kind: str, number: int) -> list[dict[str, Any]]:
    """What a reference to an item of a turn's reply stands for: at most one item; thoughts are not sent back.

    A stream names every call twice, when it begins and in the end, in the same order.
    """
    reply = turn.reply
    if kind == "msg":
        return [{"type": "message", "role": "assistant", "content": content_text(reply.get("content"))}]
    calls = reply.get("tool_calls") or ()
    if kind != "fc" or not calls:
        return []
    call = calls[number % len(calls)]
    return [{"type": "function_call", "call_id": call.get("id"), **call["function"]}]


def _call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": str(item.get("name")), "arguments": item.get("arguments") or "{}"}
    return {"id": str(item.get("call_id")), "type": "function", "function": function}


def _text(parts: Any) -> str:
    if not isinstance(parts, list):
        return ""
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in parts if isinstance(part, dict))
