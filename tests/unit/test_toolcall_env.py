"""The tool-call environment: what it shows, what it answers to anything at all, and whom it calls right."""

import json
import re

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from clawrl.rollout.env import SPLITS, Split, split_of
from envs.toolcall.env import BROKEN, ToolCallEnv
from envs.toolcall.stock import run_tool


def called(name: str, arguments: object, identity: str = "c") -> dict:
    given = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = {"id": identity, "type": "function", "function": {"name": name, "arguments": given}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def env() -> ToolCallEnv:
    made = ToolCallEnv()
    made.reset(options={"task": 7})
    return made


def test_gymnasium_makes_it_and_finds_nothing_wrong():
    check_env(gymnasium.make("envs:clawrl/ToolCall-v0").unwrapped, skip_render_check=True)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("number", range(20))
def test_the_gold_solution_solves_and_silence_does_not(number, split):
    env = ToolCallEnv()
    env.reset(options={"task": number, "split": split})
    assert env.task is not None
    *calls, last = env.gold(env.task)
    for action in calls:
        observed, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated, info) == (0.0, False, False, {})
        assert [message["role"] for message in observed] == ["tool"]
        assert "error" not in observed[0]["content"]
    assert env.step(last)[1:] == (1.0, True, False, {"outcome": 1.0})
    env.reset(options={"task": number, "split": split})
    assert env.step(said(""))[1:] == (-1.0, True, False, {"outcome": -1.0})


def test_the_same_number_is_the_same_task_and_splits_share_no_words():
    env = ToolCallEnv()
    words: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for split, seen in words.items():
        for number in range(200):
            first = env.make_task(number, split)
            assert env.make_task(number, split) == first
            seen.add(first.id.rpartition("/")[0])
            assert split_of(first.id.rpartition("/")[0]) == split
    assert not words["train"] & words["held_out"]


def test_a_seed_draws_the_task():
    env = ToolCallEnv()
    first = env.reset(seed=3)[1]["task"]
    assert env.reset(seed=3)[1]["task"] == first
    assert env.reset(seed=4)[1]["task"] != first


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (called("look", {}), "there is no tool 'look'; the tools are lookup, calc"),
        (called("lookup", {"item": "x"}), "'place' is a required property"),
        (called("lookup", '{"item": '), "not valid JSON"),
        (called("lookup", "[1]"), "must be a JSON object"),
        (called("lookup", {"item": 3, "place": "barn"}), "not of type 'string'"),
        ({"role": "assistant", "content": None, "tool_calls": ["calc"]}, "there is no tool ''"),
        (called("calc", '{"expression": NaN}'), "NaN is no number"),
        (called("calc", '{"expression": "\\ud83d"}'), "not valid JSON"),
        (called("calc", "[" * 5000), "not valid JSON"),
    ],
    ids=[
        "unknown tool",
        "missing argument",
        "broken JSON",
        "no object",
        "wrong type",
        "no call at all",
        "NaN",
        "half a pair",
        "depth",
    ],
)
def test_a_malformed_call_is_told_what_was_expected(env, action, words):
    (message,), reward, terminated, *_ = env.step(action)
    assert message["role"] == "tool"
    assert words in message["content"]
    assert (reward, terminated) == (0.0, False)


def test_a_call_that_no_parser_understood_is_told_how_to_write_one(env):
    observed, *_ = env.step(said('<tool_call>{"name": "lookup", </tool_call>'))
    assert observed == ({"role": "user", "content": BROKEN},)


def test_several_calls_of_one_message_are_all_answered(env):
    both = called("calc", {"expression": "1 + 2"}, "a")
    both["tool_calls"] += called("calc", {"expression": "20 - 2"}, "b")["tool_calls"]
    observed, *_ = env.step(both)
    assert [(m["tool_call_id"], m["content"]) for m in observed] == [("a", "3"), ("b", "18")]


def test_a_number_of_any_length_is_right_or_wrong(env):
    *_, last = env.gold(env.task)
    assert env.step(said("9" * 5000))[1] == -1.0
    env.reset(options={"task": 7})
    assert env.step(said(f"{'9' * 5000} {last['content']}"))[1] == 1.0


@pytest.mark.parametrize("expression", ["__import__('os')", "9**9**9", "1 +", "", "1 / 0", "2 * (3", "9" * 5000 + "+1"])
def test_the_calculator_computes_and_nothing_else(env, expression):
    answer = run_tool(env.task.stock, "calc", {"expression": expression})
    assert re.match("error", answer), answer
