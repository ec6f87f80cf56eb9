"""Judge and teacher elsewhere: vLLM's own OpenAI server with the tiny model, and another tokenizer beside it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clawrl.algorithms.hints import with_hint
from clawrl.config import EndpointSection, JudgeSection, model_path
from clawrl.errors import ConfigError, JudgeError
from clawrl.serving.judge import OutsideJudge
from clawrl.serving.teacher import OutsideTeacher, require_teacher
from clawrl.testing import ScriptedPolicy, next_state
from clawrl.training.model import TokenScorer
from envs.toolcall.stock import TOOLS
from jobs import free_port
from jobs.bench.programs import program

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

QUESTION = {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does Tom have?"}
TOP = 6


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The policy's engine behind vLLM's own server."""
    port = free_port()
    with program([sys.executable, "-m", "jobs.bench.bare", str(port)], f"http://127.0.0.1:{port}/health"):
        yield f"http://127.0.0.1:{port}/v1"


def there(url: str, **more: Any) -> EndpointSection:
    return EndpointSection(url=url, served_name="clawrl", **more)


async def judge_at(url: str) -> OutsideJudge:
    judge = OutsideJudge.__new__(OutsideJudge)
    section = JudgeSection.model_validate({"url": url, "served_name": "clawrl", "timeout_s": 60.0})
    await judge.__init__(section, hints=True)
    return judge


async def test_it_judges_as_the_own_engine_does(url):
    """The tiny model's own questions, asked of it over HTTP: praise is good, a wish is bad and makes a hint."""
    made = ScriptedPolicy().turn([QUESTION])
    reply = {"role": "assistant", "content": "**Step 1:** 3 + 4 = 7\n**Answer:** 7 apples"}
    turn = type(made)(**{**{name: getattr(made, name) for name in made.__slots__}, "reply": reply})
    judge = await judge_at(url)
    liked = await judge.judge(turn, next_state(turn, "Thank you!"))
    disliked = await judge.judge(turn, next_state(turn, "Please write it in plain sentences, without bold."))
    assert (liked.score, liked.hints, liked.error) == (1, (), None)
    assert (disliked.score, disliked.error) == (-1, None)
    assert disliked.hints


async def test_it_scores_exactly_the_given_tokens_under_the_hinted_prompt(url):
    """Against the trainer's own forward pass over the same ids, with tools in the prompt."""
    teacher = OutsideTeacher(there(url), 60)
    hinted, reply = with_hint([QUESTION], "Answer in plain sentences."), np.array([17, 300, 299, 42, 5], np.int32)
    scores = await teacher.score_messages(hinted, TOOLS, {}, reply, TOP)
    prompt = await teacher.render(hinted, TOOLS, {})
    scorer = TokenScorer.load(model_path("clawrl:tiny"), logit_chunk=64, activation_checkpointing=False)
    token_ids = torch.tensor([*prompt, *reply.tolist()])
    positions = torch.arange(len(prompt) - 1, len(token_ids) - 1)
    support = torch.from_numpy(scores.top_ids.astype(np.int64))
    with torch.no_grad():
        own = scorer(
            token_ids, torch.arange(len(token_ids)), [0, len(token_ids)], positions, token_ids[positions + 1], support
        )
    np.testing.assert_allclose(scores.logprobs, own.logprobs.numpy(), atol=2e-3)
    np.testing.assert_allclose(scores.top_logprobs, own.support.numpy(), atol=2e-3)
    assert (np.diff(scores.top_logprobs) <= 0).all()
    plain = await teacher.score_messages([QUESTION], TOOLS, {}, reply, TOP)
    assert np.abs(plain.logprobs - scores.logprobs).max() > 0.01, "the hint must be in what was scored"


async def test_the_same_tokenizer_is_accepted_and_another_one_refused(url, tmp_path):
    await require_teacher(there(url), "clawrl:tiny", TOP)
    with pytest.raises(ConfigError, match=r"teacher_top=100000 needs vLLM's --max-logprobs"):
        await require_teacher(there(url), "clawrl:tiny", 100_000)
    for name, change in (("template", _other_template), ("vocabulary", _other_vocabulary)):
        other = tmp_path / name
        shutil.copytree(model_path("clawrl:tiny"), other)
        change(other)
        with pytest.raises(ConfigError, match=r"renders other tokens than policy\.model=.*with the same tokenizer"):
            await require_teacher(there(url), str(other), TOP)


def _other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> ", 1))


def _other_vocabulary(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    del tree["model"]["merges"][:200]
    path.write_text(json.dumps(tree))


async def test_what_does_not_fit_is_refused_and_nothing_is_guessed(url):
    teacher = OutsideTeacher(there(url), 60)
    with pytest.raises(JudgeError, match="HTTP 400"):
        await teacher.score_messages([QUESTION], (), {}, np.zeros(5000, np.int32), TOP)
    with pytest.raises(JudgeError, match="HTTP 404"):
        await OutsideTeacher(EndpointSection(url=url, served_name="other"), 60).score_messages(
            [QUESTION], (), {}, np.array([5], np.int32), TOP
        )
