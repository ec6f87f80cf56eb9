"""Tools of MCP servers, each a process in the episode's sandbox; the verdict is on the files that they leave.

    user: Bring all pears there are, wherever they lie, to the barn.
    assistant: list_stock(market) ─► {"pears": 3}     move(pears, 3, market, barn) ─► moved …     "Done."
    servers end ─► the task's files, read out of the sandbox ─► as wanted: 1, else -1

Knows tasks, one sandbox at a time and the servers in it. Ignores the protocol (`servers`). Any server over stdio will
do: `servers` is the usual `mcpServers`, and a file of `tasks` says what is asked and what must be there in the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clawrl.errors import EnvError
from clawrl.rollout.env import AgentEnv, Answer, Call, Opening, Split, Task, calls, message_of, nth_of_split
from clawrl.types import Message
from envs.sandbox import GIB, Kept, Sandbox, SandboxSpec, reconcile
from envs.toolcall.image import python_image
from envs.toolcall.inventory.tasks import make_asked
from envs.toolcall.servers import Server, described, offer, read_specs

OWN = Path(__file__).parent / "inventory"
WORLD = "/srv/world.json"
OWN_SERVER = {"command": "python", "args": ["-m", "envs.toolcall.inventory.server", WORLD], "cwd": "/srv"}
OWN_FILES = {f"/srv/envs/toolcall/inventory/{name}": OWN / name for name in ("server.py", "world.py")}
BROKEN = (
    "error: no tool was called: a tool call must be valid JSON with name and arguments. Without one, the task ends."
)
MAX_FILE = 16 << 20


@dataclass(frozen=True, slots=True)
class McpTask(Task):
    """`files`: path → content, in the sandbox before the servers start. `wanted`: path → what it must hold in the end:
    a text (spaces at its end do not count), a JSON value, or None for no such file. `solution`: tool, arguments."""

    instruction: str
    files: Mapping[str, bytes]
    wanted: Mapping[str, Any]
    solution: tuple[tuple[str, Mapping[str, Any]], ...] = ()


class McpEnv(AgentEnv[McpTask]):
    """`servers` and `tasks` alone, or neither: then the inventory, whose server is added to the servers there are.

    servers        name → {"command", "args", "env", "cwd"}, started in the sandbox; network: none
    tasks          a JSON file: [{"id", "instruction", "files": {}, "wanted": {}, "gold": [["tool", {}], …]}, …]
    packages       installed here, and copied into the sandbox with all they need (its `python` is this one)
    files          path in the sandbox → file or folder of this machine
    image          another image than `base` with Python, the SDK and `packages`: "host" for programs of this machine
    start_seconds  until a server has listed its tools         call_seconds  until a call is given up
    memory         bytes, all servers together      backend, limits, run: the sandbox's
    """

    name = "mcp"

    def __init__(
        self,
        servers: Mapping[str, Mapping[str, Any]] | None = None,
        tasks: str | Path | None = None,
        packages: Sequence[str] = (),
        files: Mapping[str, str | Path] | None = None,
        image: str | None = None,
        start_seconds: float = 60.0,
        call_seconds: float = 30.0,
        memory: int = GIB,
        backend: str = "auto",
        limits: Literal["enforce", "best_effort"] = "enforce",
        run: str = "local",
    ) -> None:
        """Raises EnvError for a server or task file that is not of the form above, or a package that is not here."""
        super().__init__()
        own = tasks is None
        self._specs = read_specs({**(servers or {}), **({"inventory": OWN_SERVER} if own else {})})
        if not self._specs:
            raise EnvError("mcp: no servers are named; give servers={name: {command, args}}, or no tasks either")
        self._tasks = None if tasks is None else read_tasks(Path(tasks))
        self._files = {path: Path(source) for path, source in (files or {}).items()} | (OWN_FILES if own else {})
        self._packages, self._image = ("mcp", *packages), image
        self._seconds = (start_seconds, call_seconds)
        self._memory = memory
        self._limits: Literal["enforce", "best_effort"] = limits
        self._kept = Kept(backend, run)
        self._servers: list[Server] = []
        self._offered: dict[str, tuple[Server, Any]] = {}

    def make_task(self, number: int, split: Split) -> McpTask:
        """Raises EnvError if no task of the file is in this split."""
        if self._tasks is None:
            asked = make_asked(number, split)
            world = {WORLD: json.dumps(asked.world).encode()}
            return McpTask(asked.id, asked.instruction, world, {WORLD: asked.wanted}, asked.solution)
        return nth_of_split("mcp", self._tasks, number, split)

    def begin(self, task: McpTask) -> Opening:
        """Raises EnvError if a server does not start, SandboxError without an image or a backend."""
        sandbox = self._fresh_sandbox()
        sandbox.put({**self._files, **task.files})
        try:
            for spec in self._specs:
                self._servers.append(Server(spec, sandbox))
            for server in self._servers:
                server.wait_ready(self._seconds[0])
            self._offered = offer(self._servers)
        except BaseException:
            self._stop_servers()
            raise
        tools = tuple(described(name, tool) for name, (_, tool) in self._offered.items())
        return Opening(({"role": "user", "content": task.instruction},), tools)

    def act(self, action: Message) -> Answer:
        made = calls(action, self.tools)
        if made:
            return Answer(tuple(call.reply(call.problem or self._do(call)) for call in made))
        if "<tool_call>" in str(action.get("content")):
            return Answer(({"role": "user", "content": BROKEN},))
        return Answer(terminated=True)

    def _do(self, call: Call) -> str:
        server, tool = self._offered[call.name]
        return server.call(tool.name, call.arguments, self._seconds[1])

    def grade(self) -> float:
        """Raises SandboxError if the sandbox itself is gone."""
        sandbox = self._kept.sandbox
        if self.task is None or sandbox is None:
            raise EnvError("mcp: there is no task; call reset first")
        self._stop_servers()
        return 1.0 if all(_holds(sandbox, *each) for each in self.task.wanted.items()) else -1.0

    def gold(self, task: McpTask) -> Sequence[Message]:
        """Raises EnvError for a task without a solution."""
        if not task.solution:
            raise EnvError(f'task {task.id} comes without a solution; add "gold": [["tool", {{}}], …]')
        acts = [message_of(name, **arguments) for name, arguments in task.solution]
        return [*acts, {"role": "assistant", "content": "Done."}]

    @classmethod
    def reconcile(cls, run: str) -> None:
        reconcile(run)

    def close(self) -> None:
        self._stop_servers()
        self._kept.close()

    def _stop_servers(self) -> None:
        self._offered = {}
        while self._servers:
            self._servers.pop().close()

    def _fresh_sandbox(self) -> Sandbox:
        """The one there is, back at its image, or a new one."""
        self._stop_servers()
        if (sandbox := self._kept.again()) is not None:
            return sandbox
        image = self._image or python_image(self._packages)
        return self._kept.open(SandboxSpec(image=image, memory=self._memory, limits=self._limits))


def _holds(sandbox: Sandbox, path: str, wanted: Any) -> bool:
    """Whether a file is there and holds what is wanted of it."""
    if not sandbox.exec(["test", "-f", path]).ok:
        return wanted is None
    if wanted is None:
        return False
    text = sandbox.read_file(path, MAX_FILE).decode("utf-8", "replace")
    if isinstance(wanted, str):
        return text.rstrip() == wanted.rstrip()
    with suppress(ValueError, RecursionError):
        return json.loads(text) == wanted
    return False


def read_tasks(file: Path) -> list[McpTask]:
    """Raises EnvError with the place of what is wrong."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        tasks = [_task(each) for each in found]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = '[{"id": "a", "instruction": "…", "files": {}, "wanted": {"/a.txt": "…"}, "gold": []}]'
        raise EnvError(f"mcp: {file} holds no tasks of the form {expected}: {type(error).__name__}: {error}") from None
    if not tasks or len({task.id for task in tasks}) < len(tasks):
        raise EnvError(f"mcp: {file} must hold at least one task, and no two of the same id")
    return tasks


def _task(given: Mapping[str, Any]) -> McpTask:
    files = {path: content.encode() for path, content in given.get("files", {}).items()}
    gold = tuple((str(name), dict(arguments)) for name, arguments in given.get("gold", ()))
    wanted = dict(given["wanted"])
    if not wanted:
        raise ValueError(f"task {given['id']}: wanted is empty, so that everything would solve it")
    return McpTask(str(given["id"]), str(given["instruction"]), files, wanted, gold)
