"""The teacher elsewhere, without it: how vLLM's rows are read, and what cannot be started."""

from __future__ import annotations

import numpy as np
import pytest

from clawrl.config import load_config
from clawrl.errors import ConfigError, JudgeError
from clawrl.main import check
from clawrl.serving.teacher import scores_of


def row(**tokens: tuple[float, int]) -> dict:
    """`t<id>=(logprob, rank)`."""
    return {name[1:]: {"logprob": logprob, "rank": rank} for name, (logprob, rank) in tokens.items()}


def test_rows_are_read_by_token_and_rank():
    rows = [row(t7=(-0.5, 1), t9=(-1.0, 2)), row(t3=(-4.0, 31), t1=(-0.1, 1), t2=(-3.0, 2))]
    scores = scores_of(rows, np.array([9, 3], np.int32), 2)
    np.testing.assert_array_equal(scores.logprobs, np.array([-1.0, -4.0], np.float32))
    np.testing.assert_array_equal(scores.top_ids, [[7, 9], [1, 2]])
    np.testing.assert_array_equal(scores.top_logprobs, np.array([[-0.5, -1.0], [-0.1, -3.0]], np.float32))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "scored 0 tokens of a reply of 1"),
        ([row(t1=(-0.1, 1), t2=(-3.0, 2))], "lacks token 9"),
        ([row(t9=(-0.1, 1))], "fewer than 2"),
    ],
)
def test_rows_of_other_tokens_are_no_scores(rows, told):
    with pytest.raises(JudgeError, match=told):
        scores_of(rows, np.array([9], np.int32), 2)


def test_an_external_teacher_and_its_url_go_together():
    url = ["teacher.url=http://there/v1", "teacher.served_name=big"]
    for words in (["learning.teacher=external"], url):
        with pytest.raises(ConfigError, match=r"do not go together; set learning\.teacher=external"):
            load_config(None, words)
    assert load_config(None, [*url, "learning.teacher=external"]).teacher.served_name == "big"


def test_a_teacher_without_its_key_is_refused_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    words = ["learning.teacher=external", "teacher.url=http://there/v1", "teacher.served_name=big"]
    with pytest.raises(ConfigError, match="NO_SUCH_KEY"):
        check(load_config(None, [*words, "teacher.key_env=NO_SUCH_KEY", f"run_root={tmp_path}"]))
