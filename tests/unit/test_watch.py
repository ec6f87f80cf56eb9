"""The watch: how often it cries wolf, how soon it notices, and whom it blames."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clawrl.config import GateSection
from clawrl.training import watch
from clawrl.training.watch import FallDetector, ReplyBounds, Watch, fall_decision, repetition
from clawrl.types import GROUP

SETTINGS = GateSection()


def detector() -> FallDetector:
    return FallDetector(SETTINGS.false_alarm_turns, SETTINGS.tolerance)


def scores(rng: np.random.Generator, mean: float, number: int) -> np.ndarray:
    """±1 with this mean."""
    return np.where(rng.random(number) < (mean + 1) / 2, 1.0, -1.0)


def first_fall(stream: np.ndarray, versions: np.ndarray | None = None) -> Any:
    """(turn, Fall) of the first alarm, or None."""
    watching = detector()
    for at, score in enumerate(stream):
        fall = watching.add(float(score), int(versions[at]) if versions is not None else 1)
        if fall is not None:
            return at, fall
    return None


class TestFallDetector:
    @pytest.mark.parametrize("mean", [0.0, 0.5, 0.8])
    def test_false_alarms_are_rare(self, mean):
        """Over 2,000 turns without a change: at most 5 %."""
        rng = np.random.default_rng(7)
        alarms = [first_fall(scores(rng, mean, 2000)) is not None for _ in range(12)]
        assert np.mean(alarms) <= 0.05

    def test_a_rise_is_no_alarm(self):
        rng = np.random.default_rng(3)
        rising = np.concatenate([scores(rng, mean, 100) for mean in np.linspace(-0.3, 0.7, 11)])
        assert first_fall(rising) is None

    def test_a_drop_of_a_half_is_noticed(self):
        """Median delay about 90 turns."""
        rng = np.random.default_rng(5)
        delays = []
        for _ in range(9):
            found = first_fall(np.concatenate([scores(rng, 0.5, 250), scores(rng, 0.0, 500)]))
            delays.append(np.inf if found is None else found[0] - 250)
        assert 0 < np.median(delays) <= 130

    def test_it_blames_the_version_with_which_the_fall_began(self):
        rng = np.random.default_rng(1)
        stream = np.concatenate([scores(rng, 0.8, 400), scores(rng, -0.8, 200)])
        versions = np.arange(600) // 40 + 1  # version 10 gives turns 360..399, version 11 those from 400 on
        at, fall = first_fall(stream, versions)
        assert 400 < at < 440
        assert fall.version == 11
        assert fall.before == pytest.approx(0.8, abs=0.15)
        assert fall.since < -0.5

    def test_a_fall_without_a_change_of_weights_blames_nobody_and_sets_a_new_mean(self):
        rng = np.random.default_rng(2)
        watching = detector()
        falls = [watching.add(float(score), 1) for score in [*scores(rng, 0.8, 200), *scores(rng, -0.5, 800)]]
        [fall] = [each for each in falls if each is not None]
        assert fall.version is None

    def test_after_a_way_back_the_old_mean_still_holds(self):
        rng = np.random.default_rng(4)
        watching = detector()
        stream = [(score, 1) for score in scores(rng, 0.8, 300)] + [(score, 2) for score in scores(rng, -0.6, 60)]
        fall = next(fall for score, version in stream if (fall := watching.add(float(score), version)))
        assert fall.version == 2
        assert not [score for score in scores(rng, 0.8, 300) if watching.add(float(score), 1)]
        again = next(fall for score in scores(rng, -0.6, 80) if (fall := watching.add(float(score), 3)))
        assert again.version == 3

    def test_version_0_is_never_blamed(self):
        rng = np.random.default_rng(6)
        stream = np.concatenate([scores(rng, 0.8, 100), scores(rng, -0.8, 100)])
        _, fall = first_fall(stream, np.where(np.arange(200) < 100, 1, 0))
        assert fall.version is None


class TestDecision:
    def test_of_a_fall(self):
        rng = np.random.default_rng(1)
        stream = np.concatenate([scores(rng, 0.8, 400), scores(rng, -0.8, 200)])
        _, fall = first_fall(stream, np.where(np.arange(600) < 400, 1, 2))
        reward = fall_decision("reward", fall, 2, SETTINGS)
        assert (reward.version, reward.stage, reward.passed) == (2, "after", False)
        assert "mean score went from" in reward.reason
        assert reward.reason.endswith(", since version 2")
        corrections = fall_decision("corrections", fall, 2, SETTINGS)
        assert f"share of corrections went from {(1 - fall.before) / 2:.2f} to" in corrections.reason

    def test_without_a_version_to_blame_nothing_is_taken_back(self):
        rng = np.random.default_rng(2)
        _, fall = first_fall(np.concatenate([scores(rng, 0.8, 200), scores(rng, -0.5, 200)]))
        kept = fall_decision("reward", fall, 1, SETTINGS)
        assert kept.passed
        assert "the weights are not the cause" in kept.reason


class TestReplyBounds:
    def test_replies_that_grow_beyond_the_bound(self):
        bounds = ReplyBounds(2.0, 0.2)
        assert not [each for each in range(100) if bounds.add(20, 0.0, 1)]
        found = [each for _ in range(60) if (each := bounds.add(70, 0.0, 2))]
        check, blamed = found[0]
        assert check.name == "length_ratio"
        assert check.value > 2
        assert blamed == 2

    def test_longer_replies_of_the_same_weights_are_another_task(self):
        bounds = ReplyBounds(2.0, 0.2)
        found = [each for number in range(300) if (each := bounds.add(20 if number < 100 else 70, 0.0, 1))]
        assert [blamed for _, blamed in found] == [None]

    def test_replies_that_repeat_themselves(self):
        bounds = ReplyBounds(2.0, 0.2)
        assert not [each for each in range(100) if bounds.add(20, 0.05, 1)]
        found = [each for _ in range(60) if (each := bounds.add(20, 0.6, 2))]
        assert found[0][0].name == "repetition"

    def test_repetition_of_a_reply(self):
        assert repetition(np.arange(20)) == 0
        assert repetition(np.tile(np.arange(4), 10)) == pytest.approx(1 - 4 / 37)
        assert repetition(np.zeros(5, int)) == 0


class Handle:
    """What an actor's handle is to its caller: every public coroutine of `actor` has a `remote`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


class Actors:
    """A journal of judged turns and a store of versions; each of the calls in `fails` fails once."""

    def __init__(self, versions: list[int], scores: list[float], fails: set[str]) -> None:
        self._turns = [
            (
                seq,
                SimpleNamespace(
                    user="ann",
                    capture=SimpleNamespace(
                        versions=(SimpleNamespace(version=version),), completion_ids=np.arange(20) + seq
                    ),
                ),
                SimpleNamespace(score=score),
            )
            for seq, (version, score) in enumerate(zip(versions, scores, strict=True), 1)
        ]
        self._fails, self.withdrawn, self.states = fails, [], dict.fromkeys({0, *versions}, "serving")
        self.scopes: dict[int, str] = {}
        self.asked: list[int | None] = []
        self.done = asyncio.Event()

    def _fail_once(self, name: str) -> None:
        if name in self._fails:
            self._fails.remove(name)
            raise RuntimeError(name)

    async def recent_judged_turns(self, limit: int) -> list:
        self.asked.append(None)
        return self._turns[: len(self._turns) // 2][-limit:]

    async def judged_turns(self, after: int, limit: int, timeout_s: float) -> list:
        self.asked.append(after)
        found = [turn for turn in self._turns if turn[0] > after][:limit]
        if not found:
            self.done.set()
            await asyncio.sleep(timeout_s)
        return found

    async def standing(self) -> dict:
        self._fail_once("standing")
        return {number: (state, self.scopes.get(number, GROUP)) for number, state in self.states.items()}

    async def withdraw(self, decision: Any) -> None:
        self._fail_once("withdraw")
        self.withdrawn.append(decision)
        self.states[decision.version] = "rejected"


@pytest.mark.parametrize("fails", [set(), {"standing"}, {"withdraw"}, {"standing", "withdraw"}])
async def test_what_fails_is_done_again_and_every_turn_is_taken_once(monkeypatch, fails):
    monkeypatch.setattr(watch, "_RETRY_S", 0.01)
    rng = np.random.default_rng(1)
    said = [*scores(rng, 0.8, 600), *scores(rng, -0.8, 200)]
    actors = Actors([1] * 600 + [2] * 200, [float(score) for score in said], set(fails))
    watching = Watch(SETTINGS, Handle(actors), Handle(actors))
    await asyncio.wait_for(actors.done.wait(), 20)
    turns = (await watching.stats())["turns"]
    await watching.close()
    assert [(decision.version, decision.passed) for decision in actors.withdrawn] == [(2, False)]
    assert actors.asked[: 1 + ("standing" in fails)] == [None] * (1 + ("standing" in fails)), "never from the beginning"
    assert 600 < turns < 700, "those of the rejected version are passed over"


async def test_a_users_policy_is_watched_by_what_it_says_to_them(monkeypatch):
    """Ann liked everyone's version 1; her own, 2, is worse. Everyone's has nothing to do with it."""
    monkeypatch.setattr(watch, "_RETRY_S", 0.01)
    rng = np.random.default_rng(1)
    said = [*scores(rng, 0.8, 300), *scores(rng, -0.8, 100)]
    actors = Actors([1] * 300 + [2] * 100, [float(score) for score in said], set())
    actors.scopes = {2: "ann"}
    watching = Watch(SETTINGS, Handle(actors), Handle(actors), "hierarchy")
    await asyncio.wait_for(actors.done.wait(), 20)
    await watching.close()
    assert [(decision.version, decision.passed) for decision in actors.withdrawn] == [(2, False)]
