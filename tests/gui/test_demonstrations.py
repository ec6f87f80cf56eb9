"""Demonstrations of the buttons for the tiny model: as the real page behaves, and as right as they claim."""

import random
from functools import partial

import pytest

from clawrl.types import Message
from envs.gui.buttons import KINDS, Panel, Puzzle, draw_puzzle
from envs.gui.env import GuiEnv
from envs.gui.site import GuiTask
from jobs.tiny_model.panels import PANEL_FLAW_SHARES, PANEL_TOOLS, demonstrate

pytestmark = pytest.mark.gui


@pytest.fixture(scope="module")
def env(kept):
    env = GuiEnv("buttons", tools=["click", "fill"])
    yield env
    env.close()


def replayed(env: GuiEnv, puzzle: Puzzle, messages: list[Message]) -> float | None:
    """The outcome of a demonstration's replies; what stands between them must be what the environment says."""
    env.task, env.outcome = GuiTask("test", partial(Panel, puzzle)), None
    opening = env.begin(env.task)
    env.tools = opening.tools
    assert opening.tools == PANEL_TOOLS
    assert opening.messages == (messages[0],)
    for action, following in zip(messages[1::2], [*messages[2::2], None], strict=True):
        seen, _, terminated, _, facts = env.step(action)
        if terminated:
            assert following is None
            return facts["outcome"]
        if following is not None:
            assert [message["content"] for message in seen] == [following["content"]]
    return None


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("flaw", PANEL_FLAW_SHARES)
def test_demonstrations_are_what_the_page_does(env, make, flaw):
    rng = random.Random(f"{make.__name__}/{flaw}")
    for _ in range(2):
        puzzle = draw_puzzle(make, rng)
        outcome = replayed(env, puzzle, demonstrate(puzzle, flaw, rng))
        if flaw == "talk":
            assert outcome is None
        elif flaw == "none" or (flaw, puzzle.kind) in (("late", "one"), ("skip", "one"), ("skip", "two")):
            assert outcome == 1.0  # these kinds have nothing to be late with, or to skip
        else:
            assert outcome in ((-1.0, 0.0) if puzzle.kind == "two" else (-1.0,))
