"""One-line tasks on files with made-up names, small enough for the built-in model: a command or two, then submit.

Names stand in single quotes in the instruction as in the command, so that a model this small can copy their tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from clawrl.rollout.env import Split, split_of
from envs.terminal.task import TerminalTask
from envs.terminal.tasks.family import Made, as_task, lines_of
from envs.toolcall.stock import invented_word


@dataclass(frozen=True, slots=True)
class Drill:
    """What to do, the commands that do it, and the world before and after.

    Of two commands the first prints the name that the second needs.
    """

    kind: str
    instruction: str
    commands: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    expect: Mapping[str, str] = field(default_factory=dict)
    goals: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()


def _write(a: str, b: str, c: str, rng: random.Random) -> Drill:
    return Drill("write", f"Write '{a}' into the file '{b}'.", (f"echo '{a}' > '{b}'",), expect={b: a})


def _append(a: str, b: str, c: str, rng: random.Random) -> Drill:
    return Drill(
        "append", f"Add '{a}' to the end of the file '{b}'.", (f"echo '{a}' >> '{b}'",),
        {b: f"{c}\n"}, {b: f"{c}\n{a}"},
    )  # fmt: skip


def _copy(a: str, b: str, c: str, rng: random.Random) -> Drill:
    return Drill(
        "copy", f"Copy the file '{a}' to '{b}'.", (f"cp '{a}' '{b}'",), {a: c}, {b: c}, guards=(f"[ -f {a} ]",)
    )


def _rename(a: str, b: str, c: str, rng: random.Random) -> Drill:
    gone = (f"[ -f {b} ] && [ ! -e {a} ] && grep -qx {c} {b}",)
    return Drill("rename", f"Rename the file '{a}' to '{b}'.", (f"mv '{a}' '{b}'",), {a: f"{c}\n"}, goals=gone)


def _remove(a: str, b: str, c: str, rng: random.Random) -> Drill:
    instruction = f"Remove the file '{a}', not '{b}'."
    return Drill("remove", instruction, (f"rm '{a}'",), {a: c, b: c}, goals=(f"[ ! -e {a} ]",), guards=(f"[ -f {b} ]",))


def _folder(a: str, b: str, c: str, rng: random.Random) -> Drill:
    return Drill("folder", f"Make the folder '{a}'.", (f"mkdir '{a}'",), goals=(f"[ -d {a} ]",))


def _sort(a: str, b: str, c: str, rng: random.Random) -> Drill:
    lines = words(rng, 3)
    lines = lines if lines != sorted(lines) else lines[::-1]
    return Drill(
        "sort", f"Sort the lines of '{a}' into '{b}'.", (f"sort '{a}' > '{b}'",),
        {a: lines_of(lines)}, {b: lines_of(sorted(lines))},
    )  # fmt: skip


def _count(a: str, b: str, c: str, rng: random.Random) -> Drill:
    lines = words(rng, rng.randint(2, 9))
    return Drill(
        "count", f"Write how many lines '{a}' has into '{b}'.", (f"wc -l < '{a}' > '{b}'",),
        {a: lines_of(lines)}, {b: str(len(lines))},
    )  # fmt: skip


def _remove_named(a: str, b: str, c: str, rng: random.Random) -> Drill:
    return Drill(
        "remove named", f"The file '{a}' names a file. Remove that one.", (f"cat '{a}'", f"rm '{b}'"),
        {a: f"{b}\n", b: c}, goals=(f"[ ! -e {b} ]",), guards=(f"[ -f {a} ]",),
    )  # fmt: skip


def _make_named(a: str, b: str, c: str, rng: random.Random) -> Drill:
    return Drill(
        "make named", f"The file '{a}' names a folder. Make it.", (f"cat '{a}'", f"mkdir '{b}'"),
        {a: f"{b}\n"}, goals=(f"[ -d {b} ]",),
    )  # fmt: skip


KINDS: tuple[Callable[[str, str, str, random.Random], Drill], ...] = (
    _write, _append, _copy, _rename, _remove, _folder, _sort, _count, _remove_named, _make_named,
)  # fmt: skip


def draw_drill(rng: random.Random) -> Drill:
    """A drill of any kind."""
    return drill_of(words(rng, 3), rng)


def drill_of(names: Sequence[str], rng: random.Random) -> Drill:
    """A drill of any kind about three different names."""
    a, b, c = names
    return rng.choice(KINDS)(a, b, c, rng)


def make_drill(number: int, split: Split) -> TerminalTask:
    """Task `number` of a split; its solution is the drill's commands."""
    rng = random.Random(f"drill/{number}")
    while True:
        drill = draw_drill(rng)
        made = Made(
            drill.instruction,
            "\n".join(drill.commands),
            files=drill.files,
            expect=drill.expect,
            goals=drill.goals,
            guards=drill.guards,
        )
        task = as_task(f"drill/{drill.kind.replace(' ', '_')}", made)
        if split_of(task.id) == split:
            return task


def words(rng: random.Random, count: int) -> list[str]:
    """Made-up words, all different."""
    found: list[str] = []
    while len(found) < count:
        word = invented_word(rng, 2)
        if word not in found:
            found.append(word)
    return found
