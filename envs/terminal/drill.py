"""The terminal for the built-in model: two tools in few words, and tasks of one line.

user: Rename the file 'zorp' to 'kimal'.
assistant: run("mv 'zorp' 'kimal'") ─► [no output]     submit()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from clawrl.rollout.env import Split, message_of
from clawrl.types import Message, Tool
from envs.terminal.env import TerminalEnv, tool
from envs.terminal.task import TerminalTask
from envs.terminal.tasks.drills import make_drill

TOOLS: tuple[Tool, ...] = (
    tool("run", "Run a shell command.", ["command"], command={"type": "string"}),
    tool("submit", "Say that it is done."),
)


class DrillEnv(TerminalEnv):
    """Tasks of `tasks/drills.py`. The sandbox's options are TerminalEnv's."""

    name = "drill"
    offered: ClassVar[tuple[Tool, ...]] = TOOLS

    def make_task(self, number: int, split: Split) -> TerminalTask:
        return make_drill(number, split)

    def gold(self, task: TerminalTask) -> Sequence[Message]:
        commands = task.solution.splitlines()[2:]  # after `set -e` and `cd`
        return [*(message_of("run", command=command) for command in commands), message_of("submit")]
