"""Groups of attempts: who is better than whom, and which turns make samples of it."""

import numpy as np
import pytest
from test_samples import make_turn

from clawrl.config import LearningSection
from clawrl.rollout.comparing import (
    attempt_advantages,
    compare,
    outcome_advantages,
    process_advantages,
    step_rewards,
)
from clawrl.serving.judging import plurality
from clawrl.types import Episode, EpisodeStatus, Judgement, Scores

LEARNING = LearningSection(kl_weight=0)


def episode(session: str, outcome: float | None, status: EpisodeStatus = "done") -> Episode:
    return Episode(session, "toolcall", "g", "task", 4, status, outcome, (0.0,), "", 1.0, 2.0)


def turns_of(*sessions: str, turns: int = 2, **changes):
    return [
        make_turn(id=f"{session}/{index}", session=session, index=index, group="g", source="toolcall", **changes)
        for session in sessions
        for index in range(turns)
    ]


def compared(group, turns):
    """By the outcome alone."""
    return compare(group, turns, outcome_advantages(group, turns), {}, LEARNING, 9.0)


def votes_on(turn: str, *votes: int | None) -> tuple[str, Judgement]:
    return turn, Judgement(turn, votes, plurality(votes), (), 0, 0.1, None, 3.0)


def test_advantages_are_z_scores_of_those_with_an_outcome():
    group = [episode("a", 1), episode("b", -1), episode("c", -1), episode("d", None, "error")]
    # mean -1/3, population sigma sqrt(8)/3: (4/3)/(sqrt(8)/3) = sqrt(2), and -1/sqrt(2)
    assert attempt_advantages(group) == pytest.approx({"a": 2**0.5, "b": -(2**-0.5), "c": -(2**-0.5)}, abs=1e-5)


@pytest.mark.parametrize("outcomes", [(1, 1, 1), (-1, -1), (1, None), (None, None)])
def test_a_group_that_went_alike_teaches_nothing(outcomes):
    group = [episode(str(number), outcome) for number, outcome in enumerate(outcomes)]
    assert attempt_advantages(group) == {}
    comparison, samples = compared(group, turns_of(*(each.session for each in group)))
    assert samples == []
    assert comparison.samples == 0
    assert comparison.outcomes == tuple(outcome for outcome in outcomes if outcome is not None)


def test_every_turn_of_an_attempt_is_worth_what_the_attempt_is():
    group = [episode("a", 1), episode("b", -1, "truncated")]
    comparison, samples = compared(group, turns_of("a", "b"))
    assert [sample.id for sample in samples] == ["a/0", "a/1", "b/0", "b/1"]
    for sample, advantage in zip(samples, (1, 1, -1, -1), strict=True):
        assert sample.advantages is not None
        np.testing.assert_allclose(sample.advantages, np.r_[0, 0, 0, advantage, advantage], atol=1e-5)
        assert sample.distillation is None
        assert sample.reference_logprobs is None
    assert (comparison.group, comparison.source, comparison.task, comparison.samples) == ("g", "toolcall", "task", 4)


def test_what_is_not_the_models_own_full_reply_does_not_train():
    group = [episode("a", 1), episode("b", -1), episode("lost", None, "lost")]
    turns = [
        *turns_of("a", turns=1, kind="side"),
        *turns_of("b", turns=1, finish_reason="abort"),
        *turns_of("lost", turns=1),
        *turns_of("nobody", turns=1),
    ]
    comparison, samples = compared(group, turns)
    assert (samples, comparison.samples) == ([], 0)


def test_the_reference_comes_with_those_turns_that_have_one():
    scores = Scores(np.array([-1, -2], np.float32), np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32), 0)
    group = [episode("a", 1), episode("b", -1)]
    turns, learning = turns_of("a", "b", turns=1), LearningSection(kl_weight=0.1)
    _, samples = compare(group, turns, outcome_advantages(group, turns), {"a/0": scores}, learning, 9.0)
    found = {sample.id: sample.reference_logprobs for sample in samples}
    np.testing.assert_array_equal(found["a/0"], [0, 0, 0, -1, -2])
    assert found["b/0"] is None


def test_votes_tell_steps_apart_that_the_outcome_does_not():
    """Both attempts solve it; the first step of one was worse, the second steps were alike, the third stands alone."""
    group = [episode("a", 1), episode("b", 1)]
    turns = [*turns_of("a", turns=3), *turns_of("b", turns=2)]
    judgements = dict([votes_on("a/0", 1, 1, 1), votes_on("b/0", -1, None, -1), votes_on("a/1", 1), votes_on("b/1", 1)])
    rewards = step_rewards(group, turns, judgements, 0.5)
    assert rewards == [1.5, 1.5, 1.0, 0.5, 1.5]  # nobody voted on a/2
    advantages = process_advantages(turns, rewards, baseline=0.25)
    assert advantages == pytest.approx({"a/0": 1.0, "b/0": -1.0, "a/2": 0.75}, abs=1e-5)
    comparison, samples = compare(group, turns, advantages, {}, LEARNING, 9.0, 1.2)
    assert {sample.id for sample in samples} == {"a/0", "a/2", "b/0"}
    assert (comparison.samples, comparison.reward, comparison.outcomes) == (3, 1.2, (1, 1))


def test_a_step_whose_votes_cannot_be_read_keeps_the_outcome():
    group, turns = [episode("a", 1), episode("b", -1)], turns_of("a", "b", turns=1)
    rewards = step_rewards(group, turns, dict([votes_on("a/0", None, None), votes_on("b/0", 1)]), 1.0)
    assert rewards == [1.0, 0.0]
