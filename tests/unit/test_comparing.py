"""Groups of attempts: who is better than whom, and which turns make samples of it."""

import numpy as np
import pytest
from test_samples import make_turn

from clawrl.config import LearningSection
from clawrl.rollout.comparing import attempt_advantages, compare
from clawrl.types import Episode, EpisodeStatus, Scores

LEARNING = LearningSection(kl_weight=0)


def episode(session: str, outcome: float | None, status: EpisodeStatus = "done") -> Episode:
    return Episode(session, "toolcall", "g", "task", 4, status, outcome, (0.0,), "", 1.0, 2.0)


def turns_of(*sessions: str, turns: int = 2, **changes):
    return [
        make_turn(id=f"{session}/{index}", session=session, index=index, group="g", source="toolcall", **changes)
        for session in sessions
        for index in range(turns)
    ]


def test_advantages_are_z_scores_of_those_with_an_outcome():
    group = [episode("a", 1), episode("b", -1), episode("c", -1), episode("d", None, "error")]
    # mean -1/3, population sigma sqrt(8)/3: (4/3)/(sqrt(8)/3) = sqrt(2), and -1/sqrt(2)
    assert attempt_advantages(group) == pytest.approx({"a": 2**0.5, "b": -(2**-0.5), "c": -(2**-0.5)}, abs=1e-5)


@pytest.mark.parametrize("outcomes", [(1, 1, 1), (-1, -1), (1, None), (None, None)])
def test_a_group_that_went_alike_teaches_nothing(outcomes):
    group = [episode(str(number), outcome) for number, outcome in enumerate(outcomes)]
    assert attempt_advantages(group) == {}
    comparison, samples = compare(group, turns_of(*(each.session for each in group)), {}, LEARNING, 9.0)
    assert samples == []
    assert comparison.samples == 0
    assert comparison.outcomes == tuple(outcome for outcome in outcomes if outcome is not None)


def test_every_turn_of_an_attempt_is_worth_what_the_attempt_is():
    group = [episode("a", 1), episode("b", -1, "truncated")]
    comparison, samples = compare(group, turns_of("a", "b"), {}, LEARNING, 9.0)
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
    comparison, samples = compare(group, turns, {}, LEARNING, 9.0)
    assert (samples, comparison.samples) == ([], 0)


def test_the_reference_comes_with_those_turns_that_have_one():
    scores = Scores(np.array([-1, -2], np.float32), np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32), 0)
    group = [episode("a", 1), episode("b", -1)]
    _, samples = compare(group, turns_of("a", "b", turns=1), {"a/0": scores}, LearningSection(kl_weight=0.1), 9.0)
    found = {sample.id: sample.reference_logprobs for sample in samples}
    np.testing.assert_array_equal(found["a/0"], [0, 0, 0, -1, -2])
    assert found["b/0"] is None
