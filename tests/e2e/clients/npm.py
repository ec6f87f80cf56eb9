"""Programs of npm, installed for one test run; OpenClaw in a folder of its own, so that nothing of the machine's is
read or written."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from jobs import free_port

NODE = "node@24.21.0"
"""First, since OpenClaw's installation runs on it: it refuses what is older than 24.16."""
SDKS = ("openai@7.55.0", "ai@7.0.173", "@ai-sdk/openai-compatible@3.0.92", "@ai-sdk/openai@4.0.118")
OPENCLAW = ("openclaw@2026.9.6",)
STARTS, SAY_S, READY_S, STOP_S = 3, 400.0, 240.0, 20.0
PROTOCOL, ANSWER_S = 4, 300.0
"""Of OpenClaw's gateway."""


@dataclass(frozen=True)
class Npm:
    """An installed prefix: Node.js and the packages."""

    prefix: Path

    @property
    def modules(self) -> Path:
        return self.prefix / "node_modules"

    @property
    def environment(self) -> dict[str, str]:
        """Of a program that knows this Node.js and nothing of the user's."""
        path = f"{self.modules / 'node' / 'bin'}:{os.environ['PATH']}"
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": path, "NO_COLOR": "1", "CI": "1"}

    def install(self, packages: Sequence[str]) -> str | None:
        """Why it failed; None if all is there."""
        if shutil.which("npm") is None:
            return "no npm in PATH"
        npm = ["npm", "install", "--prefix", str(self.prefix), "--no-audit", "--no-fund", "--loglevel", "error"]
        for wanted in ((NODE,), packages):
            if all((self.modules / name_of(each) / "package.json").exists() for each in wanted):
                continue
            ended = subprocess.run(
                [*npm, *wanted],
                capture_output=True,
                text=True,
                timeout=600,
                env={**os.environ, "PATH": self.environment["PATH"]},
            )
            if ended.returncode != 0:
                return f"npm cannot install {', '.join(wanted)}: {ended.stderr[-600:]}"
        return None

    def node(self, program: str, *arguments: str, timeout_s: float = 300) -> Any:
        """What an ES module prints in its last line, as JSON."""
        file = self.prefix / f"program-{time.monotonic_ns()}.mjs"
        file.write_text(program)
        try:
            ended = subprocess.run(
                ["node", str(file), *arguments],
                capture_output=True,
                text=True,
                timeout=timeout_s,
                env={**self.environment, "HOME": str(self.prefix)},
            )
        finally:
            file.unlink()
        assert ended.returncode == 0, ended.stderr[-3000:]
        return json.loads(ended.stdout.splitlines()[-1])


def name_of(package: str) -> str:
    """`@scope/name@1.2` without its version."""
    return package[: package.rindex("@")]


class OpenClaw:
    """One installation's state: config, workspace, sessions, all under `folder`."""

    def __init__(self, npm: Npm, folder: Path, config: dict[str, Any]) -> None:
        """`config` is openclaw.json; what keeps it to the folder and to this machine is added."""
        self._npm, self.folder, self._port = npm, folder, free_port()
        for name in ("state", "workspace", "home", "tmp"):
            (folder / name).mkdir(parents=True)
        gateway = {"mode": "local", "bind": "loopback", "auth": {"mode": "none"}}
        own = {"gateway": gateway, "logging": {"file": str(folder / "openclaw.log")}}
        defaults = {**config["agents"]["defaults"], "workspace": str(self.workspace)}
        (folder / "openclaw.json").write_text(json.dumps({**config, **own, "agents": {"defaults": defaults}}))

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def _environment(self) -> dict[str, str]:
        own = {
            "HOME": self.folder / "home",
            "TMPDIR": self.folder / "tmp",
            "OPENCLAW_STATE_DIR": self.folder / "state",
            "OPENCLAW_CONFIG_PATH": self.folder / "openclaw.json",
            "OPENCLAW_GATEWAY_PORT": self._port,
        }
        return {**self._npm.environment, **{name: str(value) for name, value in own.items()}}

    @property
    def _program(self) -> list[str]:
        return ["node", str(self._npm.modules / "openclaw" / "openclaw.mjs")]

    def say(self, text: str) -> str:
        """A person's message to the main agent, which runs in this one command; what is answered."""
        ended = subprocess.run(
            [*self._program, "agent", "--agent", "main", "--local", "--message", text],
            capture_output=True,
            text=True,
            timeout=SAY_S,
            env=self._environment,
            cwd=self.workspace,
        )
        assert ended.returncode == 0, f"{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
        return ended.stdout

    @contextmanager
    def gateway(self) -> Iterator[Operator]:
        """`openclaw gateway`, ready. On a busy machine it may give its own start up, and is started again."""
        process, operator = self._started()
        try:
            yield operator
        finally:
            operator.close()
            _stop(process)

    def _started(self) -> tuple[subprocess.Popen, Operator]:
        log = self.folder / "gateway.log"
        for _ in range(STARTS):
            with log.open("w") as out:
                process = subprocess.Popen(
                    [*self._program, "gateway", "--port", str(self._port)],
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    cwd=self.workspace,
                    start_new_session=True,
                )
            deadline = time.monotonic() + READY_S
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    return process, Operator(self._port)
                except (OSError, TimeoutError, WebSocketException, RpcError):  # no port yet, or not all behind it
                    time.sleep(0.3)
            _stop(process)
        raise AssertionError(f"openclaw gateway did not come up: {log.read_text()[-3000:]}")


class RpcError(Exception):
    """What OpenClaw's gateway refuses."""


class Operator:
    """A client of OpenClaw's gateway, by its protocol (docs/gateway/protocol in its package): JSON frames on a
    WebSocket. What `openclaw ...` asks of a gateway goes the same way, a start of the program later."""

    def __init__(self, port: int) -> None:
        """Raises OSError, WebSocketException or RpcError while the gateway is not up."""
        with ExitStack() as opened:
            self._ids = itertools.count()
            self._socket = opened.enter_context(connect(f"ws://127.0.0.1:{port}", max_size=None, max_queue=None))
            self._socket.recv(timeout=ANSWER_S)  # connect.challenge, for those who sign
            client = {"id": "gateway-client", "version": "1", "platform": "linux", "mode": "backend"}
            scopes = ["operator.admin", "operator.read", "operator.write"]
            protocol = {"minProtocol": PROTOCOL, "maxProtocol": PROTOCOL}
            self.call("connect", **protocol, client=client, role="operator", scopes=scopes, caps=[])
            self._opened = opened.pop_all()

    def close(self) -> None:
        self._opened.close()

    def call(self, method: str, **params: Any) -> Any:
        """The final answer; of a run that is accepted, the one after that. Raises RpcError where it is refused."""
        id, deadline = str(next(self._ids)), time.monotonic() + ANSWER_S
        self._socket.send(json.dumps({"type": "req", "id": id, "method": method, "params": params}))
        while True:
            frame = json.loads(self._socket.recv(timeout=max(deadline - time.monotonic(), 0)))
            if frame["type"] != "res" or frame["id"] != id:
                continue
            if not frame["ok"]:
                raise RpcError(f"{method}: {frame['error']}")
            if frame["payload"].get("status") != "accepted":
                return frame["payload"]

    def say(self, text: str, session: str = "agent:main:main") -> str:
        """A person's message; what is answered."""
        key = uuid.uuid4().hex
        ended = self.call("agent", agentId="main", sessionKey=session, message=text, idempotencyKey=key)
        return "\n".join(each.get("text") or "" for each in ended["result"]["payloads"])


def _stop(process: subprocess.Popen) -> None:
    """SIGTERM, and what is left of it killed after a while."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
