"""BFCL's simple and multiple tasks: its own answers pass its own checker, others do not, and none is for training."""

import importlib.util
import sys

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from clawrl.errors import EnvError
from clawrl.rollout.env import message_of
from envs.toolcall.bfcl import BfclEnv, checker, read_category

if importlib.util.find_spec("bfcl_eval") is None:
    pytest.skip("bfcl-eval is not installed (pip install --no-deps bfcl-eval==2026.3.23)", allow_module_level=True)


@pytest.fixture(scope="module")
def env() -> BfclEnv:
    return BfclEnv()


def grade(env: BfclEnv, action: dict, number: int = 0) -> tuple[float, str]:
    env.reset(options={"task": number, "split": "held_out"})
    _, reward, terminated, _, facts = env.step(action)
    assert terminated
    return reward, facts["error"]


def test_gymnasium_finds_nothing_wrong():
    check_env(gymnasium.make("envs:clawrl/Bfcl-v0").unwrapped, skip_render_check=True)


def test_the_boards_own_answers_are_right(env):
    """Every seventh task; that all 600 are was seen with a step of 1."""
    assert [len(read_category(name)) for name in ("simple_python", "multiple")] == [400, 200]
    for number in range(0, 600, 7):
        (action,) = env.gold(env.make_task(number, "held_out"))
        assert grade(env, action, number) == (1.0, "")


def test_what_is_wrong_is_told(env):
    area = "calculate_triangle_area"
    assert grade(env, message_of(area, base=10, height=5))[0] == 1.0
    assert grade(env, message_of(area, base=10, height=5, unit="units"))[0] == 1.0
    for action, words in [
        (message_of(area, base=10), "'height'"),
        (message_of(area, base=10, height=6), "Invalid value"),
        (message_of(area, base="10", height=5), "Incorrect type"),
        (message_of("area", base=10, height=5), "there is no tool 'area'"),
        ({"role": "assistant", "content": "50"}, "no function was called"),
    ]:
        reward, error = grade(env, action)
        assert reward == -1.0
        assert words in error
    broken = message_of(area)
    broken["tool_calls"][0]["function"]["arguments"] = '{"base": 10,'
    assert "not valid JSON" in grade(env, broken)[1]
    twice = message_of(area, base=10, height=5)
    twice["tool_calls"] *= 2
    assert "Wrong number of functions" in grade(env, twice)[1]


def test_names_with_dots_and_foreign_types_are_as_openai_has_them(env):
    _, facts = env.reset(options={"task": 1})
    (tool,) = facts["tools"]
    assert tool["function"]["name"] == "math_factorial"
    assert tool["function"]["parameters"]["type"] == "object"
    assert grade(env, message_of("math_factorial", number=5), 1)[0] == 1.0


def test_there_is_nothing_to_train_on(env):
    with pytest.raises(EnvError, match="evaluation only and has no tasks in split train; use held_out"):
        env.reset(options={"split": "train"})


def test_wrong_categories_and_a_missing_package(monkeypatch):
    with pytest.raises(EnvError, match="must be some of simple_python, multiple"):
        BfclEnv(["java"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    read_category.cache_clear()
    with pytest.raises(EnvError, match=r"bfcl-eval is not installed; pip install --no-deps bfcl-eval==2026\.3\.23"):
        BfclEnv()


def test_the_checker_leaves_no_settings_behind():
    checker()
    assert "bfcl_eval.constants.model_config" not in sys.modules
