"""From a judged turn to a sample: every term, every way to have none, against hand-computed targets."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clawrl.config import LearningSection
from clawrl.errors import JudgeError
from clawrl.rollout.samples import build_sample, is_held_out, needs_scores, require_complete, trains
from clawrl.testing import ScriptedJudge, ScriptedPolicy, render
from clawrl.types import Capture, Judgement, Scores, Turn, VersionSpan

PROMPT = np.array([7, 8, 9], np.int32)
REPLY = np.array([1, 2], np.int32)
LOGPROBS = np.log(np.array([0.5, 0.25], np.float32))
TOP_IDS = np.array([[1, 4], [3, 2]], np.int32)
TOP_LOGPROBS = np.log(np.array([[0.5, 0.25], [0.5, 0.25]], np.float32))


def make_turn(**changes) -> Turn:
    capture = Capture(
        prompt_ids=PROMPT,
        completion_ids=REPLY,
        logprobs=changes.pop("logprobs", LOGPROBS),
        top_ids=TOP_IDS,
        top_logprobs=TOP_LOGPROBS,
        versions=changes.pop("versions", (VersionSpan(5, 0, 2),)),
    )
    turn = Turn(
        id="turn-1",
        user="ann",
        session="s",
        index=0,
        kind="main",
        source="chat",
        group=None,
        messages=({"role": "user", "content": "hi"},),
        tools=(),
        template={},
        reply={"role": "assistant", "content": "hello"},
        finish_reason="stop",
        conversation="digest",
        capture=capture,
        started=1.0,
        ended=2.0,
    )
    return replace(turn, **changes)


def judged(score: int | None = 1, hints: tuple[str, ...] = ()) -> Judgement:
    return Judgement("turn-1", (score,), score, hints, judge_version=0, seconds=0.1, error=None, at=3.0)


def scored(logprobs, top_ids, top_logprobs) -> Scores:
    return Scores(
        np.asarray(logprobs, np.float32), np.asarray(top_ids, np.int32), np.asarray(top_logprobs, np.float32), version=0
    )


# The teacher at both positions: half on token 1 or 2, the rest on tokens that the student's support has or has not.
TEACHER = scored(
    np.log([0.6, 0.5]),
    [[1, 4, 6], [2, 3, 6]],
    np.log([[0.6, 0.2, 0.1], [0.5, 0.3, 0.1]]),
)
REFERENCE = scored([-0.5, -1.5], np.zeros((2, 0)), np.zeros((2, 0)))
HINT = ("be brief",)


def build(judgement, *, turn=None, teacher=(), reference=None, mean=0.0, **learning) -> Any:
    section = LearningSection.model_validate({"support": 2, **learning})
    return build_sample(turn or make_turn(), judgement, teacher, reference, mean, section)


def test_binary_rl_by_hand():
    sample = build(judged(1), method="rl", mean=0.25, rl_weight=2.0)
    np.testing.assert_array_equal(sample.token_ids, [7, 8, 9, 1, 2])
    np.testing.assert_array_equal(sample.loss_mask, [False, False, False, True, True])
    np.testing.assert_allclose(sample.logprobs, [0, 0, 0, *LOGPROBS])
    np.testing.assert_allclose(sample.advantages, [0, 0, 0, 1.5, 1.5])
    assert sample.distillation is None
    assert sample.reference_logprobs is None
    assert (sample.id, sample.user, sample.source, sample.at) == ("turn-1", "ann", "chat", 3.0)
    assert (sample.oldest_version, sample.newest_version, sample.weight) == (5, 5, 1.0)
    types = (sample.token_ids.dtype, sample.loss_mask.dtype, sample.logprobs.dtype, sample.advantages.dtype)
    assert types == (np.int32, np.bool_, np.float32, np.float32)


def test_topk_distillation_by_hand():
    """A_v = D_v w_v with w = softmax of the student over the support and D = clip(teacher - student, -C, C)."""
    sample = build(judged(None, HINT), method="opd", teacher=[TEACHER], opd_weight=3.0, difference_clip=0.5)
    target = sample.distillation
    np.testing.assert_array_equal(target.support[3:], TOP_IDS)
    np.testing.assert_array_equal(target.valid, [[False] * 2] * 3 + [[True] * 2] * 2)
    differences = np.log(np.array([[0.6 / 0.5, 0.2 / 0.25], [0.3 / 0.5, 0.5 / 0.25]]))
    weights = np.array([[2 / 3, 1 / 3], [2 / 3, 1 / 3]])
    np.testing.assert_allclose(target.advantages[3:], 3 * weights * differences.clip(-0.5, 0.5), rtol=1e-5)
    np.testing.assert_allclose(target.behaviour_logprobs[3:], TOP_LOGPROBS, rtol=1e-6)
    assert not target.advantages[:3].any()
    assert sample.advantages is None, "an abstention has no policy-gradient term"


def test_the_support_is_the_configured_one():
    """The teacher's two likeliest: 1 and 4, then 2 and 3, all named by the student. Of its one, 3 is no overlap."""
    teachers = build(judged(None, HINT), method="opd", teacher=[TEACHER], distillation_support="teacher").distillation
    np.testing.assert_array_equal(teachers.support[3:], [[1, 4], [2, 3]])
    np.testing.assert_allclose(teachers.behaviour_logprobs[3:], np.log([[0.5, 0.25], [0.25, 0.5]]), rtol=1e-6)
    shared = build(
        judged(None, HINT), method="opd", teacher=[TEACHER], distillation_support="overlap", support=1
    ).distillation
    np.testing.assert_array_equal(shared.valid[3:], [[True], [False]])
    np.testing.assert_allclose(shared.advantages[3:], [[np.log(0.6 / 0.5)], [0]], rtol=1e-5)


def test_the_divergence_keeps_what_the_teacher_named():
    sample = build(judged(-1, HINT), distillation="kl", teacher=[TEACHER], opd_weight=3.0)
    assert sample.distillation is None
    np.testing.assert_allclose(sample.advantages[3:], -1)
    np.testing.assert_array_equal(sample.teacher_top.ids[3:], TEACHER.top_ids)
    np.testing.assert_allclose(sample.teacher_top.logprobs[3:], TEACHER.top_logprobs)
    np.testing.assert_array_equal(sample.teacher_top.weights, [0, 0, 0, 3, 3])
    alone = build(judged(None, HINT), distillation="kl", teacher=[TEACHER], method="opd")
    assert alone.advantages is None
    assert build(judged(None, HINT), distillation="kl", teacher=[None], method="opd") is None


def test_a_token_that_the_teacher_gave_no_number_is_none_that_it_named():
    top = np.array(TEACHER.top_logprobs)
    top[0, 1], top[1] = np.nan, -np.inf
    sample = build(judged(None, HINT), distillation="kl", teacher=[replace(TEACHER, top_logprobs=top)], opd_weight=3.0)
    np.testing.assert_array_equal(np.isneginf(sample.teacher_top.logprobs[3:]), [[False, True, False], [True] * 3])
    np.testing.assert_array_equal(sample.teacher_top.weights[3:], [3, 0])


def test_token_distillation_by_hand():
    sample = build(judged(1, HINT), method="opd", distillation="token", teacher=[TEACHER], difference_clip=2.0)
    target = sample.distillation
    np.testing.assert_array_equal(target.support[3:, 0], REPLY)
    np.testing.assert_allclose(target.advantages[3:, 0], np.log([0.6 / 0.5, 0.5 / 0.25]), rtol=1e-5)
    assert sample.advantages is None, "opd learns from hints alone"


def test_hybrid_has_all_three_terms():
    sample = build(judged(-1, HINT), teacher=[TEACHER], reference=REFERENCE, mean=0.5)
    np.testing.assert_allclose(sample.advantages[3:], -1.5)
    assert sample.distillation.valid[3:].all()
    np.testing.assert_allclose(sample.reference_logprobs, [0, 0, 0, -0.5, -1.5])


@pytest.mark.parametrize(
    ("judgement", "learning"),
    [
        (judged(0), {"baseline": "none"}),
        (judged(0), {"method": "rl"}),
        (judged(None), {}),
        (judged(None, HINT), {"method": "rl"}),
        (judged(1), {"method": "opd"}),
        (judged(1), {"rl_weight": 0.0}),
        (judged(None, HINT), {"opd_weight": 0.0}),
    ],
    ids=["neutral", "neutral-at-zero", "abstains", "rl-abstains", "opd-no-hint", "rl-weight-0", "opd-weight-0"],
)
def test_nothing_to_learn_makes_no_sample(judgement, learning):
    """The KL term alone is no reason to train: it would only spend a place in the batch."""
    teacher = [TEACHER] if judgement.hints else []
    assert build(judgement, teacher=teacher, reference=REFERENCE, **learning) is None


def test_neutral_against_a_baseline_is_worse_than_usual():
    np.testing.assert_allclose(build(judged(0), mean=0.4).advantages[3:], -0.4)


def test_without_a_baseline_the_running_mean_is_ignored():
    np.testing.assert_allclose(build(judged(1), mean=0.4).advantages[3:], 0.6, rtol=1e-6)
    np.testing.assert_allclose(build(judged(1), mean=0.4, baseline="none").advantages[3:], 1.0)


def test_a_failed_teacher_drops_only_its_term():
    sample = build(judged(-1, HINT), teacher=[None], reference=REFERENCE)
    assert sample.distillation is None
    np.testing.assert_allclose(sample.advantages[3:], -1)
    assert build(judged(None, HINT), teacher=[None]) is None


def test_one_failed_teacher_of_two_leaves_the_other():
    both = build(judged(None, ("a", "bb")), method="opd", teacher=[None, TEACHER])
    one = build(judged(None, HINT), method="opd", teacher=[TEACHER])
    np.testing.assert_array_equal(both.distillation.advantages, one.distillation.advantages)


def test_a_teacher_that_agrees_with_the_reply_teaches_nothing():
    same = scored(LOGPROBS, TOP_IDS, TOP_LOGPROBS)
    assert build(judged(None, HINT), method="opd", teacher=[same]) is None


def test_no_reference_no_kl_term():
    assert build(judged(1), reference=None).reference_logprobs is None
    assert build(judged(1), reference=REFERENCE, kl_weight=0.0).reference_logprobs is None


# Overlap with the student's top-2 per position: ALIEN 0 and 2, TEACHER 2 and 2, so `sequence` takes TEACHER.
ALIEN = scored(np.log([0.1, 0.5]), [[6, 7, 8], [2, 3, 6]], np.log([[0.5, 0.3, 0.15], [0.5, 0.3, 0.1]]))
NEARLY = scored(np.log([0.3, 0.1]), [[1, 4, 6], [6, 7, 8]], np.log([[0.3, 0.3, 0.2], [0.5, 0.3, 0.15]]))


@pytest.mark.parametrize(("rule", "chosen"), [("sequence", 1), ("shortest", 0), ("longest", 1)])
def test_hint_selection_by_sequence(rule, chosen):
    teacher = [ALIEN, TEACHER]
    sample = build(judged(None, ("a", "bb")), method="opd", teacher=teacher, hint_rule=rule)
    alone = build(judged(None, ("a",)), method="opd", teacher=[teacher[chosen]])
    np.testing.assert_array_equal(sample.distillation.advantages, alone.distillation.advantages)


def test_hint_selection_by_token_picks_per_position():
    """NEARLY overlaps at the first position, ALIEN at the second."""
    sample = build(judged(None, ("a", "bb")), method="opd", teacher=[NEARLY, ALIEN], hint_rule="token")
    first = build(judged(None, ("a",)), method="opd", teacher=[NEARLY])
    second = build(judged(None, ("a",)), method="opd", teacher=[ALIEN])
    np.testing.assert_array_equal(sample.distillation.advantages[3], first.distillation.advantages[3])
    np.testing.assert_array_equal(sample.distillation.advantages[4], second.distillation.advantages[4])


def test_random_hint_is_the_same_for_the_same_turn():
    def chosen(id: str) -> np.ndarray:
        turn = make_turn(id=id)
        return build(
            judged(None, ("a", "bb")), turn=turn, method="opd", teacher=[NEARLY, TEACHER], hint_rule="random"
        ).distillation.advantages

    np.testing.assert_array_equal(chosen("turn-1"), chosen("turn-1"))
    assert len({chosen(f"turn-{i}").tobytes() for i in range(20)}) == 2


def test_versions_are_the_oldest_and_the_newest():
    sample = build(judged(1), turn=make_turn(versions=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))))
    assert (sample.oldest_version, sample.newest_version) == (3, 4)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"finish_reason": "stop"}, True),
        ({"finish_reason": "tool_calls"}, True),
        ({"finish_reason": "length"}, True),
        ({"finish_reason": "abort"}, False),
        ({"finish_reason": "error"}, False),
        ({"finish_reason": ""}, False),
        ({"kind": "side"}, False),
    ],
)
def test_which_turns_train(changes, trained):
    turn = make_turn(**changes)
    assert trains(turn) is trained
    assert (build(judged(1), turn=turn) is not None) is trained
    assert needs_scores(turn, judged(1, HINT), LearningSection()) == (trained, trained)


def test_an_empty_reply_makes_no_sample():
    capture = Capture(PROMPT, REPLY[:0], LOGPROBS[:0], TOP_IDS[:0], TOP_LOGPROBS[:0], versions=())
    assert build(judged(1), turn=make_turn(capture=capture)) is None


def test_a_token_without_a_logprob_is_left_out_not_taken_for_certain():
    turn = make_turn(logprobs=np.array([np.nan, LOGPROBS[1]], np.float32))
    sample = build(judged(-1, HINT), turn=turn, teacher=[TEACHER], reference=REFERENCE)
    np.testing.assert_array_equal(sample.loss_mask, [False] * 4 + [True])
    assert sample.logprobs[3] == sample.advantages[3] == 0
    assert not sample.distillation.valid[3].any()
    assert sample.distillation.valid[4].all()
    nothing = make_turn(logprobs=np.full(2, np.nan, np.float32))
    assert build(judged(-1, HINT), turn=nothing, teacher=[TEACHER]) is None


@pytest.mark.parametrize(
    ("judgement", "learning", "needed"),
    [
        (judged(1), {}, (False, True)),
        (judged(1, HINT), {}, (True, True)),
        (judged(1, HINT), {"kl_weight": 0.0}, (True, False)),
        (judged(None, HINT), {"method": "opd"}, (True, True)),
        (judged(1, HINT), {"method": "rl"}, (False, True)),
        (judged(None), {}, (False, False)),
        (judged(1), {"method": "opd"}, (False, False)),
        (judged(0), {"baseline": "none"}, (False, False)),
        (judged(0), {"baseline": "ema"}, (False, True)),
    ],
)
def test_only_scores_that_can_be_used_are_asked_for(judgement, learning, needed):
    assert needs_scores(make_turn(), judgement, LearningSection.model_validate(learning)) == needed


def test_incomplete_scores_are_refused():
    require_complete(REFERENCE, make_turn())
    with pytest.raises(JudgeError, match="1 tokens were scored of a reply of 2"):
        require_complete(scored([-1.0], np.zeros((1, 0)), np.zeros((1, 0))), make_turn())
    with pytest.raises(JudgeError, match="finite"):
        require_complete(scored([-1.0, np.nan], np.zeros((2, 0)), np.zeros((2, 0))), make_turn())


def test_folded_weights_scale_the_clipped_surrogate():
    """w·min(ρA, clip(ρ)A) = min(ρ·wA, clip(ρ)·wA): why the trainer needs no weights of terms."""
    rng = np.random.default_rng(0)
    ratio, advantage, weight = rng.uniform(0.2, 3, 100), rng.normal(size=100), rng.uniform(0, 5, 100)

    def surrogate(advantages: np.ndarray) -> np.ndarray:
        return np.minimum(ratio * advantages, ratio.clip(0.8, 1.28) * advantages)

    np.testing.assert_allclose(weight * surrogate(advantage), surrogate(weight * advantage), rtol=1e-12)


# -- the scripted model that these and the cluster tests stand on ------------------------------------------------------


def test_scripted_scores_are_the_captured_behaviour():
    turn = ScriptedPolicy(seed=3).turn([{"role": "user", "content": "hi"}], num_tokens=6)
    capture = turn.capture
    judge = ScriptedJudge(seed=3)
    scores = asyncio.run(judge.score_ids(capture.prompt_ids, capture.completion_ids, 4))
    np.testing.assert_array_equal(scores.logprobs, capture.logprobs)
    np.testing.assert_array_equal(scores.top_ids, capture.top_ids)
    everything = asyncio.run(judge.score_ids(capture.prompt_ids, capture.completion_ids, 256))
    np.testing.assert_allclose(np.exp(everything.top_logprobs).sum(-1), 1, rtol=1e-5)


def test_a_hint_changes_what_the_scripted_teacher_says_of_every_token():
    turn = ScriptedPolicy().turn([{"role": "user", "content": "hi"}], num_tokens=6)
    hinted = ({"role": "user", "content": "hi, and be brief"},)
    scores = asyncio.run(ScriptedPolicy().score_messages(hinted, (), {}, turn.capture.completion_ids, 4))
    assert (np.abs(scores.logprobs - turn.capture.logprobs) > 1e-3).all()
    np.testing.assert_array_equal(render(turn.messages, (), {}), turn.capture.prompt_ids)


def test_a_fixed_share_of_sessions_is_held_out():
    names = [f"session-{i}" for i in range(4000)]
    held = [name for name in names if is_held_out(name, 0.1)]
    assert 0.08 < len(held) / len(names) < 0.12
    assert all(is_held_out(name, 0.2) for name in held)  # a larger share holds out more, and never others instead
    assert not any(is_held_out(name, 0.0) for name in names)
    assert [name for name in names if is_held_out(name, 0.1)] == held
