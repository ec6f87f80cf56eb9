"""What the gateway's routes take and answer, for its OpenAPI document: the keys clawrl reads; others are tolerated.

Pure data. The bodies' finer points are those of the engine's own OpenAI layer.
"""

from __future__ import annotations

from typing import Any

from clawrl.serving.bodies import ROLES

_TEXT = {"type": "string"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
_PARTS = {"type": "array", "items": {"type": "object", "properties": {"type": _TEXT, "text": _TEXT}}}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {
        "role": {"enum": list(ROLES)},
        "content": {"anyOf": [_TEXT, _PARTS, {"type": "null"}]},
        "tool_calls": {"type": "array", "items": {"type": "object"}},
    },
}
_COMMON = {
    "model": _TEXT,
    "stream": {"type": "boolean"},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number"},
    "seed": {"type": "integer"},
    "user": _TEXT,
}
_EVENT = {"type": "object", "properties": {"event": _TEXT, "data": _TEXT}}
_LIMIT = {"type": "integer", "minimum": 1}
_REPLY = {"type": "object", "required": ["id", "object", "model"], "properties": {"id": _TEXT, "model": _TEXT}}

CHAT = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "minItems": 1, "items": _MESSAGE},
        "max_tokens": _LIMIT,
        "max_completion_tokens": _LIMIT,
        "n": _LIMIT,
        "stop": {"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]},
        "tools": {"type": "array", "items": {"type": "object"}},
        **_COMMON,
    },
}
COMPLETION = {
    "type": "object",
    "required": ["prompt"],
    "properties": {"prompt": {"type": "string", "minLength": 1}, "max_tokens": _LIMIT, "n": _LIMIT, **_COMMON},
}
RESPONSE = {
    "type": "object",
    "required": ["input"],
    "properties": {
        "input": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": {"type": "object"}}]},
        "instructions": _TEXT,
        "max_output_tokens": _LIMIT,
        "previous_response_id": _TEXT,
        **_COMMON,
    },
}
FEEDBACK = {
    "type": "object",
    "properties": {
        "turn": _TEXT,
        "response_id": _TEXT,
        "session": _TEXT,
        "score": {"enum": [-1, 0, 1]},
        "text": _TEXT,
        "user": _TEXT,
    },
    "additionalProperties": False,
}
ACT = {"type": "object"}
STORED = {
    "type": "object",
    "required": ["id", "object", "turn", "session"],
    "properties": {"id": _TEXT, "object": {"const": "feedback"}, "turn": _TEXT, "session": _TEXT},
}
ENDED = {
    "type": "object",
    "required": ["session", "turn", "done"],
    "properties": {"session": _TEXT, "turn": _TEXT, "done": {"const": True}},
}
MODELS = {"type": "object", "required": ["object", "data"], "properties": {"data": {"type": "array"}}}
_REFUSALS = (400, 401, 403, 404, 405, 408, 413, 415, 422, 429)


def described(answer: dict[str, Any] = ACT, *, body: dict[str, Any] | None = None, stream: bool = False) -> Any:
    """Keyword arguments of a route: what it takes and answers. Never a 5xx, except while no policy lives (503)."""
    content: dict[str, Any] = {"application/json": {"schema": answer}}
    if stream:
        content["text/event-stream"] = {"schema": _EVENT}
    responses: dict[int | str, Any] = {200: {"description": "done", "content": content}}
    for status in (*_REFUSALS, 503):
        responses[status] = {"description": "refused", "content": {"application/json": {"schema": _ERROR}}}
    extra = {} if body is None else {"requestBody": _body(body)}
    return {"responses": responses, "openapi_extra": extra}


def reply(body: dict[str, Any]) -> Any:
    """A route that answers with a reply of the model."""
    return described(_REPLY, body=body, stream=True)


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}
