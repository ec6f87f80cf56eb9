"""Demonstrations of the terminal's drills for the tiny model's corpus. Deliberately noisy, as those of `tools`.

Knows how people get `envs/terminal/tasks/drills.py` wrong, and what a shell says to it. Runs no command.
"""

from __future__ import annotations

import random
from typing import Literal

from clawrl.types import Message
from envs.terminal.tasks.drills import Drill, drill_of, words
from jobs.tiny_model.tools import call_message

ShellFlaw = Literal["none", "wrong", "idle", "talk"]
SHELL_FLAW_SHARES: dict[ShellFlaw, float] = {"none": 0.45, "wrong": 0.33, "idle": 0.14, "talk": 0.08}
NOTHING = "[no output]"
ABSENT = "{}: {}: No such file or directory\n[exit status 1]"

WRONG: dict[str, tuple[tuple[str, str], ...]] = {
    "write": (("echo '{b}' > '{a}'", NOTHING), ("touch '{b}'", NOTHING), ("cat '{b}'", ABSENT.format("cat", "{b}"))),
    "append": (("echo '{a}' > '{b}'", NOTHING), ("echo '{b}' >> '{a}'", NOTHING), ("cat '{b}'", "{c}")),
    "copy": (
        ("mv '{a}' '{b}'", NOTHING),
        ("cp '{b}' '{a}'", "cp: cannot stat '{b}': No such file or directory\n[exit status 1]"),
        ("cat '{a}'", "{c}"),
    ),
    "rename": (
        ("cp '{a}' '{b}'", NOTHING),
        ("mv '{b}' '{a}'", "mv: cannot stat '{b}': No such file or directory\n[exit status 1]"),
        ("cat '{a}'", "{c}"),
    ),
    "remove": (("rm '{b}'", NOTHING), ("rm '{a}' '{b}'", NOTHING), ("cat '{a}'", "{c}")),
    "folder": (("touch '{a}'", NOTHING), ("echo '{a}'", "{a}")),
    "sort": (
        ("cat '{a}' > '{b}'", NOTHING),
        ("sort '{b}' > '{a}'", "sort: cannot read: {b}: No such file or directory\n[exit status 2]"),
    ),
    "count": (
        ("wc -l '{a}' > '{b}'", NOTHING),
        ("cat '{a}' > '{b}'", NOTHING),
        ("wc -l < '{b}' > '{a}'", ABSENT.format("bash", "{b}")),
    ),
    "remove named": (("rm '{a}'", NOTHING), ("cat '{a}' > '{c}'", NOTHING)),
    "make named": (
        ("mkdir '{c}'", NOTHING),
        ("mkdir '{a}'", "mkdir: cannot create directory '{a}': File exists\n[exit status 1]"),
    ),
}
"""By kind: commands that do not do it, and what the shell says."""


def demonstrate_drill(rng: random.Random) -> list[Message]:
    """An episode, from the instruction to `submit`, with a flaw in it or none."""
    names = words(rng, 3)
    drill = drill_of(names, rng)
    flaw = rng.choices(list(SHELL_FLAW_SHARES), list(SHELL_FLAW_SHARES.values()))[0]
    messages: list[Message] = [{"role": "user", "content": drill.instruction}]
    if flaw == "talk":
        return [*messages, {"role": "assistant", "content": rng.choice(("Done.", "It is done."))}]
    if flaw == "wrong":
        command, said = wrong_step(drill, names, rng)
        messages += _ran(command, said)
    if flaw == "none" or (flaw == "wrong" and messages[-1]["content"] != NOTHING and rng.random() < 0.4):
        for command, said in right_steps(drill, names):
            messages += _ran(command, said)
    return [*messages, call_message("submit", {})]


def right_steps(drill: Drill, names: list[str]) -> list[tuple[str, str]]:
    """The commands that do it, and what the shell says."""
    return list(zip(drill.commands, (names[1], NOTHING)[-len(drill.commands) :], strict=True))


def wrong_step(drill: Drill, names: list[str], rng: random.Random) -> tuple[str, str]:
    """A command that does not, and what the shell says."""
    a, b, c = names
    command, said = rng.choice(WRONG[drill.kind])
    return command.format(a=a, b=b, c=c), said.format(a=a, b=b, c=c)


def _ran(command: str, said: str) -> list[Message]:
    return [call_message("run", {"command": command}), {"role": "tool", "content": said}]
