"""A method of the user's own: found by its dotted path, given all that is known, told where it fails."""

import textwrap
from typing import Any

import numpy as np
import pytest
from test_samples import HINT, LOGPROBS, REFERENCE, TEACHER, judged, make_turn

from clawrl.algorithms.methods import Evidence, TokenTargets, load_method
from clawrl.config import LearningSection, load_config
from clawrl.errors import ConfigError, MethodError
from clawrl.rollout.samples import build_sample, needs_scores
from clawrl.types import Distillation, TeacherTop

EXAMPLE = """
    # doubt.py, on the Python path: Binary RL that leaves alone what the policy was sure of
    import numpy as np
    from clawrl.algorithms.methods import Evidence, TokenTargets

    def method(evidence: Evidence) -> TokenTargets | None:
        if evidence.judgement.score is None:
            return None
        doubt = 1 - np.exp(evidence.turn.capture.logprobs)
        return TokenTargets(advantages=(evidence.judgement.score - evidence.baseline) * doubt)
"""
"""As the README shows it, with `clawrl serve learning.method=doubt:method`."""


def build(method: str, judgement=None, turn=None, teacher=(), baseline: float = 0.0) -> Any:
    learning = LearningSection(method=f"test_methods:{method}")
    return build_sample(turn or make_turn(), judgement or judged(1), teacher, REFERENCE, baseline, learning)


def test_the_readmes_example_as_written(tmp_path, monkeypatch):
    (tmp_path / "doubt.py").write_text(textwrap.dedent(EXAMPLE))
    monkeypatch.syspath_prepend(tmp_path)
    learning = load_config(None, ["learning.method=doubt:method"]).learning
    load_method(learning)
    sample: Any = build_sample(make_turn(), judged(-1), (), REFERENCE, 0.25, learning)
    np.testing.assert_allclose(sample.advantages, [0, 0, 0, -1.25 * 0.5, -1.25 * 0.75])
    assert sample.advantages.dtype == np.float32
    np.testing.assert_allclose(sample.reference_logprobs, [0, 0, 0, -0.5, -1.5])
    assert build_sample(make_turn(), judged(None), (), REFERENCE, 0.25, learning) is None


def everything(evidence: Evidence) -> TokenTargets:
    """Each kind of target, from each kind of evidence."""
    assert evidence.turn.user == "ann"
    [teacher] = evidence.teacher
    assert evidence.reference is REFERENCE
    worth = np.full(2, evidence.baseline + evidence.learning.rl_weight)
    ids, valid = evidence.turn.capture.completion_ids[:, None], np.ones((2, 1), np.bool_)
    return TokenTargets(
        worth,
        Distillation(ids, evidence.turn.capture.logprobs[:, None], teacher.logprobs[:, None], valid),
        TeacherTop(teacher.top_ids, teacher.top_logprobs, np.ones(2, np.float32)),
    )


def test_all_targets_from_all_evidence():
    sample = build("everything", judged(None, HINT), teacher=[None, TEACHER], baseline=0.5)
    np.testing.assert_allclose(sample.advantages, [0, 0, 0, 1.5, 1.5])
    np.testing.assert_allclose(sample.distillation.advantages[3:, 0], TEACHER.logprobs)
    np.testing.assert_array_equal(sample.teacher_top.ids[3:], TEACHER.top_ids)
    np.testing.assert_array_equal(sample.teacher_top.weights, [0, 0, 0, 1, 1])


def nothing(evidence: Evidence) -> TokenTargets:
    return TokenTargets()


def surprised(evidence: Evidence) -> TokenTargets:
    return TokenTargets(advantages=-evidence.turn.capture.logprobs)


def test_no_target_makes_no_sample():
    assert build("nothing") is None


def test_a_token_whose_logprob_is_unknown_needs_no_target():
    sample = build("surprised", turn=make_turn(logprobs=np.array([np.nan, LOGPROBS[1]], np.float32)))
    np.testing.assert_allclose(sample.advantages, [0, 0, 0, 0, -LOGPROBS[1]])


def broken(evidence: Evidence) -> TokenTargets:
    raise KeyError("length")


def too_short(evidence: Evidence) -> TokenTargets:
    return TokenTargets(advantages=np.zeros(1))


def two_axes(evidence: Evidence) -> TokenTargets:
    return TokenTargets(advantages=np.zeros((2, 1)))


def short_support(evidence: Evidence) -> TokenTargets:
    zeros = np.zeros((1, 2), np.float32)
    return TokenTargets(distillation=Distillation(zeros.astype(np.int32), zeros, zeros, zeros > 0))


def unbounded(evidence: Evidence) -> TokenTargets:
    return TokenTargets(advantages=np.array([np.inf, 0]))


def a_number(evidence: Evidence) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("broken", "KeyError: 'length'"),
        ("too_short", r"advantages of shape \(1,\) do not fit a reply of 2 tokens"),
        ("two_axes", r"advantages of shape \(2, 1\) do not fit"),
        ("short_support", r"distillation of shape \(1, 2\) do not fit"),
        ("unbounded", "not a finite number"),
        ("a_number", "returned float; return TokenTargets, or None"),
    ],
)
def test_a_function_that_fails_is_told_with_its_turn(method, told):
    with pytest.raises(MethodError, match=f"learning.method='test_methods:{method}' failed on turn turn-1: .*{told}"):
        build(method)


def of_two(evidence: Evidence, other: float) -> None: ...


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("test_methods:absent", "no attribute 'absent'"),
        ("nowhere.at_all:method", "No module named 'nowhere'"),
        ("test_methods:HINT", "is no function but a tuple"),
        ("test_methods:of_two", r"cannot be called with the evidence of a turn alone \(missing .*'other'"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_anything_starts(path, told):
    with pytest.raises(ConfigError, match=f"learning.method='{path}' .*{told}"):
        load_method(LearningSection(method=path))


def test_a_function_may_use_every_score_there_can_be():
    learning = LearningSection(method="test_methods:surprised")
    assert needs_scores(make_turn(), judged(None, HINT), learning) == (True, True)
    assert needs_scores(make_turn(), judged(None), learning) == (False, True)
    assert needs_scores(make_turn(kind="side"), judged(1, HINT), learning) == (False, False)
