"""What a request's body must be before anything is generated or journalled.

Knows JSON, sizes and the few keys that clawrl itself reads. All else is checked by the engine's own OpenAI layer.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import Request

from clawrl.config import PolicySection
from clawrl.errors import GatewayError

ROLES = ("system", "developer", "user", "assistant", "tool")
DEEPEST = 64
"""Levels of nesting; far beyond any schema of a tool, far below where parsers break."""
BIG, BIG_AT_ONCE = 2**20, 16
"""Bytes from which a body counts as big, and how many such are held at a time."""
BODY_S = 60.0
"""A body must have arrived by then."""


class Scales:
    """Bounds how many big bodies are in this process at a time; the others stay unread until it is their turn."""

    def __init__(self, big: int = BIG, at_once: int = BIG_AT_ONCE) -> None:
        self._big, self._free = big, asyncio.Semaphore(at_once)

    def weigh(self) -> Weight:
        """Of one body; enter it before the body is read, leave it when nobody needs the body any more."""
        return Weight(self._big, self._free)


class Weight:
    """What one body weighs so far."""

    def __init__(self, big: int, free: asyncio.Semaphore) -> None:
        self._big, self._free, self._holds = big, free, False

    async def __aenter__(self) -> Weight:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._holds:
            self._free.release()

    async def grow(self, size: int) -> None:
        """Go on once there is room for a body of this size."""
        if size > self._big and not self._holds:
            await self._free.acquire()
            self._holds = True


async def read_json(request: Request, max_mib: int, weight: Weight | None = None) -> dict[str, Any]:
    """The request's JSON object. Raises GatewayError for a wrong content type, size, or anything but an object."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise GatewayError(f"content type {kind or '(none)'!r} is not served; send application/json", status=415)
    raw = await _read(request, max_mib, weight or Scales().weigh())
    try:
        body = json.loads(raw, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise GatewayError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise GatewayError("the body must be a JSON object")
    if too_deep(body):
        raise GatewayError(f"the body is nested deeper than {DEEPEST} levels; flatten it")
    return body


async def _read(request: Request, max_mib: int, weight: Weight) -> bytearray:
    limit, raw = max_mib * 2**20, bytearray()
    too_large = GatewayError(f"the body is larger than {max_mib} MiB; send less history", status=413)
    length = request.headers.get("content-length") or "0"
    if length.isdecimal() and int(length) > limit:
        raise too_large
    await weight.grow(int(length) if length.isdecimal() else 0)
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():  # a chunked one does not say its length
                raw += part
                if len(raw) > limit:
                    raise too_large
                await weight.grow(len(raw))
    except TimeoutError:
        raise GatewayError(f"the body did not arrive within {BODY_S:g} s; send it at once", status=408) from None
    return raw


def _no_number(word: str) -> Any:
    raise ValueError(f"{word} is no JSON number")


def too_deep(value: Any) -> bool:
    """Whether a JSON value has more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            each
            for node in level
            if isinstance(node, (dict, list))
            for each in (node.values() if isinstance(node, dict) else node)
            if isinstance(each, (dict, list))
        ]
        if not level:
            return False
    return True


def validate_chat(body: dict[str, Any], settings: PolicySection) -> None:
    """What must hold of a chat request. Raises GatewayError naming the value and remedy."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise GatewayError("messages must be a list with at least one message", param="messages")
    for position, message in enumerate(messages):
        validate_message(message, position)
    validate_common(body, settings, ("max_tokens", "max_completion_tokens"))


def validate_message(message: Any, position: int) -> None:
    """A message's role, and the shape of what clawrl reads of it: content and tool calls."""
    role = message.get("role") if isinstance(message, dict) else None
    where = f"messages[{position}]"
    if role not in ROLES:
        raise GatewayError(f"{where}.role is {role!r}; use one of {', '.join(ROLES)}", param=f"{where}.role")
    content, calls = message.get("content"), message.get("tool_calls")
    if not (content is None or isinstance(content, str) or _list_of_objects(content)):
        raise GatewayError(f"{where}.content is neither text nor a list of parts", param=f"{where}.content")
    if calls is not None and not _list_of_objects(calls):
        raise GatewayError(f"{where}.tool_calls is no list of calls", param=f"{where}.tool_calls")


def _list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


def validate_common(body: dict[str, Any], settings: PolicySection, limits: tuple[str, ...]) -> None:
    """What all of OpenAI's routes share: model, limits of the reply, temperature, n, stream, tools."""
    model = body.get("model")
    if model is None:
        model = body["model"] = settings.served_name
    if model != settings.served_name:
        raise GatewayError(
            f"model {model!r} is not served here; use {settings.served_name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    for key in (*limits, "n"):
        limit = body.get(key)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0):
            raise GatewayError(f"{key}={limit!r} is not a positive whole number", param=key)
    if (body.get("n") or 1) > settings.max_choices:
        raise GatewayError(f"n={body['n']} is more than policy.max_choices={settings.max_choices}", param="n")
    temperature = body.get("temperature")
    if temperature is not None and not (_is_number(temperature) and 0 <= temperature <= 2):
        raise GatewayError(f"temperature={temperature!r} is outside 0 to 2", param="temperature")
    if body.get("stream") not in (None, True, False):
        raise GatewayError(f"stream={body['stream']!r} is neither true nor false", param="stream")
    if body.get("use_beam_search"):
        raise GatewayError("beam search is not served: its tokens were not sampled", param="use_beam_search")
    for key in ("stream_options", "chat_template_kwargs"):
        if body.get(key) is not None and not isinstance(body[key], dict):
            raise GatewayError(f"{key} is no object", param=key)
    if body.get("tools") is not None and not _list_of_objects(body["tools"]):
        raise GatewayError("tools is no list of tools", param="tools")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
