r"""A terminal in a sandbox: commands, keys, files until `submit`; tests enter only after the agent has stopped.

    user: instruction
    assistant: run("grep -c ERROR app.log") ─► 17     write("answer.txt", "17\n") ─► written     submit()
    tests ─► reward file, or share of passed tests ─► verdict in [-1, 1]

Knows tasks, one sandbox at a time and its pty. Ignores how many turns there are and how long an observation may be.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

from clawrl.errors import EnvError, SandboxError
from clawrl.rollout.env import AgentEnv, Answer, Call, Opening, Split, calls, message_of, nth_of_split
from clawrl.types import Message, Tool
from envs.sandbox import ExecResult, Kept, Sandbox, SandboxSpec, Shell, make_folders, reconcile
from envs.terminal.folders import read_tasks
from envs.terminal.task import REWARD, REWARD_JSON, TerminalTask, pass_rate_of, reward_of
from envs.terminal.tasks import make_own_task

RUN_S = 30.0
MAX_WAIT_S = 60.0
SETUP_S = 120.0


def tool(name: str, description: str, required: Sequence[str] = (), **properties: dict[str, Any]) -> Tool:
    """A tool of the terminal, as OpenAI's API describes one."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: tuple[Tool, ...] = (
    tool(
        "run",
        "Run a shell command in your terminal and wait for its output. Directory and variables stay. A command that "
        f"takes longer than {RUN_S:.0f} s (or `seconds`) goes on; reach it with keys.",
        ["command"],
        command={"type": "string"},
        seconds={"type": "number", "exclusiveMinimum": 0, "maximum": MAX_WAIT_S},
    ),
    tool(
        "keys",
        r"Type keys into the terminal as they are (\n is Enter, \u0003 is Ctrl-C, \u0004 is Ctrl-D, \u001b[A is up) "
        "and read what it shows within `seconds` (1).",
        ["text"],
        text={"type": "string"},
        seconds={"type": "number", "minimum": 0, "maximum": MAX_WAIT_S},
    ),
    tool(
        "write",
        "Write a whole file; folders are made. A relative path starts at the task's folder.",
        ["path", "content"],
        path={"type": "string", "minLength": 1},
        content={"type": "string"},
    ),
    tool("submit", "Say that the task is done. The work is then tested, and the episode ends."),
)

NO_CALL = 'error: nothing was done; call a tool, such as run {"command": "ls"}, or submit {} when the task is done'


class TerminalEnv(AgentEnv[TerminalTask]):
    """folder: task folders (Harbor, Terminal-Bench 1); None is the own families. backend and limits: the sandbox's."""

    name = "terminal"
    offered: ClassVar[tuple[Tool, ...]] = TOOLS

    def __init__(
        self,
        folder: str | Path | None = None,
        backend: str = "auto",
        limits: Literal["enforce", "best_effort"] = "enforce",
        run: str = "local",
    ) -> None:
        super().__init__()
        self._folder_tasks = None if folder is None else read_tasks(Path(folder))
        self._limits: Literal["enforce", "best_effort"] = limits
        self._kept = Kept(backend, run)
        self._shell: Shell | None = None
        self._folder = "/"

    def make_task(self, number: int, split: Split) -> TerminalTask:
        """Raises EnvError if the folder has no task in this split."""
        if self._folder_tasks is None:
            return make_own_task(number, split)
        return nth_of_split("terminal", self._folder_tasks, number, split)

    def begin(self, task: TerminalTask) -> Opening:
        """Raises SandboxError without an image or a backend, EnvError if the task's own set-up fails."""
        sandbox = self._fresh_sandbox(task)
        if task.files:
            sandbox.put(task.files)
        if task.setup:
            done = sandbox.exec(["sh", "-ec", task.setup], SETUP_S, cwd=task.workdir)
            if not done.ok:
                raise EnvError(f"task {task.id}: its set-up failed ({_end(done)}): {done.output[-300:]}")
        self._folder = task.workdir or sandbox.exec("pwd").output.strip()
        self._shell = sandbox.shell(pty=True, cwd=self._folder)
        return Opening(({"role": "user", "content": task.instruction},), self.offered)

    def act(self, action: Message) -> Answer:
        made = calls(action, self.tools)
        if not made:
            return Answer(({"role": "user", "content": NO_CALL},))
        messages = []
        for call in made:
            if call.name == "submit" and call.problem is None:
                return Answer((*messages, call.reply("submitted")), terminated=True)
            messages.append(call.reply(call.problem or self._do(call)))
        return Answer(tuple(messages))

    def grade(self) -> float:
        """Raises EnvError if the tests hang or crash: that says nothing about the agent."""
        task, sandbox = self._task(), self._open()  # the shell stays: closing it would end the servers it started
        make_folders(sandbox, self._folder, "/logs")
        sandbox.exec("rm -rf /logs/verifier /tests; mkdir -p /logs/verifier /tests", cwd="/")
        sandbox.put(task.tests)
        done = sandbox.exec(task.verify, task.verify_timeout, task.verify_env, cwd=self._folder)
        if done.timed_out:
            raise EnvError(
                f"task {task.id}: its tests took longer than {task.verify_timeout:g} s; "
                "correct the tests, or give them more time (timeout_sec)"
            )
        if task.verdict == "pytest":
            return pass_rate_of(task.id, done.output)
        for path in (REWARD, REWARD_JSON):
            with suppress(SandboxError):
                return reward_of(task.id, sandbox.read_file(path).decode("utf-8", "replace"))
        raise EnvError(
            f"task {task.id}: its tests left no {REWARD} ({_end(done)}); the last they said: {done.output[-300:]!r}"
        )

    def gold(self, task: TerminalTask) -> Sequence[Message]:
        """Raises EnvError for a task without a solution."""
        if not task.solution:
            raise EnvError(f"task {task.id} comes without a solution; add solution/solve.sh (or solution.sh)")
        writes = [
            message_of("write", path=f"/{name}", content=_content(content))
            for name, content in task.solution_files.items()
        ]
        script = message_of("write", path="/tmp/solution.sh", content=task.solution + "\n")
        go = message_of("run", command="bash /tmp/solution.sh", seconds=MAX_WAIT_S)
        return [*writes, script, go, message_of("submit")]

    @classmethod
    def reconcile(cls, run: str) -> None:
        reconcile(run)

    def close(self) -> None:
        self._close_shell()
        self._kept.close()

    # -- the tools ---------------------------------------------------------------------------------------------------

    def _do(self, call: Call) -> str:
        given = call.arguments
        if call.name == "run":
            return self._run(given["command"], float(given.get("seconds", RUN_S)))
        if call.name == "keys":
            return self._keys(given["text"], float(given.get("seconds", 1.0)))
        return self._write(given["path"], given["content"])

    def _run(self, command: str, seconds: float) -> str:
        shell = self._living_shell()
        if shell.busy:
            return 'error: the terminal is busy with an earlier command; use keys, e.g. {"text": "\\u0003"} for Ctrl-C'
        if "\0" in command:
            return "error: run: the command has a NUL character in it"
        done = shell.run(command, seconds)
        if done.timed_out:
            return f"{done.output}\n[still running after {seconds:g} s; read on, or stop it, with keys]".lstrip("\n")
        status = "" if done.ok else f"\n[exit status {done.code}]"
        return (done.output.rstrip("\n") + status).lstrip("\n") or "[no output]"

    def _keys(self, text: str, seconds: float) -> str:
        shell = self._living_shell()
        if text:
            shell.send(text)
        return shell.read(seconds).strip("\n") or "[nothing new on the terminal]"

    def _write(self, path: str, content: str) -> str:
        where = path if path.startswith("/") else f"{self._folder.rstrip('/')}/{path}"
        if "\0" in path or where.endswith("/"):
            return f"error: write: {path!r} does not name a file"
        folder = shlex.quote(where.rpartition("/")[0] or "/")
        command = f"mkdir -p {folder} && cat > {shlex.quote(where)}"
        done = self._open().exec(command, cwd="/", stdin=content.encode("utf-8", "replace"))
        return f"wrote {where}" if done.ok else f"error: write: {done.output.strip()}"

    # -- the sandbox -------------------------------------------------------------------------------------------------

    def _fresh_sandbox(self, task: TerminalTask) -> Sandbox:
        """The sandbox there is, back at its image, if the task asks for the same one; else a new one."""
        spec = SandboxSpec(
            image=task.image,
            memory=task.memory,
            cpus=task.cpus,
            disk=task.disk,
            timeout=RUN_S,
            limits=self._limits,
            env={"TERM": "xterm", "PAGER": "cat", "GIT_PAGER": "cat", **task.env},
            workdir=task.workdir,
        )
        self._close_shell()
        return self._kept.again(spec) or self._kept.open(spec)

    def _open(self) -> Sandbox:
        if self._kept.sandbox is None:
            raise EnvError("terminal: there is no sandbox; call reset first")
        return self._kept.sandbox

    def _task(self) -> TerminalTask:
        if self.task is None:
            raise EnvError("terminal: there is no task; call reset first")
        return self.task

    def _living_shell(self) -> Shell:
        """The episode's shell; a new one where the agent ended it."""
        if self._shell is None or not self._shell.alive:
            self._close_shell()
            make_folders(self._open(), self._folder)
            self._shell = self._open().shell(pty=True, cwd=self._folder)
        return self._shell

    def _close_shell(self) -> None:
        if self._shell is not None:
            with suppress(SandboxError):
                self._shell.close()
            self._shell = None


def _content(content: bytes | Path) -> str:
    return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")


def _end(done: ExecResult) -> str:
    return "it took too long" if done.timed_out else f"exit status {done.code}"
