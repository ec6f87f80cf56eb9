"""Which runs an evaluation is made of: arms and seeds, and by what it is known that one was made already. Pure.

An arm is a name and overrides of the config. Ignores what a run does and what comes of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from clawrl.config import Config
from clawrl.errors import ConfigError

PROCESS_WEIGHT = 0.3
"""Of the arm `process`, where neither the command nor the config says one."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting under comparison."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All runs: every arm with every seed. The first arm is the one that others are held against."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    pools: tuple[str, ...]
    versions: int
    minutes: float
    tasks: int

    @property
    def runs(self) -> list[tuple[Arm, int]]:
        """In the order they are made: a seed's arms one after the other, so that what was made can be compared."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def arms_of(text: str, config: Config) -> tuple[Arm, ...]:
    """Words with commas between: `outcome`, `process` or `process:0.3`, or `name=section.key:value`.

    Raises ConfigError for a word that is none of them.
    """
    arms = tuple(_arm(word.strip(), config) for word in text.split(","))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"--arms {text}: two have the same name; give them others, as in slow=trainer.learning_rate:1e-4"
        )
    return arms


def _arm(word: str, config: Config) -> Arm:
    name, own, setting = word.partition("=")
    key, _, value = (setting if own else word).partition(":")
    if own and _NAME.fullmatch(name) and key and value:
        return Arm(name, (f"{key}={value}",))
    if not own and word == "outcome":
        return Arm(word, ("learning.process_weight=0",))
    if not own and key == "process":
        return Arm(word.replace(":", "-"), (f"learning.process_weight={_weight(word, value, config)}",))
    raise ConfigError(f"--arms {word}: use outcome, process, process:0.3, or name=section.key:value")


def _weight(word: str, value: str, config: Config) -> float:
    try:
        weight = float(value) if value else config.learning.process_weight or PROCESS_WEIGHT
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise ConfigError(f"--arms {word}: the weight of process rewards must be a number above 0")
    return weight


def seeded(plan: Plan, seed: int) -> list[str]:
    """The overrides that make a run another one: the trainer's shuffling, and the order of the pools' tasks."""
    return [f"trainer.seed={seed}", *(f"pools.{index}.seed={seed}" for index in range(len(plan.pools)))]


def digest(config: Config, plan: Plan, commit: str) -> str:
    """What a run's result depends on besides arm and seed: where it is kept and which port it has does not count."""
    tree = config.model_dump(mode="json", exclude={"run_root": True, "run": True, "gateway": True})
    facts = [tree, plan.versions, plan.minutes, plan.tasks, commit]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:10]


def folder_name(arm: Arm, seed: int) -> str:
    """Of a run's results. Arms of one name with other overrides are others."""
    mark = hashlib.sha256("\n".join(arm.overrides).encode()).hexdigest()[:6]
    return f"{arm.name}-{mark}-seed{seed}"


def parse_seeds(number: int) -> tuple[int, ...]:
    """So many seeds from 0. Raises ConfigError."""
    if number < 1:
        raise ConfigError(f"--seeds {number}: give at least 1")
    return tuple(range(number))


def names_of(runs: Sequence[tuple[Arm, int]]) -> str:
    return ", ".join(f"{arm.name} seed {seed}" for arm, seed in runs)
