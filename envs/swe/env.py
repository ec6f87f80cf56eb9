r"""Repair a repository in a sandbox; the git diff is judged in another one by tests that the agent never sees.

    user: the issue
    assistant: bash("grep -rn parse src") ─► …     bash("sed -i … src/a.py && python3 -m pytest -q") ─► …     submit()
    git diff against the base commit ─► a fresh sandbox: tests put back, hidden tests brought in, run ─► [-1, 1]

Knows tasks and two sandboxes: the agent's, and the one that judges. Ignores how many turns there are, how long an
observation may be, and how a log is read (`grading`). The agent's repository has one commit, the base: nothing of what
came later, and neither tests nor solution are in its sandbox.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from clawrl.errors import EnvError, SandboxError
from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, calls, message_of, nth_of_split
from clawrl.types import Message, Tool
from envs.sandbox import GIB, Kept, Sandbox, SandboxSpec, Shell, make_folders, reconcile
from envs.swe.grading import GIT_S, MAX_PATCH, Report, judge
from envs.swe.image import prepare
from envs.swe.task import REPO, SweTask, read_tasks

OWN_TASKS = Path(__file__).with_name("tasks")
COMMAND_S = 60.0
MAX_COMMAND_S = 300.0

TOOLS: tuple[Tool, ...] = (
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": f"Run a command in your shell, which starts in {REPO}; directory and variables stay. "
            f"There is no input. A command that takes longer than {COMMAND_S:.0f} s (or `seconds`) is stopped.",
            "parameters": {
                "type": "object",
                "properties": {
                    "command": {"type": "string"},
                    "seconds": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_COMMAND_S},
                },
                "required": ["command"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "submit",
            "description": "Say that the issue is resolved. Your changes are then tested, and the episode ends.",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    },
)

INSTRUCTION = f"""\
The repository in {REPO} has this issue:

{{statement}}

Change its sources so that the issue is resolved and nothing else breaks, then call submit. Hidden tests decide. What \
you change in tests and in their configuration is put back before they run.
"""
NO_CALL = (
    'error: nothing was done; call a tool, such as bash {"command": "ls"}, or submit {} when the issue is resolved'
)

CONCEAL = rf"""
set -e
cd {REPO}
git ls-files -z >/tmp/tracked
git ls-files -z -o | tr '\n\0' '\001\n' | sed 's/[\\*?[]/\\&/g; s/ $/\\ /; s|^|/|' | tr '\001' '?' >/tmp/untracked
rm -rf .git
git init -q .
mkdir -p .git/info
cat /tmp/untracked >>.git/info/exclude
git config user.name clawrl && git config user.email clawrl@localhost
git --literal-pathspecs add -f --pathspec-from-file=/tmp/tracked --pathspec-file-nul
git commit -q --allow-empty -m base
rm -f /tmp/tracked /tmp/untracked
git rev-parse HEAD
"""
"""One commit takes the place of the history, so that no later one can be found in any corner of it.

What the image has beside it, untracked, is ignored: a patch that made it anew would not apply where it is.
"""

DIFF = f"""
set -e
cd {REPO}
export GIT_INDEX_FILE="$(mktemp -u)"
patch="$(mktemp)"
git read-tree "$1"
git add -A
git diff --cached --binary --no-color --no-ext-diff --no-textconv --src-prefix=a/ --dst-prefix=b/ "$1" -- . \
':(exclude,glob)**/__pycache__/**' ':(exclude,glob)**/.pytest_cache/**' ':(exclude,glob)**/*.pyc' >"$patch"
echo "$patch"
"""
"""The work tree against the base commit, new files too, whatever the agent committed; an index of its own."""


class SweEnv(AgentEnv[SweTask]):
    """folder: a task repository of swebench's layout; None is the own tasks. backend and limits: the sandboxes'."""

    name = "swe"

    def __init__(
        self,
        folder: str | Path | None = None,
        backend: str = "auto",
        limits: Literal["enforce", "best_effort"] = "enforce",
        run: str = "local",
    ) -> None:
        super().__init__()
        self._tasks = read_tasks(OWN_TASKS if folder is None else Path(folder))
        self._desk, self._bench = Place(backend, limits, run), Place(backend, limits, run)  # the agent's, the judge's
        self._shell: Shell | None = None
        self._base = ""
        self._report: Report | None = None
        self._sound: set[str] = set()  # tasks whose gold patch was seen to pass

    def make_task(self, number: int, split: Split) -> SweTask:
        """Raises EnvError if there is no task in this split."""
        return nth_of_split("swe", self._tasks, number, split)

    def begin(self, task: SweTask) -> Opening:
        """Raises SandboxError without an image or a backend, EnvError if the image has no repository."""
        self._close_shell()
        self._report = None
        done = self._desk.fresh(task.image).exec(CONCEAL, GIT_S, merge=False)
        if not done.ok:
            raise EnvError(f"task {task.id}: its image has no git repository at {REPO}: {done.errors[-300:]}")
        self._base = done.output.strip()
        return Opening(({"role": "user", "content": INSTRUCTION.format(statement=task.statement)},), TOOLS)

    def act(self, action: Message) -> Answer:
        made = calls(action, self.tools)
        if not made:
            return Answer(({"role": "user", "content": NO_CALL},))
        messages = []
        for call in made:
            if call.name == "submit" and call.problem is None:
                return Answer((*messages, call.reply("submitted")), terminated=True, info=self.report().facts())
            messages.append(call.reply(call.problem or self._bash(**call.arguments)))
        return Answer(tuple(messages))

    def grade(self) -> float:
        """Raises EnvError if the task's own gold patch does not pass: then nothing is said about the agent."""
        return self.report().outcome

    def gold(self, task: SweTask) -> Sequence[Message]:
        command = f"git apply <<'END_OF_GOLD'\n{task.gold_patch.rstrip(chr(10))}\nEND_OF_GOLD"
        return [message_of("bash", command=command), message_of("submit")]

    @classmethod
    def reconcile(cls, run: str) -> None:
        """Remove the sandboxes that killed processes of a run left on this machine."""
        reconcile(run)

    def close(self) -> None:
        self._close_shell()
        self._desk.close()
        self._bench.close()

    @property
    def sandbox(self) -> Sandbox:
        """The agent's, for scaffolds that bring their own tools. Raises EnvError before the first reset."""
        return self._desk.sandbox()

    def report(self) -> Report:
        """How the work tree as it is now fares; asked for again, the same."""
        if self._report is None:
            assert self.task is not None
            self._report = judge(self.task, self._submission(), self._bench.fresh(self.task.image))
            if self._report.status in ("timeout", "no_report"):
                self._demand_sound(self.task)
        return self._report

    def _demand_sound(self, task: SweTask) -> None:
        """Tests that hang or crash are the patch's fault only if they do not so with the gold patch."""
        if task.id not in self._sound:
            found = judge(task, task.gold_patch.encode(), self._bench.fresh(task.image))
            if found.status != "resolved":
                raise EnvError(
                    f"task {task.id}: its own gold patch does not pass ({found.status}); mend eval.sh or tests.json. "
                    f"The tests said last: {found.log[-300:]!r}"
                )
            self._sound.add(task.id)

    def _submission(self) -> bytes:
        """The patch; empty where the agent broke its repository beyond that, or made it too large to be one."""
        done = self.sandbox.exec(["sh", "-c", DIFF, "sh", self._base], GIT_S, cwd="/", merge=False)
        if not done.ok:
            return b""
        patch = self.sandbox.read_file(done.output.strip(), MAX_PATCH)
        return b"" if len(patch) >= MAX_PATCH else patch

    def _bash(self, command: str, seconds: float = COMMAND_S) -> str:
        if "\0" in command:
            return "error: bash: the command has a NUL character in it"
        if self._shell is None or not self._shell.alive:
            self._close_shell()
            make_folders(self.sandbox, REPO)
            self._shell = self.sandbox.shell(cwd=REPO)
        done = self._shell.run(command, seconds)
        end = "" if done.ok else f"[exit status {done.code}]"
        end = f"[stopped after {seconds:g} s]" if done.timed_out else end
        return "\n".join(filter(None, (done.output.strip("\n"), end))) or "[no output]"

    def _close_shell(self) -> None:
        if self._shell is not None:
            with suppress(SandboxError):
                self._shell.close()
            self._shell = None


class Place:
    """Where sandboxes for repositories stand, one after the other, each as its image has it."""

    def __init__(self, backend: str, limits: Literal["enforce", "best_effort"], run: str) -> None:
        self._kept = Kept(backend, run)
        self._limits: Literal["enforce", "best_effort"] = limits

    def fresh(self, image: str) -> Sandbox:
        spec = SandboxSpec(
            image, 2 * GIB, disk=2 * GIB, timeout=COMMAND_S, limits=self._limits, workdir=REPO,
            env={"PAGER": "cat", "GIT_PAGER": "cat", "TERM": "dumb"},
        )  # fmt: skip
        if (sandbox := self._kept.again(spec)) is not None:
            return sandbox
        prepare(image)
        return self._kept.open(spec)

    def sandbox(self) -> Sandbox:
        if self._kept.sandbox is None:
            raise EnvError("swe: there is no sandbox; call reset first")
        return self._kept.sandbox

    def close(self) -> None:
        self._kept.close()
