"""docs/envs.md: its example is an environment, and a pool plays it."""

import re
import tomllib
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from test_agent import Scripted

from clawrl.config import Config
from clawrl.rollout.agent import Limits, run_episode
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.env import SPLITS, split_of

PAGE = (Path(__file__).parents[2] / "docs" / "envs.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def example() -> Any:
    """The page's environment, as gymnasium makes it."""
    [code] = blocks("python")
    exec(compile(code, "docs/envs.md", "exec"), {"__name__": "docs_envs"})
    return gymnasium.make("clawrl/Sum-v0", disable_env_checker=True).unwrapped


def test_gymnasium_finds_nothing_wrong_and_no_task_is_in_both_splits(example):
    check_env(example, skip_render_check=True)
    for split in SPLITS:
        assert {split_of(example.make_task(number, split).id) for number in range(100)} == {split}


@pytest.mark.parametrize(("words", "outcome"), [("gold", 1.0), ("no idea", -1.0)])
async def test_an_episode_of_it_is_graded(example, words, outcome):
    example.reset(options={"task": 3})
    [answer] = example.gold(example.task)
    attempt = Attempt("sum", "g", 8, "g-0", "train", 3)
    caller = Scripted(words=answer["content"] if words == "gold" else words)
    episode = await run_episode(example, attempt, caller, Limits())
    assert (episode.status, episode.outcome) == ("done", outcome)


def test_its_pools_are_configs():
    for block in blocks("toml"):
        [pool] = Config.model_validate(tomllib.loads(block)).pools
        assert pool.env == "mypackage:clawrl/Sum-v0"
