"""Advantages against cases worked out by hand."""

import numpy as np
import pytest

from clawrl.algorithms.advantages import (
    RunningBaseline,
    distillation_support,
    score_advantages,
    step_advantages,
    step_reward,
    teacher_logprobs,
    token_distillation,
    topk_distillation,
)
from clawrl.types import Capture, Scores, VersionSpan


def scores(logprobs, top_ids, top_logprobs) -> Scores:
    return Scores(
        np.array(logprobs, np.float32), np.array(top_ids, np.int32), np.array(top_logprobs, np.float32), version=0
    )


def test_running_baseline_starts_at_zero_and_decays():
    baseline = RunningBaseline(decay=0.9)
    assert baseline.advantage("ada", 1) == 1.0  # b = 0 before the first score
    assert baseline.value("ada") == pytest.approx(0.1)
    assert baseline.advantage("ada", -1) == pytest.approx(-1.1)
    assert baseline.value("ada") == pytest.approx(0.9 * 0.1 - 0.1)
    assert baseline.advantage("bob", 1) == 1.0  # users do not share it


def test_running_baseline_is_rebuilt_from_its_scores():
    lived, restarted = RunningBaseline(0.9), RunningBaseline(0.9)
    scores = [1, -1, -1, 1, 1, 0]
    for score in scores:
        lived.advantage("ada", score)
    restarted.advantage("ada", -1)  # forgotten by rebuild
    restarted.rebuild("ada", scores)
    assert restarted.value("ada") == pytest.approx(lived.value("ada"))


def test_score_advantage_is_the_same_for_every_token():
    advantages = score_advantages(-1.25, 3)
    assert advantages.dtype == np.float32
    np.testing.assert_array_equal(advantages, [-1.25, -1.25, -1.25])


@pytest.mark.parametrize(
    ("votes", "reward"),
    [((), -1.0), ((None, None), -1.0), ((1, 1, 1), -0.5), ((1, None, -1, -1), -1 - 0.5 / 3), ((0,), -1.0)],
)
def test_a_step_is_worth_its_outcome_and_the_mean_of_the_votes_that_were_cast(votes, reward):
    assert step_reward(-1.0, votes, 0.5) == pytest.approx(reward)


def test_steps_are_held_against_those_of_the_same_index():
    # Index 0: 2, 0, 0, 0: mean .5, sigma sqrt(.75); index 1: alike; index 2: alone, against the baseline.
    steps = [(0, 2.0), (1, 1.0), (0, 0.0), (0, 0.0), (1, 1.0), (0, 0.0), (2, -1.0)]
    advantages = step_advantages(steps, baseline=0.25)
    high, low = 1.5 / 0.75**0.5, -0.5 / 0.75**0.5
    assert [advantages[at] for at in (0, 2, 3, 5)] == pytest.approx([high, low, low, low], abs=1e-5)
    assert [advantages[at] for at in (1, 4, 6)] == [None, None, -1.25]
    assert step_advantages([], 0.0) == []


def test_the_z_score_has_the_populations_sigma_and_1e_6():
    first, second = step_advantages([(0, 1e-6), (0, -1e-6)], 0.0)  # sigma is 1e-6: halved by the epsilon
    assert (first, second) == pytest.approx((0.5, -0.5))


def test_token_distillation_is_the_clipped_difference_on_the_sampled_token():
    teacher = scores([-0.5, -3.0, -0.1], [[7], [8], [9]], [[-0.2], [-0.2], [-0.1]])
    target = token_distillation(
        np.array([7, 5, 9], np.int32), np.array([-1.1, -0.4, -0.3], np.float32), teacher, difference_clip=1.0
    )
    np.testing.assert_array_equal(target.support, [[7], [5], [9]])
    np.testing.assert_allclose(target.advantages, [[0.6], [-1.0], [0.2]], atol=1e-6)  # -2.6 is cut to -1
    assert target.valid.all()


def test_topk_distillation_by_hand():
    # One position, support of two: l_old = log .6, log .2, so w = (.75, .25). The teacher prefers the second.
    l_old = np.log([[0.6, 0.2]]).astype(np.float32)
    teacher = scores([np.log(0.3)], [[4, 3]], [[np.log(0.5), np.log(0.3)]])
    target = topk_distillation(np.array([3], np.int32), np.array([[3, 4]], np.int32), l_old, teacher, 1.0)
    expected = [[np.log(0.3 / 0.6) * 0.75, np.log(0.5 / 0.2) * 0.25]]
    np.testing.assert_allclose(target.advantages, expected, atol=1e-6)
    np.testing.assert_allclose(target.behaviour_logprobs, l_old)
    assert target.valid.all()


def test_support_outside_the_teachers_top_is_bounded_or_invalid():
    # The teacher's K-th is log .1; its token 5 is unknown, at most log .1.
    teacher = scores([np.log(0.8)], [[3, 9]], [[np.log(0.8), np.log(0.1)]])
    l_old = np.log([[0.5, 0.4, 0.05]]).astype(np.float32)
    target = topk_distillation(np.array([3], np.int32), np.array([[3, 5, 6]], np.int32), l_old, teacher, 1.0)
    weight = l_old[0] - np.log(np.exp(l_old).sum())
    # Token 5: log .1 - log .4 = -1.39 <= -C, so D = -C whatever it really is. Token 6 could be anything: no entry.
    np.testing.assert_array_equal(target.valid, [[True, True, False]])
    np.testing.assert_allclose(target.advantages[0, 1], -1.0 * np.exp(weight[1]), atol=1e-6)
    assert target.advantages[0, 2] == 0


def test_a_bound_just_short_of_the_clip_is_not_taken_for_the_value():
    teacher = scores([-0.1], [[3]], [[-2.0]])
    l_old = np.array([[-0.1, -1.001]], np.float32)
    target = topk_distillation(np.array([3], np.int32), np.array([[3, 5]], np.int32), l_old, teacher, 1.0)
    np.testing.assert_array_equal(target.valid, [[True, False]])
    l_old = np.array([[-0.1, -1.0]], np.float32)
    target = topk_distillation(np.array([3], np.int32), np.array([[3, 5]], np.int32), l_old, teacher, 1.0)
    np.testing.assert_array_equal(target.valid, [[True, True]])


def test_the_sampled_token_is_known_even_outside_the_teachers_top():
    teacher = scores([-5.0], [[1, 2]], [[-0.1, -3.0]])
    known, bound = teacher_logprobs(np.array([7], np.int32), np.array([[7, 2, 8]], np.int32), teacher)
    np.testing.assert_allclose(known, [[-5.0, -3.0, np.nan]])
    np.testing.assert_allclose(bound, [[-3.0]])


def test_topk_agrees_with_a_loop_over_random_distributions():
    rng = np.random.default_rng(0)
    num_tokens, vocabulary, k, top, clip = 7, 30, 4, 20, 1.0
    old = np.log(rng.dirichlet(np.full(vocabulary, 0.3), num_tokens)).astype(np.float32)
    new = np.log(rng.dirichlet(np.full(vocabulary, 0.3), num_tokens)).astype(np.float32)
    support = np.argsort(-old, axis=1)[:, :k].astype(np.int32)
    named = np.argsort(-new, axis=1)[:, :top].astype(np.int32)
    sampled = support[:, 1]
    rows = np.arange(num_tokens)[:, None]
    teacher = Scores(new[rows[:, 0], sampled], named, new[rows, named], version=0)
    target = topk_distillation(sampled, support, old[rows, support], teacher, clip)
    for i in range(num_tokens):
        weights = np.exp(old[i, support[i]]) / np.exp(old[i, support[i]]).sum()
        for j, token in enumerate(support[i]):
            difference = np.clip(new[i, token] - old[i, token], -clip, clip)
            if token in named[i] or token == sampled[i]:
                assert target.valid[i, j]
            if target.valid[i, j]:  # a bounded entry must equal the truth too
                assert target.advantages[i, j] == pytest.approx(difference * weights[j], abs=1e-5)


# Two positions; the student named 3, 4, 5 at both and sampled 4, then 9, which is none of its likeliest.
CAPTURE = Capture(
    prompt_ids=np.array([1], np.int32),
    completion_ids=np.array([4, 9], np.int32),
    logprobs=np.log(np.array([0.2, 0.01], np.float32)),
    top_ids=np.array([[3, 4, 5], [3, 4, 5]], np.int32),
    top_logprobs=np.log(np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.1]], np.float32)),
    versions=(VersionSpan(0, 0, 2),),
)
LIKELIEST = scores(np.log([0.3, 0.4]), [[5, 7, 4], [9, 8, 3]], np.log([[0.5, 0.3, 0.1], [0.4, 0.3, 0.2]]))


def test_the_teachers_support_is_known_where_the_student_named_or_sampled_it():
    support, old = distillation_support("teacher", 2, CAPTURE, LIKELIEST)
    np.testing.assert_array_equal(support, [[5, 7], [9, 8]])
    np.testing.assert_allclose(old, np.log([[0.1, np.nan], [0.01, np.nan]]), rtol=1e-6)  # 5 by name, 9 as sampled
    target = topk_distillation(CAPTURE.completion_ids, support, old, LIKELIEST, 2.0)
    np.testing.assert_array_equal(target.valid, [[True, False], [True, False]])
    # Alone in what is known, each weighs 1: D = log(.5 / .1), and log(.4 / .01) cut to 2.
    np.testing.assert_allclose(target.advantages, [[np.log(5), 0], [2, 0]], rtol=1e-6)
    assert np.isfinite(target.behaviour_logprobs).all()


def test_the_teachers_support_shares_weight_among_what_is_known():
    support, old = distillation_support("teacher", 3, CAPTURE, LIKELIEST)
    target = topk_distillation(CAPTURE.completion_ids, support, old, LIKELIEST, 2.0)
    np.testing.assert_array_equal(target.valid, [[True, False, True], [True, False, True]])
    # 5: log(.5/.1)·(.1/.3), 4: log(.3/.2)·(.2/.3), of which the teacher says .3 as sampled; 3: log(.2/.5)·(.5/.51).
    expected = [[np.log(5) / 3, 0, np.log(1.5) * 2 / 3], [2 * 0.01 / 0.51, 0, np.log(0.4) * 0.5 / 0.51]]
    np.testing.assert_allclose(target.advantages, expected, rtol=1e-5)


def test_the_overlap_is_what_both_name():
    teacher = scores([np.log(0.5), -1], [[4, 7], [8, 9]], np.log([[0.5, 0.3]] * 2))
    support, old = distillation_support("overlap", 2, CAPTURE, teacher)
    np.testing.assert_array_equal(support, [[3, 4], [3, 4]])
    np.testing.assert_allclose(old, np.log([[np.nan, 0.2], [np.nan, np.nan]]), rtol=1e-6)
    target = topk_distillation(CAPTURE.completion_ids, support, old, teacher, 2.0)
    np.testing.assert_array_equal(target.valid, [[False, True], [False, False]])  # and nothing where nothing is shared
    np.testing.assert_allclose(target.advantages, [[0, np.log(2.5)], [0, 0]], rtol=1e-6)


def test_the_students_support_is_what_it_named():
    support, old = distillation_support("student", 2, CAPTURE, LIKELIEST)
    np.testing.assert_array_equal(support, CAPTURE.top_ids[:, :2])
    np.testing.assert_array_equal(old, CAPTURE.top_logprobs[:, :2])


def test_a_teacher_of_another_reply_is_refused():
    teacher = scores([-0.5], [[7]], [[-0.2]])
    with pytest.raises(ValueError, match="scored 1 tokens of a reply of 2"):
        token_distillation(np.array([7, 8], np.int32), np.zeros(2, np.float32), teacher, 1.0)


def test_a_teacher_that_gives_no_number_gives_no_target():
    teacher = scores([np.nan, -np.inf], [[7], [8]], [[-0.2], [-0.3]])
    target = token_distillation(np.array([5, 6], np.int32), np.array([-1.0, -1.0], np.float32), teacher, 1.0)
    np.testing.assert_array_equal(target.valid, [[False], [True]])
    np.testing.assert_allclose(target.advantages, [[0.0], [-1.0]])  # impossible for the teacher: the largest pull away
