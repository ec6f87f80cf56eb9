"""What a family of own tasks is, and how one instance of it becomes a TerminalTask with tests of its own.

A family is a function of a random generator: it gives instruction, files, solution and check. Its goals all fail in the
untouched world and its guards hold there, so that doing nothing scores -1 and the solution 1.
"""

from __future__ import annotations

import hashlib
import random
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from envs.terminal.task import REWARD, TerminalTask

Difficulty = Literal["easy", "medium", "hard"]
WORK = "/work"
CHECK_S = 20
REACHED = 7
"""The exit status of a check that came to its own end."""

_TEST = """cd /work
passed=0
same() {{ [ ! -L "$1" ] && [ -f "$1" ] && [ "$(cat "$1")" = "$(cat "/tests/expected/$2")" ]; }}
export -f same
holds() {{ timeout {seconds} bash -c "$1" </dev/null >/dev/null 2>&1; }}
goal() {{ if holds "$1"; then passed=$((passed + 1)); echo "ok      $1"; else echo "not yet $1"; fi; }}
guard() {{ if ! holds "$1"; then echo "broken  $1"; echo 0 > {reward}; exit 0; fi; }}
{lines}
python3 -I -c "print($passed / {goals})" > {reward}
"""


@dataclass(frozen=True)
class Made:
    """One instance. `expect`: file below /work → its text (the end's empty lines do not count); each is a goal.

    goals and guards are bash commands run in /work that succeed where they hold.
    """

    instruction: str
    solution: str
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    setup: str = ""
    expect: Mapping[str, str] = field(default_factory=dict)
    goals: Sequence[str] = ()
    guards: Sequence[str] = ()
    difficulty: Difficulty = "easy"


Family = Callable[[random.Random], Made]


def as_task(family: str, made: Made) -> TerminalTask:
    """The id tells what the task holds: two instances that are alike have one id, hence one split."""
    files = {f"work/{name}": _bytes(content) for name, content in made.files.items()}
    numbered = list(enumerate(made.expect.items()))
    lines = [
        *(f"guard {shlex.quote(each)}" for each in made.guards),
        *(f"goal {shlex.quote(f'same {shlex.quote(name)} {number}')}" for number, (name, _) in numbered),
        *(f"goal {shlex.quote(each)}" for each in made.goals),
    ]
    goals = len(made.expect) + len(made.goals)
    test = _TEST.format(seconds=CHECK_S, reward=REWARD, lines="\n".join(lines), goals=goals)
    tests = {f"tests/expected/{number}": text.encode() for number, (_, text) in numbered}
    digest = hashlib.sha256(repr((made.instruction, made.setup, sorted(files.items()))).encode()).hexdigest()
    return TerminalTask(
        id=f"{family}/{digest[:16]}",
        instruction=made.instruction,
        workdir=WORK,
        files=files,
        setup=made.setup,
        tests={**tests, "tests/test.sh": test.encode()},
        solution=f"set -e\ncd {WORK}\n{made.solution}",
        difficulty=made.difficulty,
    )


def holds_in(program: str) -> str:
    """A check by Python statements that import modules of /work, none of which can end it as if it had succeeded."""
    begin = f"import sys; sys.path.insert(0, '{WORK}')"
    return f'python3 -c "{begin}; {program}; sys.exit({REACHED})"; [ $? = {REACHED} ]'


def lines_of(lines: Sequence[object]) -> str:
    return "".join(f"{line}\n" for line in lines)


def unchanged(name: str, content: str | bytes) -> str:
    """A guard: the file still holds exactly this."""
    digest = hashlib.sha256(_bytes(content)).hexdigest()
    return f"echo {shlex.quote(f'{digest}  {name}')} | sha256sum -c -"


def _bytes(content: str | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.encode()
