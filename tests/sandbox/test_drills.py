"""The built-in model's terminal: its tasks can be solved, and what it was shown of a shell is what a shell says."""

import random
from collections.abc import Iterator

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from clawrl.rollout.env import SPLITS, Split, message_of
from clawrl.types import Message
from envs.terminal.drill import DrillEnv
from envs.terminal.tasks.drills import KINDS, Drill, words
from envs.terminal.tasks.family import Made, as_task
from jobs.tiny_model.shell import WRONG, right_steps

pytestmark = pytest.mark.sandbox


@pytest.fixture(scope="module")
def env(home) -> Iterator[DrillEnv]:
    made = DrillEnv(backend="bwrap", limits="best_effort")
    yield made
    made.close()


def play(env: DrillEnv, actions: list[Message], **options) -> tuple[list[str], float]:
    """(what the tools said, the verdict)."""
    env.reset(options=options)
    said: list[str] = []
    for action in actions:
        observed, _, _, _, facts = env.step(action)
        said += [message["content"] for message in observed]
    return said, facts["outcome"]


def submit() -> Message:
    return message_of("submit")


def test_gymnasium_finds_nothing_wrong(home):
    made = gymnasium.make("envs:clawrl/Drill-v0", backend="bwrap", limits="best_effort").unwrapped
    check_env(made)
    made.close()


@pytest.mark.parametrize("split", SPLITS)
def test_gold_solves_and_idleness_does_not(env, split: Split):
    by_kind = {task.id.split("/")[1]: number for number in range(80) for task in [env.make_task(number, split)]}
    assert len(by_kind) == len(KINDS)
    for number in by_kind.values():
        task = env.make_task(number, split)
        assert play(env, list(env.gold(task)), task=number, split=split)[1] == 1
        assert play(env, [submit()], task=number, split=split)[1] == -1


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__.strip("_"))
def test_demonstrations_tell_what_a_shell_says(env, monkeypatch, make):
    rng = random.Random(1)
    names = words(rng, 3)
    drill: Drill = make(*names, rng)
    made = Made(drill.instruction, "", drill.files, "", drill.expect, drill.goals, drill.guards)
    monkeypatch.setattr(env, "make_task", lambda number, split: as_task("drill", made))
    steps = right_steps(drill, names)
    said, verdict = play(env, [*(message_of("run", command=command) for command, _ in steps), submit()])
    assert (said[:-1], verdict) == ([told for _, told in steps], 1)
    named = dict(zip("abc", names, strict=True))
    for command, told in WRONG[drill.kind]:
        said, verdict = play(env, [message_of("run", command=command.format(**named)), submit()])
        assert (said[0], verdict) == (told.format(**named), -1), command
