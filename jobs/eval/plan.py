"""Which runs an evaluation is made of: arms and seeds, and by what it is known that one was made already. Pure.

An arm is a name and overrides of the config. Ignores what a run does and what comes of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from clawrl.config import Config
from clawrl.errors import ConfigError

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
    measures: tuple[str, ...]  # what is measured before and after: pools, or sides of a reply
    budget: tuple[str, ...]  # words of every run's command line
    limits: str  # the same, told
    what: str  # what a measure is a share of
    along: str  # what learning curves go along
    figures: tuple[str, ...] = ()  # what is one number of each run, and no share
    others_along: Mapping[str, str] = field(default_factory=dict)  # of figures whose curves go along something else

    @property
    def runs(self) -> list[tuple[Arm, int]]:
        """In the order they are made: a seed's arms one after the other, so that what was made can be compared."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


def arms_of(text: str, known: Callable[[str], Sequence[str] | None], words: str) -> tuple[Arm, ...]:
    """Words with commas between: one that `known` has overrides for (`words` lists them), or `name=section.key:value`.

    Raises ConfigError for a word that is none of them.
    """
    arms = tuple(_arm(word.strip(), known, words) for word in text.split(","))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"--arms {text}: two have the same name; give them others, as in slow=trainer.learning_rate:1e-4"
        )
    return arms


def _arm(word: str, known: Callable[[str], Sequence[str] | None], words: str) -> Arm:
    name, own, setting = word.partition("=")
    key, _, value = setting.partition(":")
    if own and _NAME.fullmatch(name) and key and value:
        return Arm(name, (f"{key}={value}",))
    overrides = None if own else known(word)
    if overrides is None:
        raise ConfigError(f"--arms {word}: use {words}, or name=section.key:value")
    return Arm(word.replace(":", "-"), tuple(overrides))


def digest(config: Config, plan: Plan, commit: str) -> str:
    """What a run's result depends on besides arm and seed: where it is kept and which port it has does not count."""
    tree = config.model_dump(mode="json", exclude={"run_root": True, "run": True, "gateway": True})
    facts = [tree, plan.budget, commit]
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
