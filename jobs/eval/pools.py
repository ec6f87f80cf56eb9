"""`jobs.eval pools`: do pools of environments learn, and which arm learns more? Runs of `jobs.train`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from clawrl.cli import config_of
from clawrl.config import Config
from clawrl.errors import ConfigError
from jobs.eval.plan import Plan, arms_of, parse_seeds
from jobs.eval.series import Job, add_options, evaluate

PROCESS_WEIGHT = 0.3
"""Of the arm `process`, where neither the command nor the config says one."""


def parser() -> argparse.ArgumentParser:
    about = "arms (settings) and seeds on a config with [[pools]]: what is solved before and after training"
    parser = argparse.ArgumentParser(prog="python -m jobs.eval pools", description=about)
    add_options(parser, words="outcome, process, process:WEIGHT", arms="outcome,process", seeds=3)
    parser.add_argument("--versions", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training in each run (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks of each pool (default: %(default)s)")
    return parser


def run(options: argparse.Namespace, command: str) -> int:
    """Raises ConfigError."""
    config = config_of(options)
    plan = plan_of(config, options)
    job = Job("pools", "jobs.train", lambda seed: seeded(config, seed), lambda report: report)
    return evaluate(job, plan, config, options, command)


def plan_of(config: Config, options: argparse.Namespace) -> Plan:
    """Raises ConfigError."""
    if not config.pools:
        raise ConfigError("no [[pools]] in the config: there is nothing to train on; see configs/toolcall.toml")
    return Plan(
        arms=arms_of(options.arms, lambda word: overrides_of(word, config), "outcome, process, process:0.3"),
        seeds=parse_seeds(options.seeds),
        measures=tuple(pool.name for pool in config.pools),
        budget=(f"--versions={options.versions}", f"--minutes={options.minutes}", f"--tasks={options.tasks}"),
        limits=f"{options.versions} versions or {options.minutes:g} minutes of training",
        what=f"Held-out tasks solved, one attempt at each of {options.tasks}",
        along="groups of attempts",
    )


def overrides_of(word: str, config: Config) -> Sequence[str] | None:
    """Of an arm with a name of its own. Raises ConfigError."""
    if word == "outcome":
        return ["learning.process_weight=0"]
    name, _, value = word.partition(":")
    return [f"learning.process_weight={_weight(word, value, config)}"] if name == "process" else None


def _weight(word: str, value: str, config: Config) -> float:
    try:
        weight = float(value) if value else config.learning.process_weight or PROCESS_WEIGHT
    except ValueError:
        weight = 0.0
    if not weight > 0:
        raise ConfigError(f"--arms {word}: the weight of process rewards must be a number above 0")
    return weight


def seeded(config: Config, seed: int) -> list[str]:
    """The overrides that make a run another one: the trainer's shuffling, and the order of the pools' tasks."""
    return [f"trainer.seed={seed}", *(f"pools.{index}.seed={seed}" for index in range(len(config.pools)))]
