"""What can be read off without a model: sure cases, and abstention everywhere else."""

import pytest

from clawrl.algorithms.heuristics import read_off
from clawrl.testing import ScriptedPolicy
from clawrl.types import NextState, Role

ASKED = "How many apples do I have if I buy three more?"


def vote(*said: str, role: Role = "user") -> int | None:
    turn = ScriptedPolicy().turn([{"role": "user", "content": ASKED}])
    messages = tuple({"role": role, "content": each} for each in said)
    return read_off(turn, NextState(turn.id, role, messages, False, 0.0))


@pytest.mark.parametrize("said", ["👍", "Thanks!", "Perfect, thank you", "great"])
def test_praise(said):
    assert vote(said) == 1


@pytest.mark.parametrize("said", ["👎", "That's wrong.", "Wrong!", "No, that's not what I meant"])
def test_complaint(said):
    assert vote(said) == -1


def test_the_same_asked_again():
    assert vote(ASKED) == -1
    assert vote("how many apples do i have, if I buy  three more") == -1
    assert vote("How many pears do I have if I sell two of them instead?") is None


@pytest.mark.parametrize(
    "said",
    [
        "And if I eat one?",
        "Thanks, but that is not what I was asking for at all",
        "👍 or 👎?",
        "No",
        "no worries",
        "not bad",
        "What is wrong here?",
        "wrong?",
        "Great Britain population?",
        "Knowledge of nothing",
        "",
        "I do not know whether that is wrong, can you explain the second step",
    ],
)
def test_what_is_not_sure_abstains(said):
    assert vote(said) is None


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (("ok", "Traceback (most recent call last):\n ..."), -1),
        (("make: *** failed\nexit code: 2",), -1),
        (("exit code 0",), None),
        (("ValueError: bad",), -1),
        (('{"error": "no such file"}',), -1),
        (('{"isError": true, "content": []}',), -1),
        (('{"error": null, "rows": 3}',), None),
        (("the log has an error: line in its midst",), None),
        (("1250",), None),
    ],
)
def test_tools(said, expected):
    assert vote(*said, role="tool") == expected


def test_a_session_that_ended_says_nothing():
    assert vote() is None
