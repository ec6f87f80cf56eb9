"""An agent that is a program of its own and knows no more of clawrl than a base URL.

    agent = "clawrl.rollout.program:run_program"          in a [[pools]] section
    agent_options = { command = ["python", "agent.py"] }

The program finds in its environment OPENAI_BASE_URL (and OPENAI_API_BASE), OPENAI_API_KEY, MODEL, TASK (the task's
text) and TASK_FILE (JSON: messages, tools); of the worker's own, only PATH and the language. It acts in the
environment's `workdir`, if that has one, or by its steps:

    stdout  ─► {"role": "assistant", …}              one line, in OpenAI's shape; other lines are its own business
    stdin   ◄─ {"messages": […], "terminated": …}    one line: what followed; or {"error": …} once it is over

When it ends, or its time does, its process group is killed and the world is graded as it stands. The program itself is
trusted like any agent's code: it runs as the worker's user, outside any sandbox.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from clawrl.errors import EnvError
from clawrl.rollout.agent import Limits
from clawrl.rollout.env import AgentEnv, is_message
from clawrl.types import Message

KEPT = ("PATH", "LANG", "LC_ALL", "TZ")
"""What a program inherits: none of the worker's secrets."""
LINE_BYTES, TAIL_BYTES = 2**20, 2000
"""The longest line that is an action, and what is kept of stderr."""
READ_OUT_S = 2.0
"""How long the last lines of a program that has ended may take to be read."""


def run_program(
    env: AgentEnv[Any],
    base_url: str,
    api_key: str,
    model: str,
    extra_headers: Mapping[str, str],
    limits: Limits,
    *,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run the program to its end; why it broke off, empty after exit code 0. `base_url` names the session.

    A word of `command` that is a file here is made absolute. Raises EnvError if the program cannot be started.
    """
    assert env.opening is not None
    with tempfile.TemporaryDirectory(prefix="clawrl-program-", ignore_cleanup_errors=True) as folder:
        task_file = Path(folder) / "task.json"
        task_file.write_text(json.dumps({"messages": env.opening.messages, "tools": env.tools}), encoding="utf-8")
        told = {name: os.environ[name] for name in KEPT if name in os.environ}
        told |= {"OPENAI_BASE_URL": base_url, "OPENAI_API_BASE": base_url, "OPENAI_API_KEY": api_key, "MODEL": model}
        told |= {"TASK": _text(env.opening.messages), "TASK_FILE": str(task_file), "HOME": folder}
        told |= environment or {}
        program = _Program(command, told, env.workdir or folder, limits.seconds)
        try:
            while (action := program.actions.get()) is not None:
                program.answer(_step(env, action))
        except BaseException:
            program.end()
            raise
        return program.why


class _Program:
    """A running program: its actions one by one, None after the last."""

    def __init__(self, command: Sequence[str], told: Mapping[str, str], folder: str, seconds: float) -> None:
        words = [os.path.abspath(word) if os.path.isfile(word) else word for word in command]
        dies_with_us = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        if not words or shutil.which(words[0]) is None:
            raise EnvError(f"command={list(command)} cannot be started: there is no such program; give its path")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*dies_with_us, *words], cwd=folder, env=dict(told), stdin=pipe, stdout=pipe, stderr=pipe,
            start_new_session=True,
        )  # fmt: skip
        self.actions: queue.Queue[Message | None] = queue.Queue(8)
        self._over = threading.Event()
        self.why, self._tail = "", b""
        reading = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for thread in (*reading, threading.Thread(target=self._guard, args=(seconds, reading), daemon=True)):
            thread.start()

    def answer(self, said: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended, or does not listen
            self._process.stdin.write(json.dumps(said).encode() + b"\n")
            self._process.stdin.flush()

    def end(self) -> None:
        """End it with all it started; what it still wanted to do is not done."""
        if self._process.poll() is None:
            self._kill_group()
        while self.actions.get() is not None:
            pass

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline(LINE_BYTES):
            if (action := _action(line)) is None:
                continue
            while not self._over.is_set():
                with suppress(queue.Full):
                    self.actions.put(action, timeout=0.2)
                    break

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        while part := self._process.stderr.read1(2**16):  # type: ignore[attr-defined]
            self._tail = (self._tail + part)[-TAIL_BYTES:]

    def _guard(self, seconds: float, reading: Sequence[threading.Thread]) -> None:
        """Wait for the end, or make one; nothing of the program's group outlives it."""
        late, deadline = False, time.monotonic() + seconds
        try:
            self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            late = True
        self._kill_group()
        code = self._process.wait()
        for thread in reading:
            thread.join(READ_OUT_S)
        while reading[0].is_alive() and self.actions.full() and time.monotonic() < deadline:
            reading[0].join(0.2)  # actions that the environment has not taken yet
        if late or code:
            ended = f"killed after {seconds:.0f} s" if late else f"exit code {code}"
            self.why = f"{ended}: {' '.join(self._tail.decode(errors='replace').split())[-300:]}"
        self._over.set()
        self.actions.put(None)


def _action(line: bytes) -> Message | None:
    """The assistant message in a line of the program's output; None if it is anything else."""
    try:
        action = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return action if is_message(action) and action["role"] == "assistant" else None


def _step(env: AgentEnv[Any], action: Message) -> dict[str, Any]:
    """What the program is told after its action."""
    if env.outcome is not None:
        return {"error": "the episode is over"}
    messages, _, terminated, _, _ = env.step(action)
    return {"messages": list(messages), "terminated": terminated}


def _text(messages: Sequence[Message]) -> str:
    """The task in words: all text of the opening messages."""
    return "\n\n".join(message["content"] for message in messages if isinstance(message.get("content"), str))
