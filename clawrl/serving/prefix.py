"""A session named by the URL itself, for programs that know a base URL and nothing else.

    http://host:port/session/NAME[/source/NAME][/group/NAME][/turns/main|side]/v1  +  /chat/completions

Knows how such a path is read and the headers it stands for. Ignores what they mean (`sessions`), and who may ask
(`keys`): the request goes on as if the client had sent the headers, whatever it did send of them.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from clawrl.errors import GatewayError
from clawrl.serving.streams import refusal

START = b"/session/"
HEADERS = {"session": b"x-session-id", "source": b"x-source", "group": b"x-group", "turns": b"x-turn-type"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@:+=-]{0,199}")


def read_prefix(path: bytes) -> tuple[str, list[tuple[bytes, bytes]]]:
    """What follows the prefix of a raw path (`/v1/...`, as raw), and the headers that the prefix stands for.

    Raises GatewayError: 404 for a path that is not of this form, 400 for a name that is none.
    """
    words = path.decode("latin-1").split("/")[1:]
    end = words.index("v1") if "v1" in words else len(words)
    names, values = words[:end:2], words[1:end:2]
    if end == len(words) or end % 2 or len(set(names)) < len(names) or not set(names) <= set(HEADERS):
        raise GatewayError(
            "a path with a session is /session/NAME[/source/NAME][/group/NAME][/turns/main|side]/v1/...", status=404
        )
    for name, value in zip(names, values, strict=True):
        if not _NAME.fullmatch(value):
            raise GatewayError(
                f"the {name} {value[:80]!a} in the path is no name; use up to 200 letters, digits and . _ @ : + = -"
            )
    headers = [(HEADERS[name], value.encode()) for name, value in zip(names, values, strict=True)]
    return "/" + "/".join(words[end:]), headers


class Prefixed:
    """ASGI middleware: takes the prefix off a path that has one, before anybody reads the request."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raw = scope.get("raw_path") or scope.get("path", "").encode() if scope["type"] == "http" else b""
        if not raw.startswith(START):
            await self._app(scope, receive, send)
            return
        try:
            path, told = read_prefix(raw)
        except GatewayError as error:
            await refusal(error)(scope, receive, send)
            return
        names = {name for name, _ in told}
        kept = [(name, value) for name, value in scope["headers"] if name.lower() not in names]
        inner = {**scope, "path": unquote(path), "raw_path": path.encode("latin-1"), "headers": [*kept, *told]}
        await self._app(inner, receive, send)
