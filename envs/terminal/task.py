"""One type for every terminal task, and how the verdict is read from what its tests leave behind.

Knows what a task holds and what tests write. Ignores where tasks come from, sandboxes and agents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clawrl.errors import EnvError
from clawrl.rollout.env import Task

REWARD = "/logs/verifier/reward.txt"
REWARD_JSON = "/logs/verifier/reward.json"
MIB = 1 << 20

_RESULT = re.compile(r"^(PASSED|FAILED|ERROR)\s+(\S.*?)(?:\s+-\s.*)?$", re.MULTILINE)
_TOTALS = re.compile(r"(\d+) (passed|failed|errors?)\b")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class TerminalTask(Task):
    """What the agent reads, the world it finds, and what proves that it is done.

    files     name → content, put into the sandbox before the agent begins
    setup     shell script run once after that
    tests     name → content, put into the sandbox only after the agent has stopped
    verify    the command that runs them
    verdict   "reward": a number from 0 to 1 in REWARD; "pytest": the share of passed tests in the output
    solution  shell script that solves it; its own files come from solution_files
    """

    instruction: str
    image: str = "base"
    workdir: str | None = "/work"
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    setup: str = ""
    tests: Mapping[str, bytes | Path] = field(default_factory=dict)
    verify: str = "bash /tests/test.sh"
    verdict: Literal["reward", "pytest"] = "reward"
    solution: str = ""
    solution_files: Mapping[str, bytes | Path] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    verify_env: Mapping[str, str] = field(default_factory=dict)
    memory: int = 1024 * MIB
    cpus: float = 1.0
    disk: int = 1024 * MIB
    verify_timeout: float = 120.0
    difficulty: str = "easy"


def reward_of(task: str, text: str) -> float:
    """The verdict in [-1, 1] that a reward file gives. Raises EnvError for anything but a number from 0 to 1."""
    try:
        found = json.loads(text)
        share = float(found["reward"] if isinstance(found, dict) else found)
    except (ValueError, TypeError, KeyError) as error:
        raise EnvError(
            f"task {task}: its tests wrote {text[:80]!r} as reward; write a number from 0 to 1 to {REWARD}"
        ) from error
    if not 0 <= share <= 1:
        raise EnvError(f"task {task}: its tests wrote the reward {share}; it must be from 0 to 1")
    return 2 * share - 1


def pass_rate_of(task: str, output: str) -> float:
    """2 * (share of passed tests) - 1, read from pytest's summary; what is printed before it is not pytest's word.

    Raises EnvError if no test ran.
    """
    text = _COLOUR.sub("", output).replace("\r", "").rpartition("short test summary info")[2]
    by_name = {name: word for word, name in _RESULT.findall(text)}
    passed = sum(word == "PASSED" for word in by_name.values())
    total = len(by_name)
    if not passed:  # without -rA only failures have lines; the last totals count the rest
        last = next((line for line in reversed(text.splitlines()) if _TOTALS.search(line)), "")
        counts = {word: int(number) for number, word in _TOTALS.findall(last)}
        passed, total = counts.get("passed", 0), max(total, sum(counts.values()))
    if not total:
        raise EnvError(
            f"task {task}: its tests ran none that pytest reports; run pytest with -rA. They said: {output[-300:]!r}"
        )
    return 2 * passed / total - 1
