"""An OpenAI-compatible endpoint whose replies are scripted: for what stands around a model, without one.

`with Endpoint(play_stock) as url` serves it in a thread of this process; `python -m jobs.bench.endpoint PORT` in a
process of its own. Knows the shape of a chat completion. Ignores sessions, streams and tokens.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from clawrl.types import Message

Script = Callable[[Sequence[Message]], Message]
"""The assistant message that follows messages."""


def play_stock(messages: Sequence[Message]) -> Message:
    """Solve a task of `envs/toolcall`: look up both counts, work out, answer."""
    question = messages[0]["content"]
    item, first, second = re.findall(r'"([^"]+)"', question)
    told = [message["content"] for message in messages if message["role"] == "tool"]
    if len(told) < 2:
        return call("lookup", item=item, place=(first, second)[len(told)])
    if len(told) == 2:
        return call("calc", expression=f"{told[0]} {'-' if 'more' in question else '+'} {told[1]}")
    return {"role": "assistant", "content": f"{told[2]} {item}."}


def call(name: str, **arguments: Any) -> Message:
    """An assistant message that calls one tool."""
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call", "type": "function", "function": function}],
    }


class Endpoint:
    """Serves on a free port of this machine. `requests` counts what came, by session."""

    def __init__(self, script: Script, port: int = 0) -> None:
        self._script = script
        self._socket = socket.create_server(("127.0.0.1", port), backlog=2048)
        routes = [Route("/v1/chat/completions", self._answer, methods=["POST"])]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error", access_log=False))
        self._thread = threading.Thread(target=self.run, daemon=True)
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"

    def run(self) -> None:
        self._server.run([self._socket])

    def __enter__(self) -> Endpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def _answer(self, request: Request) -> JSONResponse:
        try:
            asked = await request.json()
        except ClientDisconnect:
            return JSONResponse({}, 499)  # nobody reads it
        self.requests[request.headers.get("x-session-id", "")] += 1
        reply = self._script(asked["messages"])
        reason = "tool_calls" if reply.get("tool_calls") else "stop"
        choice = {"index": 0, "message": reply, "finish_reason": reason}
        return JSONResponse(
            {"id": "scripted", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}
        )


if __name__ == "__main__":
    Endpoint(play_stock, int(sys.argv[1])).run()
