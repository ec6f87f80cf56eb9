"""A question, a Python interpreter to work it out with, an answer that is verified (as in ReTool, arXiv:2504.11536).

    user: What is the remainder when 7^4321 is divided by 997?
    assistant: python("pow(7, 4321, 997)") ─► 431     "<answer>431</answer>"

The code runs in a sandbox without network; the answer, a text, is verified outside of it (`verifying`). Knows both.
Ignores how questions are made (`problems`) and how the interpreter is kept alive (`interpreter`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from clawrl.errors import EnvError
from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, calls, message_of, split_of
from clawrl.types import Message, Tool
from envs.sandbox import GIB, Kept, Sandbox, SandboxSpec, reconcile
from envs.toolcall.image import python_image
from envs.toolcall.interpreter import Interpreter
from envs.toolcall.problems import DATASETS, INTEGERS, Problem, check_sources, make_problem, read_problems
from envs.toolcall.verifying import VERIFIER

DISK = GIB // 4
HOW = "\n\nWork it out with the python tool. End with the answer alone between <answer> and </answer>."
NEITHER = "error: neither a call of python nor an answer; end with <answer>…</answer>"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def _tool(seconds: float, packages: Sequence[str]) -> Tool:
    have = f" {', '.join(packages)} can be imported." if packages else ""
    about = (
        f"Run Python. Names stay from call to call. Shows what is printed and the value of the last expression.{have} "
        f"Stopped after {seconds:g} s."
    )
    parameters = {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": "python", "description": about, "parameters": parameters}}


class PythonEnv(AgentEnv[Problem]):
    """datasets      of reasoning-gym, by name, and "integers", our own; taken in turn
    problems      a file of lines {"question", "answer"}: then its problems alone
    packages      installed here, which the code may import       image  another than `base` with Python and these
    cell_seconds  until a call is stopped                         memory bytes of the interpreter
    backend, limits, run: the sandbox's
    """

    name = "python"

    def __init__(
        self,
        datasets: Sequence[str] = DATASETS,
        problems: str | Path | None = None,
        packages: Sequence[str] = ("numpy", "sympy"),
        image: str | None = None,
        cell_seconds: float = 10.0,
        memory: int = 4 * GIB,
        backend: str = "auto",
        limits: Literal["enforce", "best_effort"] = "enforce",
        run: str = "local",
    ) -> None:
        """Raises EnvError for a data set that there is not or that is not safe to score, or a file that is none."""
        super().__init__()
        self._sources = tuple(datasets)
        self._problems = None if problems is None else read_problems(Path(problems))
        if self._problems is None:
            check_sources(self._sources)
        self._packages, self._image, self._memory = tuple(packages), image, memory
        self._seconds = cell_seconds
        self._limits: Literal["enforce", "best_effort"] = limits
        self._kept = Kept(backend, run)
        self._interpreter: Interpreter | None = None
        self._answer: str | None = None

    def make_task(self, number: int, split: Split) -> Problem:
        """Raises EnvError if there is no problem in this split."""
        if self._problems is None:
            return make_problem(self._sources, number, split)
        found = [each for each in self._problems if split_of(each.id) == split]
        if not found:
            raise EnvError(f"python: none of the {len(self._problems)} problems is in split {split}; add some")
        return found[number % len(found)]

    def begin(self, task: Problem) -> Opening:
        """Raises SandboxError without an image or a backend, EnvError if no Python starts in it."""
        self._answer = None
        self._interpreter = Interpreter(self._fresh_sandbox(), self._memory)
        return Opening(({"role": "user", "content": task.question + HOW},), (_tool(self._seconds, self._packages),))

    def act(self, action: Message) -> Answer:
        assert self._interpreter is not None
        made = calls(action, self.tools)
        if made:
            run, seconds = self._interpreter.run, self._seconds
            return Answer(tuple(call.reply(call.problem or run(call.arguments["code"], seconds)) for call in made))
        found = _ANSWER.findall(str(action.get("content") or ""))
        if not found:
            return Answer(({"role": "user", "content": NEITHER},))
        self._answer = found[-1].strip()
        return Answer(terminated=True)

    def grade(self) -> float:
        """The verifier's score in [0, 1], spread over [-1, 1]; -1 without an answer. Raises EnvError without it."""
        task = self.task
        if task is None:
            raise EnvError("python: there is no task; call reset first")
        self._stop()
        if self._answer is None:
            return -1.0
        if self._problems is not None or task.source == INTEGERS:
            return 2.0 * VERIFIER.score(self._answer, gold=task.answer) - 1.0
        return 2.0 * VERIFIER.score(self._answer, source=task.source, seed=task.seed) - 1.0

    def gold(self, task: Problem) -> Sequence[Message]:
        """Raises EnvError for a data set that gives no answers."""
        if task.answer is None:
            raise EnvError(f"task {task.id} comes without an answer")
        show = message_of("python", code=f"print({task.answer!r})")
        return [show, {"role": "assistant", "content": f"<answer>{task.answer}</answer>"}]

    @classmethod
    def reconcile(cls, run: str) -> None:
        reconcile(run)

    def close(self) -> None:
        self._stop()
        self._kept.close()

    def _stop(self) -> None:
        if self._interpreter is not None:
            self._interpreter.close()
            self._interpreter = None

    def _fresh_sandbox(self) -> Sandbox:
        """The one there is, back at its image, or a new one."""
        self._stop()
        if (sandbox := self._kept.again()) is not None:
            return sandbox
        image = self._image or python_image(self._packages)
        return self._kept.open(SandboxSpec(image=image, memory=self._memory + GIB // 4, disk=DISK, limits=self._limits))
