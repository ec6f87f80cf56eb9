"""`jobs.train`: what attempts at held-out tasks have shown, and pools that come to nothing."""

from types import SimpleNamespace

import pytest
from rich.text import Text

from clawrl.config import PoolSection
from clawrl.errors import ClawrlError
from clawrl.rollout.agent import Attempt, ended
from clawrl.types import Comparison, Episode, Swap
from jobs import train


def episode(number: int, outcome: float | None, status: str = "done") -> Episode:
    attempt = Attempt("drill", "measure", 4, f"measure-{number}", "held_out", number)
    reason = "" if outcome is not None else f"number {number} broke [/etc]"
    return ended(attempt, status, reason, 1.0, task=f"task-{number}", outcome=outcome, rewards=(0.0,) * number)  # type: ignore[arg-type]


def test_the_share_of_solved_is_of_those_with_an_outcome():
    found = train.measured_of("drill", [episode(0, 1.0), episode(1, -1.0), episode(2, None, "error"), episode(3, 0.5)])
    assert (found.attempts, found.failed, found.reason) == (4, 1, "error: number 2 broke [/etc]")
    assert found.solved == pytest.approx(1 / 3)
    assert found.mean_outcome == pytest.approx(0.5 / 3)
    assert found.mean_turns == 1.5
    assert found.interval is not None
    assert found.solved is not None
    assert 0 <= found.interval.low <= found.solved <= found.interval.high <= 1


def test_a_pool_without_any_outcome_has_no_share_but_a_reason():
    found = train.measured_of("gui", [episode(0, None, "error"), episode(1, None, "timeout")])
    assert (found.solved, found.interval, found.mean_outcome) == (None, None, None)
    assert (found.failed, found.reason) == (2, "error: number 0 broke [/etc]")


class Paper:
    """What was said, as a terminal shows it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(Text.from_markup(line).plain)

    note = say


async def test_a_pool_that_cannot_be_measured_holds_no_other_up(monkeypatch):
    pools = [PoolSection(name=name, env="envs:clawrl/ToolCall-v0") for name in ("good", "bad")]
    config = SimpleNamespace(pools=pools, policy=SimpleNamespace(served_name="m"))
    outcomes = {"good": 1.0, "bad": None}

    async def measure(pool, url, model, tasks):
        return train.measured_of(pool.name, [episode(0, outcomes[pool.name], "error")])

    monkeypatch.setattr(train, "measure", measure)
    paper, system = Paper(), SimpleNamespace(url="")
    good, bad = await train._measure_all(config, system, paper, 1)  # type: ignore[arg-type]
    assert (good.solved, bad.solved) == (1.0, None)
    assert "bad: 1 of 1 attempts came to no outcome; the first: error: number 0 broke [/etc]" in paper.said

    outcomes["good"] = None
    with pytest.raises(ClawrlError, match=r"good: 1 of 1 .*bad: 1 of 1"):
        await train._measure_all(config, system, paper, 1)  # type: ignore[arg-type]


async def test_an_environment_that_cannot_be_made_is_tried_no_oftener_than_it_must():
    pool = PoolSection(name="odd", env="envs:clawrl/ToolCall-v0", options={"colour": "red"})
    found = await train.measure(pool, "http://127.0.0.1:9/v1", "m", 200)
    assert found.solved is None
    assert train.CONCURRENCY <= found.attempts < 2 * train.CONCURRENCY
    assert "cannot be made" in found.reason


def test_a_point_of_the_curve_names_the_version_that_served():
    swaps = [Swap(1, "replica", 1.0, None, 0.1, 20.0), Swap(2, "replica", 1.0, None, 0.1, 30.0)]
    comparison = Comparison("group", "drill", "task", (1.0, -1.0, -1.0, -1.0), 8, 25.0)
    point = train._point(comparison, swaps, 10.0)
    assert point == {"seconds": 15.0, "version": 1, "outcome": -0.5, "attempts": 4, "samples": 8}
