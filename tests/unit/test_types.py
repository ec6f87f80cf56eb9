"""Records refuse lengths and shapes that do not belong together, and say which."""

import dataclasses
import pickle
from typing import Any

import numpy as np
import pytest

from clawrl.types import Batch, Capture, Distillation, Feedback, Sample, Scores, VersionSpan


def capture(num_tokens: int = 3, **changed: Any) -> Capture:
    fields = {
        "prompt_ids": np.arange(5, dtype=np.int32),
        "completion_ids": np.arange(num_tokens, dtype=np.int32),
        "logprobs": np.full(num_tokens, -1.0, np.float32),
        "top_ids": np.zeros((num_tokens, 2), np.int32),
        "top_logprobs": np.full((num_tokens, 2), -1.0, np.float32),
        "versions": (VersionSpan(0, 0, 2), VersionSpan(1, 2, num_tokens)),
    }
    return Capture(**{**fields, **changed})


def sample(length: int = 4, **changed: Any) -> Sample:
    fields = {
        "id": "turn",
        "user": "ann",
        "source": "chat",
        "token_ids": np.arange(length, dtype=np.int32),
        "loss_mask": np.array([False] * (length - 1) + [True]),
        "logprobs": np.zeros(length, np.float32),
        "advantages": None,
        "distillation": None,
        "reference_logprobs": None,
        "oldest_version": 0,
        "newest_version": 0,
        "weight": 1.0,
        "at": 0.0,
    }
    return Sample(**{**fields, **changed})


def distillation(length: int, **changed: Any) -> Distillation:
    fields = {
        "support": np.zeros((length, 2), np.int32),
        "behaviour_logprobs": np.zeros((length, 2), np.float32),
        "advantages": np.zeros((length, 2), np.float32),
        "valid": np.ones((length, 2), bool),
    }
    return Distillation(**{**fields, **changed})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"logprobs": np.zeros(2, np.float32)}, "Capture.logprobs has 2 rows, expected 3"),
        ({"top_ids": np.zeros((4, 2), np.int32)}, "Capture.top_ids has 4 rows, expected 3"),
        ({"top_logprobs": np.zeros((3, 1), np.float32)}, r"Capture.top_logprobs has shape \(3, 1\), expected \(3, 2\)"),
        ({"versions": (VersionSpan(0, 0, 2),)}, "Capture.versions cover 2 tokens of 3"),
        ({"versions": ()}, "Capture.versions cover 0 tokens of 3"),
    ],
)
def test_capture_refuses_a_mismatch(changed, named):
    with pytest.raises(ValueError, match=named):
        capture(**changed)


def test_an_empty_reply_is_a_capture():
    assert len(capture(0, versions=()).completion_ids) == 0


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"loss_mask": np.ones(3, bool)}, "Sample.loss_mask has 3 rows, expected 4"),
        ({"logprobs": np.zeros(5, np.float32)}, "Sample.logprobs has 5 rows, expected 4"),
        ({"advantages": np.zeros(3, np.float32)}, "Sample.advantages has 3 rows, expected 4"),
        ({"reference_logprobs": np.zeros(0, np.float32)}, "Sample.reference_logprobs has 0 rows, expected 4"),
        ({"distillation": distillation(3)}, "Sample.distillation has 3 rows, expected 4"),
        ({"loss_mask": np.zeros(4, bool)}, "Sample turn has no trained token"),
    ],
)
def test_sample_refuses_a_mismatch(changed, named):
    with pytest.raises(ValueError, match=named):
        sample(**changed)


def test_sample_with_every_target():
    full = sample(
        advantages=np.ones(4, np.float32), reference_logprobs=np.ones(4, np.float32), distillation=distillation(4)
    )
    assert full.distillation is not None
    assert full.distillation.support.shape == (4, 2)


@pytest.mark.parametrize("name", ["behaviour_logprobs", "advantages", "valid"])
def test_distillation_refuses_a_mismatch(name):
    with pytest.raises(ValueError, match=rf"Distillation.{name} has shape \(4, 3\), expected \(4, 2\)"):
        distillation(4, **{name: np.zeros((4, 3))})


def test_scores_refuse_a_mismatch():
    logprobs, top = np.zeros(3, np.float32), np.zeros((3, 2), np.float32)
    assert Scores(logprobs, top.astype(np.int32), top, 0).version == 0
    with pytest.raises(ValueError, match=r"Scores\.top_ids has 2 rows, expected 3"):
        Scores(logprobs, top[:2].astype(np.int32), top, 0)
    with pytest.raises(ValueError, match=r"Scores\.top_logprobs"):
        Scores(logprobs, top.astype(np.int32), top[:, :1], 0)


def test_feedback_says_something():
    assert Feedback("f", "t", "ann", 0, None, 0.0).score == 0
    assert Feedback("f", "t", "ann", None, "shorter", 0.0).score is None
    with pytest.raises(ValueError, match="score or a text"):
        Feedback("f", "t", "ann", None, None, 0.0)


def test_records_are_frozen_and_survive_pickling():
    original = Batch(7, (sample(),))
    copy = pickle.loads(pickle.dumps(original))
    assert copy.step == 7
    assert copy.samples[0].token_ids.tolist() == original.samples[0].token_ids.tolist()
    with pytest.raises(dataclasses.FrozenInstanceError):
        copy.step = 8
