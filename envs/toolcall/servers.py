"""MCP servers inside a sandbox: started, asked for their tools, called. The protocol is the official SDK's.

    caller's thread ── call ──► one event loop for all servers ── SDK's Client ── _Pipes ──► stdin, stdout inside

Knows the sandbox's processes and the SDK's client. Ignores tasks and messages: a call gives text, whatever happens.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import anyio
import jsonschema
import mcp_types
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp.shared.message import SessionMessage

from clawrl.errors import EnvError, SandboxError
from clawrl.types import Tool
from envs.sandbox import HeadTail, Process, Sandbox

MAX_LINE = 16 << 20
"""Bytes of one message. A server that writes more without a newline speaks no MCP."""
MAX_SAID = 4096
CLOSE_S = 2.0
LONGEST_NAME = 64


@dataclass(frozen=True, slots=True)
class ServerSpec:
    """One entry of the usual `mcpServers`: how a server is started inside the sandbox."""

    name: str
    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None


def read_specs(servers: Mapping[str, Mapping[str, Any]]) -> tuple[ServerSpec, ...]:
    """Of `{"name": {"command": "python", "args": ["server.py"], "env": {}, "cwd": "/srv"}}`.

    Raises EnvError for an entry that is not of this form; servers at a URL cannot be sandboxed.
    """
    specs = []
    for name, given in servers.items():
        try:
            entry = {"type": "stdio", **given}
            if entry.pop("type") != "stdio":
                raise TypeError("type must be stdio")
            entry["args"] = tuple(map(str, entry.pop("args", ())))
            specs.append(ServerSpec(name=name, **entry))
        except TypeError as error:
            expected = '{"command": "python", "args": [], "env": {}, "cwd": "/"}'
            raise EnvError(f"mcp: server {name!r} is not of the form {expected} (stdio only): {error}") from None
    return tuple(specs)


@cache
def _loop() -> asyncio.AbstractEventLoop:
    """Runs as long as this process, in a thread that does not keep it alive."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="mcp", daemon=True).start()
    return loop


class Server:
    """A started server. `wait_ready` comes first; `close` may be called twice."""

    def __init__(self, spec: ServerSpec, sandbox: Sandbox) -> None:
        """Raises SandboxError if the sandbox is gone."""
        self.spec = spec
        self.tools: Sequence[mcp_types.Tool] = ()
        self._process = sandbox.start([spec.command, *spec.args], spec.env, cwd=spec.cwd)
        self._pipes = _Pipes(self._process)
        self._client = Client(self._pipes)
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._living = asyncio.run_coroutine_threadsafe(self._live(), _loop())

    async def _live(self) -> None:
        """The client's whole life, in one task as it wants it."""
        try:
            async with self._client as client:
                listed = await client.list_tools()
                tools = [*listed.tools]
                while listed.next_cursor:
                    listed = await client.list_tools(cursor=listed.next_cursor)
                    tools += listed.tools
                self.tools = tools
                self._ready.set()
                await self._stop.wait()
        except BaseException as error:
            self._failure = error
        finally:
            self._ready.set()

    def wait_ready(self, seconds: float) -> None:
        """Until its tools are known. Raises EnvError if it does not come to that."""
        in_time = self._ready.wait(seconds)
        if in_time and self._failure is None:
            return
        why = f"it gave no list of tools within {seconds:g} s"
        if in_time:
            first = _first(self._failure)
            closed = isinstance(first, MCPError) and first.code == mcp_types.CONNECTION_CLOSED
            why = (self._end() if closed else self.ended()) or f"{type(first).__name__}: {_said(first)}"
        said = self._pipes.said.text().strip()[-500:]
        command = " ".join([self.spec.command, *self.spec.args])
        raise EnvError(
            f"mcp: server {self.spec.name!r} did not start: {why}{f'; it said: {said}' if said else ''}. Check its "
            f"command ({command}), and that the sandbox has what it needs (packages, files, image)"
        )

    def call(self, tool: str, arguments: Mapping[str, Any], seconds: float) -> str:
        """What the tool gave, in words; an error, a server that is slow and one that has ended are words too."""
        if why := self.ended():
            return f"error: server {self.spec.name} is gone: {why}"
        calling = self._client.call_tool(tool, dict(arguments), read_timeout_seconds=seconds)
        try:
            return told(asyncio.run_coroutine_threadsafe(calling, _loop()).result(seconds + CLOSE_S))
        except MCPError as error:
            if error.code == mcp_types.REQUEST_TIMEOUT:
                return f"error: {tool} took longer than {seconds:g} s and was given up"
            if error.code == mcp_types.CONNECTION_CLOSED:
                return f"error: server {self.spec.name} is gone: {self._end() or 'it closed its output'}"
            return f"error: {tool}: {error}"
        except Exception as error:  # an answer that is no MCP, too
            return f"error: {tool}: {type(error).__name__}: {_said(_first(error))}"

    def ended(self) -> str | None:
        """How the process ended; None while it goes on."""
        if not self._process.ended():
            return None
        try:
            return f"it ended with exit status {self._process.code()}"
        except SandboxError as error:
            return str(error)

    def _end(self) -> str | None:
        """As `ended`, a moment after its output ended."""
        deadline = time.monotonic() + CLOSE_S
        while (why := self.ended()) is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return why

    def close(self) -> None:
        _loop().call_soon_threadsafe(self._stop.set)
        try:
            self._living.result(CLOSE_S)
        except TimeoutError:
            self._living.cancel()
            self._pipes.gone.wait(CLOSE_S)
        self._process.kill()
        self._process.close()


class _Pipes:
    """A transport of the SDK: newline-delimited JSON over the process's descriptors, which never block."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._tasks: anyio.abc.TaskGroup
        self.said = HeadTail(MAX_SAID)
        self.gone = threading.Event()  # nothing reads or writes any more

    async def __aenter__(self):
        self._sink, reading = anyio.create_memory_object_stream[SessionMessage | Exception](0)
        writing, self._source = anyio.create_memory_object_stream[SessionMessage](0)
        self._ends = (reading, writing)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        for descriptor in self._process.outputs():
            self._tasks.start_soon(self._read, descriptor)
        self._tasks.start_soon(self._write)
        return reading, writing

    async def __aexit__(self, *_: object) -> None:
        self._tasks.cancel_scope.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            for stream in (*self._ends, self._sink, self._source):
                stream.close()
            self.gone.set()

    async def _read(self, descriptor: int) -> None:
        lines = bytearray()
        while descriptor in self._process.outputs():
            await anyio.wait_readable(descriptor)
            for stream, data in self._process.receive(descriptor):
                if stream != 1:
                    self.said.add(data)
                    continue
                lines += data
                *whole, lines = lines.split(b"\n")
                for line in filter(bytes.strip, map(bytes, whole)):
                    await self._sink.send(_message(line))
                if not data or len(lines) > MAX_LINE:
                    await self._sink.aclose()  # the session sees the connection end
                    return

    async def _write(self) -> None:
        async for message in self._source:
            data = message.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n"
            try:
                while data := data[self._process.send(data) :]:
                    await anyio.wait_writable(self._process.input() or -1)
            except OSError:  # nobody reads
                await self._sink.aclose()
                return


def _message(line: bytes) -> SessionMessage | Exception:
    try:
        return SessionMessage(mcp_types.jsonrpc_message_adapter.validate_json(line, by_name=False))
    except ValueError as error:
        return error


def _first(error: BaseException | None) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _said(error: BaseException | None) -> str:
    return " ".join(str(error).split())[:300]


# -- tools as OpenAI's API describes them -----------------------------------------------------------------------------


def offer(servers: Sequence[Server]) -> dict[str, tuple[Server, mcp_types.Tool]]:
    """Name for the policy → whose tool it is. A name that two servers have gets its server's in front.

    Raises EnvError if two are still called alike, or a schema cannot be checked against.
    """
    counts = Counter(_name(tool.name) for server in servers for tool in server.tools)
    found: dict[str, tuple[Server, mcp_types.Tool]] = {}
    for server in servers:
        for tool in server.tools:
            name = _name(tool.name)
            if counts[name] > 1:
                name = _name(f"{server.spec.name}_{tool.name}")
            if name in found:
                raise EnvError(f"mcp: two tools are called {name!r}; rename server {server.spec.name!r}")
            _check(server.spec.name, tool)
            found[name] = server, tool
    return found


def described(name: str, tool: mcp_types.Tool) -> Tool:
    """A function tool."""
    function = {"name": name, "description": tool.description or "", "parameters": tool.input_schema}
    return {"type": "function", "function": function}


def _name(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_-]", "_", text)[:LONGEST_NAME]


def _check(server: str, tool: mcp_types.Tool) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(tool.input_schema)
        outside = re.search(r'"\$(?:ref|dynamicRef)":\s*"(?!#)[^"]*"', json.dumps(tool.input_schema))
        why = None if outside is None else f"{outside[0]} leads out of it"
    except jsonschema.SchemaError as error:
        why = error.message[:200]
    if why:
        raise EnvError(f"mcp: server {server!r}: the schema of its tool {tool.name!r} cannot be used: {why}")


def told(result: mcp_types.CallToolResult) -> str:
    """A tool's result in words; what is no text is named."""
    parts = [_part(each) for each in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = "\n".join(parts) or "[no output]"
    return f"error: {text}" if result.is_error else text


def _part(content: Any) -> str:
    if content.type == "text":
        return content.text
    if content.type == "resource" and getattr(content.resource, "text", None) is not None:
        return content.resource.text
    if content.type == "resource_link":
        return f"[resource {content.uri}]"
    return f"[{content.type}, not shown]"
