"""A real gateway and journal in one process, with a policy that echoes or follows a script: for tests of what stands
between them, and of the clients before them.

Only Ray's calls are replaced, by awaiting the method itself. The gateway listens on a port of its own, so that real
programs can be pointed at it.
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import numpy as np

from clawrl.config import GatewaySection, PolicySection, PrivacySection
from clawrl.journal.actor import Journal
from clawrl.journal.store import JournalReader
from clawrl.serving.capture import Finished
from clawrl.serving.gateway import Gateway
from clawrl.serving.keys import KeyRing
from clawrl.serving.normalisers import content_text
from clawrl.types import Capture, Message, VersionSpan


class Local:
    """A handle on an object of this process."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Any:
        return Method(getattr(self._actor, method))

    def options(self, **_: Any) -> "Local":
        return self


class Method:
    def __init__(self, method: Callable) -> None:
        self.remote = method


class Echo:
    """A policy that answers `<n>: <the last message>`."""

    def __init__(self) -> None:
        self._answered = 0

    async def status(self) -> dict[str, Any]:
        return {"replica": "echo", "version": 0, "streams": 0}

    def reply(self, body: dict[str, Any]) -> Message:
        """The assistant's message; a script of one's own overrides this."""
        return {"role": "assistant", "content": self._says(content_text(body["messages"][-1].get("content")))}

    def chat(self, body: dict[str, Any], request: str, user: str = "") -> "Pieces":
        message, id = self.reply(body), f"chatcmpl-{request}"
        said = json.dumps(message) if message.get("tool_calls") else message["content"]
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        asked, answered = len(json.dumps(body["messages"])) // 4, len(said) // 4
        usage = {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": reason}
            answer = {"id": id, "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}
            return Pieces(said, [json.dumps(answer)])
        deltas = [{"delta": delta, "finish_reason": None} for delta in _deltas(message)]
        choices = [*deltas, {"delta": {}, "finish_reason": reason}]
        chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, **each}]} for each in choices]
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append({"choices": [], "usage": usage})
        head = {"id": id, "object": "chat.completion.chunk", "created": int(time.time())}
        return Pieces(said, [f"data: {json.dumps({**head, **chunk})}\n\n" for chunk in chunks])

    def complete(self, body: dict[str, Any], request: str, user: str = "") -> "Pieces":
        said = self._says(str(body["prompt"]))
        choice = {"index": 0, "text": said, "finish_reason": "stop"}
        answer = json.dumps({"id": f"cmpl-{request}", "object": "text_completion", "model": "m", "choices": [choice]})
        return Pieces(said, [f"data: {answer}\n\n" if body.get("stream") else answer])

    def respond(self, body: dict[str, Any], request: str, user: str = "") -> "Pieces":
        given = body["input"]
        said = self._says(given if isinstance(given, str) else str(given[-1].get("content")))
        item = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": said}]}
        answer = {"id": f"resp_{request}", "object": "response", "model": "m", "status": "completed", "output": [item]}
        event = json.dumps({"type": "response.completed", "response": answer})
        streamed = f"event: response.completed\ndata: {event}\n\n"
        return Pieces(said, [streamed if body.get("stream") else json.dumps(answer)])

    def _says(self, heard: str) -> str:
        self._answered += 1
        return f"{self._answered}: {heard}"


def _deltas(message: Message) -> Iterator[dict[str, Any]]:
    """A message as OpenAI streams it: the role, the words, each call's name, then its arguments piece by piece."""
    yield {"role": "assistant", "content": ""}
    yield from ({"content": letter} for letter in message.get("content") or "")
    for index, call in enumerate(message.get("tool_calls") or ()):
        function = call["function"]
        yield {"tool_calls": [{**call, "index": index, "function": {"name": function["name"], "arguments": ""}}]}
        for at in range(0, len(function["arguments"]), 8):
            yield {"tool_calls": [{"index": index, "function": {"arguments": function["arguments"][at : at + 8]}}]}


class Pieces:
    """What streams from a policy replica."""

    def __init__(self, said: str, pieces: list[str]) -> None:
        tokens = np.frombuffer(said.encode("utf-8", "replace"), np.uint8).astype(np.int32)
        capture = Capture(
            tokens, tokens, tokens * np.float32(-0.5), tokens[:, None], tokens[:, None] * np.float32(-0.5),
            (VersionSpan(0, 0, len(tokens)),),
        )  # fmt: skip
        self._left = iter([*pieces, Finished(capture, 0)])

    def __aiter__(self) -> "Pieces":
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        try:
            return next(self._left)
        except StopIteration:
            raise StopAsyncIteration from None

    def cancel(self) -> None: ...


class Served(Gateway):
    """Serve awaits `__del__`; here the door does, and the interpreter has nothing left to do."""

    def __del__(self) -> None: ...


class Door:
    """Gateway replicas over one journal, and a client of theirs."""

    def __init__(self, url: str, journal: Journal, gateways: list[Gateway]) -> None:
        self.url, self.journal, self._gateways = url, journal, gateways

    @property
    def address(self) -> str:
        """Where programs find the first replica."""
        return f"http://127.0.0.1:{self._gateways[0]._settings.port}"

    def client(self, replica: int = 0, peer: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
        """A client of a replica, without a socket."""
        transport = httpx.ASGITransport(self._gateways[replica]._app, raise_app_exceptions=True, client=(peer, 1))
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=told)

    async def say(self, messages: list, *, user: str = "ann", replica: int = 0, stream=False, **headers: str) -> Any:
        """Append a reply to `messages`; returns whether the client was told that nothing is recorded."""
        body = {"messages": messages, "user": user, "stream": stream}
        async with self.client(replica, **headers) as client:
            response = await client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        if stream:
            events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
            reply = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        else:
            reply = response.json()["choices"][0]["message"]["content"]
        messages.append({"role": "assistant", "content": reply})
        return response.headers.get("x-clawrl-recorded") == "no"

    async def heard(self, user: str, session: str | None = None, *, replica: int = 0, train: bool = False) -> None:
        """A replica knows of a word within a second."""
        async with asyncio.timeout(1):
            while self._gateways[replica]._placing.opt_outs.cover(user, session) is train:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    def recorded(self) -> list[str]:
        """The last message of every turn in the journal, in order."""
        return [json.loads(messages)[-1]["content"] for (messages,) in self.rows("SELECT messages FROM turns")]

    def followed(self) -> list[str]:
        """The last message of every next state."""
        return [json.loads(messages)[-1]["content"] for (messages,) in self.rows("SELECT messages FROM next_states")]

    def rows(self, query: str) -> list[Any]:
        with closing(JournalReader(self.url)) as reader, reader.database.reader.connect() as connection:
            return list(connection.exec_driver_sql(query + " ORDER BY seq"))

    def files(self) -> bytes:
        return b"".join(file.read_bytes() for file in Path(self.url.removeprefix("sqlite:///")).parent.iterdir())


@asynccontextmanager
async def door(
    folder: Path, replicas: int = 1, *, policy: Any = None, gateway: dict[str, Any] | None = None, **privacy: Any
) -> AsyncIterator[Door]:
    """`policy` answers (an Echo if None); `gateway` and `privacy` are settings of their sections."""
    url = f"sqlite:///{folder}/journal.sqlite"
    journal, gateways = Journal(url), []
    for _ in range(replicas):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        replica: Any = object.__new__(Served)
        await replica.__init__(
            GatewaySection.model_validate({"port": port, **(gateway or {})}),
            PolicySection(),
            Local(policy or Echo()),
            Local(journal),
            {},
            {},
            PrivacySection.model_validate(privacy),
            KeyRing(folder / "keys.json", {}),
        )
        gateways.append(replica)
    try:
        yield Door(url, journal, gateways)
    finally:
        await journal.close()
        await asyncio.gather(*(Gateway.__del__(replica) for replica in gateways))


@contextmanager
def serving(folder: Path, policy: Any) -> Iterator[Door]:
    """A door in a thread of its own, for programs that are waited for."""
    opened: Future[tuple[Door, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        ended = asyncio.Event()
        try:
            async with door(folder, policy=policy) as served:
                opened.set_result((served, asyncio.get_running_loop(), ended))
                await ended.wait()
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)

    thread = Thread(target=lambda: asyncio.run(serve()), name="door")
    thread.start()
    served, loop, ended = opened.result(30)
    try:
        yield served
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
