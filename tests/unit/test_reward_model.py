"""A trained reward model: the head's maths by hand, the command over a real journal, and the judge that votes by it."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_endpoint import Elsewhere, elsewhere, made, outside, says  # noqa: F401  (elsewhere is a fixture)
from test_journal import turn
from transformers import AutoTokenizer

from clawrl.algorithms.reward import MARGIN, Head, auc, choose_l2, fit, probability, verdict
from clawrl.cli import main
from clawrl.commands.train_judge import FEWEST, HELD_OUT_SHARE
from clawrl.config import load_config, model_path
from clawrl.errors import ConfigError, JudgeError
from clawrl.journal.store import JournalStore
from clawrl.rollout.samples import is_held_out
from clawrl.serving.reward_model import ABOUT, Features, RewardModel, require_reward_model
from clawrl.testing import ScriptedPolicy, next_state
from clawrl.types import NOT_KEPT, Capture, Feedback, Turn, VersionSpan

NICE, RUDE = 40, 900
"""Tokens of the tiny model that approved and refused replies are full of."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two that wait for one another take a second for each reply where others use the cores."""
    torch.set_num_threads(1)


# -- the maths -------------------------------------------------------------------------------------------------------


def test_one_feature_by_hand():
    """x = ±1 = y, s = 1: by symmetry b = 0, and the derivative -(1 - sigmoid(w)) + l2·w vanishes at the w given."""
    features, labels = np.array([[1.0], [1.0], [-1.0], [-1.0]]), np.array([1, 1, -1, -1])
    for w in (0.5, 1.0, 2.0):
        head = fit(features, labels, l2=(1 - 1 / (1 + math.exp(-w))) / w)
        assert head.weight == pytest.approx([w], abs=1e-6)
        assert head.bias == pytest.approx(0, abs=1e-6)


def test_without_information_the_probability_is_the_share_of_approved_ones():
    head = fit(np.full((4, 2), 7.0), np.array([1, 1, 1, -1]), l2=0.1)
    assert head.weight == pytest.approx([0, 0])
    assert probability(head, np.full(2, 7.0)) == pytest.approx(3 / 4)
    assert head.bias == pytest.approx(math.log(3))


def noisy(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of three scales, the first of which tells the label more often than not."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([-1, 1], n)
    features = rng.normal(size=(n, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, -2.0]
    features[:, 0] += labels
    return features, labels


def test_the_gradient_is_zero_at_the_optimum():
    """mean (p - y) x_j + l2 s_j² w_j = 0 for each j, and mean (p - y) = 0."""
    features, labels = noisy()
    head = fit(features, labels, l2=0.05)
    wrong = probability(head, features) - (labels > 0)
    assert wrong.mean() == pytest.approx(0, abs=1e-6)
    gradient = (wrong[:, None] * features).mean(0) + 0.05 * features.var(0) * head.weight
    assert gradient / features.std(0) == pytest.approx([0, 0, 0], abs=1e-5)


def test_separable_labels_are_separated_and_strength_shrinks():
    features = np.array([[0.0, 1.0], [1.0, 3.0], [2.0, 1.5], [8.0, 2.0], [9.0, 1.0], [7.0, 3.0]])
    labels = np.array([-1, -1, -1, 1, 1, 1])
    heads = [fit(features, labels, l2) for l2 in (1e-4, 1e-2, 1.0, 100.0)]
    assert all(((probability(head, features) > 0.5) == (labels > 0)).all() for head in heads[:3])
    norms = [np.linalg.norm(head.weight) for head in heads]
    assert norms == sorted(norms, reverse=True)
    assert probability(heads[-1], features) == pytest.approx(np.full(6, 0.5), abs=0.02)


def test_one_kind_of_label_is_no_question():
    with pytest.raises(ValueError, match="labels of both"):
        fit(np.eye(2), np.array([1, 1]), 0.1)
    with pytest.raises(ValueError, match="l2=0"):
        fit(np.eye(2), np.array([1, -1]), 0)


def test_the_strength_is_chosen_by_what_the_folds_foretell():
    rng = np.random.default_rng(0)
    labels, folds = np.tile([1, -1], 40), np.arange(80) % 5
    noise = rng.normal(size=(80, 30))
    told = np.concatenate([noise, 3.0 * labels[:, None] + rng.normal(size=(80, 1))], 1)
    assert choose_l2(noise, labels, folds) >= 1.0, "nothing to learn: nearly no weights"
    assert choose_l2(told, labels, folds) <= 0.3
    assert choose_l2(told, labels, labels) == 10.0, "no fold leaves both kinds to the others"


def test_the_area_under_the_curve_by_hand():
    """Of 2 · 3 pairs four are in order and one is a tie: 4.5 / 6."""
    chances, labels = np.array([0.9, 0.5, 0.7, 0.5, 0.1]), np.array([1, 1, -1, -1, -1])
    assert auc(chances, labels) == pytest.approx(4.5 / 6)
    assert auc(chances[:2], labels[:2]) is None


def test_near_one_half_there_is_no_verdict():
    assert [verdict(p, 0.1) for p in (0.39, 0.41, 0.5, 0.59, 0.61)] == [-1, None, None, None, 1]
    assert verdict(0.51, 0.0) == 1
    assert probability(Head(np.ones(1, np.float32), 0.0), np.array([[-800.0], [0.0], [800.0]])).tolist() == [0, 0.5, 1]


# -- features --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features() -> Features:
    return Features("clawrl:tiny")


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def test_features_are_of_the_replys_exact_tokens_within_the_context(features):
    assert features(ids(5, 6), ids(7, 8)).shape == (192,)
    assert not np.array_equal(features(ids(5, 6), ids(7, 8)), features(ids(5, 6), ids(7, 9)))
    assert not np.array_equal(features(ids(5, 6), ids(7, 8)), features(ids(9, 6), ids(7, 8)))
    long = np.arange(3000, dtype=np.int32) % 1500
    assert np.array_equal(features(long, ids(7, 8)), features(long[-2046:], ids(7, 8)))
    assert np.array_equal(features(ids(3), long), features(ids(), long[-2048:]))


@pytest.mark.parametrize("reply", [(), (1536,), (7, 200_000)])
def test_what_the_base_cannot_read_is_refused(features, reply):
    with pytest.raises(JudgeError, match="take a base with the policy's tokenizer"):
        features(ids(1, 2), ids(*reply))


def test_a_base_that_is_not_there_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(JudgeError, match="cannot be loaded on cpu"):
        Features(str(tmp_path))


# -- the command -----------------------------------------------------------------------------------------------------


def captured(prompt_ids: np.ndarray, completion_ids: np.ndarray) -> Capture:
    count = len(completion_ids)
    none = np.zeros((count, 0))
    return Capture(
        prompt_ids,
        completion_ids,
        np.full(count, -1, np.float32),
        none.astype(np.int32),
        none.astype(np.float32),
        (VersionSpan(0, 0, count),),
    )


def replied(number: int, token: int) -> Turn:
    """A turn of a session of two, whose reply has a token again and again among others."""
    rng = np.random.default_rng(number)
    reply = np.where(np.arange(10) % 3 == 0, token, rng.integers(3, 1500, 10)).astype(np.int32)
    capture = captured(rng.integers(3, 1500, 12).astype(np.int32), reply)
    said = {"messages": ({"role": "user", "content": "How many pens?"},), "tools": ()}
    return replace(turn(f"t{number}"), **said, session=f"s{number // 2}", capture=capture)


def thumb(of: Turn, score) -> Feedback:
    return Feedback(f"of {of.id}", of.id, of.user, score, None, 1.0)


def write_journal(folder: Path, approved: int, refused: int) -> str:
    url = f"sqlite:///{folder / 'journal.sqlite'}"
    turns = [(replied(n, NICE), 1) for n in range(approved)]
    turns += [(replied(1000 + n, RUDE), -1) for n in range(refused)]
    with closing(JournalStore(url)) as store:
        store.append(*(each for each, _ in turns), *(thumb(*each) for each in turns))
    return url


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A reward model of 60 thumbs up and 40 down, and of two that do not count."""
    folder = tmp_path_factory.mktemp("trained")
    url = write_journal(folder, approved=60, refused=40)
    with closing(JournalStore(url)) as store:
        redacted, neutral = replace(turn("redacted"), capture=NOT_KEPT), replied(5000, RUDE)
        store.append(redacted, neutral, thumb(redacted, 1), thumb(neutral, 0))
    assert main(["train-judge", str(folder / "model"), "--journal", url]) == 0
    return folder / "model"


def test_the_command_learns_what_is_approved_and_says_how_well(trained):
    about = json.loads((trained / ABOUT).read_text())
    found = about["held_out"]
    assert about["approved"] + found["approved"] == 60
    assert about["refused"] + found["refused"] == 40
    expected = sum(is_held_out(f"s{n // 2}", HELD_OUT_SHARE) for n in range(60))
    assert found["approved"] == expected > 0, "sessions are held out, not turns"
    assert found["majority"] == pytest.approx(found["approved"] / (found["approved"] + found["refused"]))
    assert found["accuracy_of_all"] >= 0.9 > found["majority"] + 0.1
    assert found["auc"] > 0.95
    assert found["coverage"] > 0.8
    assert (about["model"], about["hidden_size"], about["margin"]) == ("clawrl:tiny", 192, MARGIN)
    assert sorted(path.name for path in trained.parent.iterdir() if path.name.startswith(".")) == []


def test_figures_are_shown_and_as_json(tmp_path, capsys):
    write_journal(tmp_path, approved=30, refused=30)
    assert main(["train-judge", str(tmp_path / "one"), "--run", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "one" / ABOUT).read_text())
    (tmp_path / "two").mkdir()
    assert main(["train-judge", str(tmp_path / "two"), "--run", str(tmp_path)]) == 0
    shown, said = capsys.readouterr()
    assert f"{told['approved']} thumbs up, {told['refused']} down" in shown
    assert "always guessing" in shown
    assert "judge.reward_model=" in said


def test_too_few_labels_are_refused_with_their_numbers(tmp_path, capsys):
    url = write_journal(tmp_path, approved=FEWEST + 5, refused=FEWEST - 1)
    assert main(["train-judge", str(tmp_path / "model"), "--journal", url]) == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "25 thumbs up and 19 down" in told
    assert "POST /v1/feedback" in told
    assert not (tmp_path / "model").exists()


def test_labels_of_one_session_cannot_be_held_out(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'journal.sqlite'}"
    turns = [replace(replied(n, NICE), session="one") for n in range(50)]
    with closing(JournalStore(url)) as store:
        store.append(*turns, *(thumb(each, 1 if n % 2 else -1) for n, each in enumerate(turns)))
    assert main(["train-judge", str(tmp_path / "model"), "--journal", url]) == 1
    assert "come from 1 sessions" in " ".join(capsys.readouterr().err.split())


def test_a_folder_with_something_in_it_stays_as_it_was(trained, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert main(["train-judge", str(trained), "--run", str(trained.parent)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


# -- the judge -------------------------------------------------------------------------------------------------------


def test_it_votes_on_replies_it_has_never_seen(trained):
    model = RewardModel.load(str(trained), "clawrl:tiny")
    for n in range(2000, 2005):
        nice, rude = replied(n, NICE).capture, replied(n, RUDE).capture
        assert model.probability(nice.prompt_ids, nice.completion_ids) > 0.6
        assert model.verdict(rude.prompt_ids, rude.completion_ids) == -1
    assert model.verdict(NOT_KEPT.prompt_ids, NOT_KEPT.completion_ids) is None


async def test_the_judge_asks_for_hints_only_and_votes_by_it(elsewhere, trained):  # noqa: F811
    elsewhere.answers = [(200, {}, says("\\boxed{1}\n[HINT_START]Be brief.[HINT_END]"))]
    judge = await made(outside(elsewhere, reward_model=str(trained)))
    judged = replied(3000, RUDE)
    judgement = await judge.judge(judged, next_state(judged, "Shorter!"))
    assert (judgement.votes, judgement.score, judgement.hints) == ((-1,), -1, ("Be brief.",))
    assert len(elsewhere.asked) == 3
    assert all("HINT" in body["messages"][1]["content"] for _, _, body in elsewhere.asked)
    assert (await judge.status())["reward_model"] == str(trained)
    unread = replace(judged, capture=NOT_KEPT)
    abstained = await judge.judge(unread, next_state(unread, "Shorter!"))
    assert (abstained.votes, abstained.score, abstained.error) == ((None,), None, None)


async def test_steps_of_environments_are_voted_on_as_ever(elsewhere, trained):  # noqa: F811
    elsewhere.answers = [(200, {}, says("Good. \\boxed{1}"))]
    judge = await made(outside(elsewhere, reward_model=str(trained)))
    judged = replied(3000, RUDE)
    step = await judge.judge_step(judged, next_state(judged, "done"))
    assert (step.votes, step.score, step.hints) == ((1, 1, 1), 1, ())


async def test_tokens_of_another_model_make_it_abstain_and_say_so(elsewhere, trained):  # noqa: F811
    elsewhere.answers = [(200, {}, says("\\boxed{-1}"))]
    judge = await made(outside(elsewhere, reward_model=str(trained)))
    judged = replace(ScriptedPolicy().turn([{"role": "user", "content": "hi"}]), capture=captured(ids(1), ids(99_999)))
    judgement = await judge.judge(judged, next_state(judged, "Shorter!"))
    assert (judgement.votes, judgement.score) == ((), None)
    assert "policy's tokenizer" in str(judgement.error)


def test_a_start_is_refused_without_a_reward_model_or_with_one_of_another_base(trained, tmp_path):
    require_reward_model(None, "clawrl:tiny", "clawrl:tiny")
    require_reward_model(str(trained), "clawrl:tiny", "clawrl:tiny")
    with pytest.raises(ConfigError, match=r"judge\.reward_model=.*holds no reward model .*clawrl train-judge"):
        require_reward_model(str(tmp_path), "clawrl:tiny", "clawrl:tiny")
    with pytest.raises(ConfigError, match=r"base model 'clawrl:tiny', and the judge's is 'some/other'.*--model some"):
        require_reward_model(str(trained), "some/other", "some/other")
    policy = tmp_path / "policy"
    tokenizer = AutoTokenizer.from_pretrained(model_path("clawrl:tiny"))
    tokenizer.save_pretrained(policy)
    shutil.copy(f"{model_path('clawrl:tiny')}/config.json", policy)
    require_reward_model(str(trained), "clawrl:tiny", str(policy))
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(policy)
    with pytest.raises(ConfigError, match=r"reads the policy's tokens, but judge\.model='clawrl:tiny' has others than"):
        require_reward_model(str(trained), "clawrl:tiny", str(policy))
    (policy / "tokenizer.json").unlink()
    (policy / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match=r"judge\.reward_model=.* reads the policy's tokens, but"):
        require_reward_model(str(trained), "clawrl:tiny", str(policy))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / ABOUT).write_text((trained / ABOUT).read_text())
    (broken / "head.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="holds no reward model"):
        require_reward_model(str(broken), "clawrl:tiny", "clawrl:tiny")


def test_the_whole_check_before_a_start_looks_at_it(tmp_path):
    from clawrl.main import check

    with pytest.raises(ConfigError, match=rf"judge\.reward_model='{tmp_path}' holds no reward model"):
        check(load_config(None, [f"judge.reward_model={tmp_path}"]))


def test_the_config_names_a_folder_that_is_found_from_anywhere(monkeypatch, tmp_path):
    assert load_config(None).judge.reward_model is None
    monkeypatch.chdir(tmp_path)
    assert load_config(None, ["judge.reward_model=mine"]).judge.reward_model == str(tmp_path / "mine")
    shared = load_config(None, ["judge.engine=policy", "lora.rank=8", "policy.model=some/model"])
    assert (shared.judge_model, load_config(None).judge_model) == ("some/model", "clawrl:tiny")
