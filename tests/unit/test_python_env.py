"""Questions with verified answers: they stay the same, splits share none, nothing said is run."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest

from clawrl.errors import EnvError
from clawrl.rollout.env import SPLITS, split_of
from envs.toolcall.problems import DATASETS, EVALUATED, INTEGERS, KINDS, check_sources, gym, make_problem, read_problems
from envs.toolcall.python_env import PythonEnv
from envs.toolcall.verifying import VERIFIER


@pytest.mark.parametrize("split", SPLITS)
def test_problems_stay_the_same_and_their_own_answers_are_right(split):
    for number in range(len(DATASETS)):
        problem = make_problem(DATASETS, number, split)
        assert make_problem(DATASETS, number, split) == problem
        assert split_of(problem.id) == split
        assert problem.source == DATASETS[number]
        question = {"source": problem.source, "seed": problem.seed}
        if problem.source == INTEGERS:
            question = {"gold": problem.answer}
        assert problem.answer is not None
        assert VERIFIER.score(problem.answer, **question) == 1.0
        assert VERIFIER.score("no idea", **question) < 0.1


def test_integer_problems_are_of_every_kind_and_no_two_alike():
    problems = [make_problem([INTEGERS], number, "train") for number in range(60)]
    assert len({problem.question for problem in problems}) == 60
    assert len({problem.question.split()[0:3][-1] + problem.question[:12] for problem in problems}) >= len(KINDS)


def test_a_power_and_a_count_are_what_they_are_said_to_be():
    """The answers, worked out in another way."""
    for number in range(60):
        question, answer = (lambda p: (p.question, p.answer))(make_problem([INTEGERS], number, "train"))
        if found := re.match(r"What is the remainder when (\d+)\^(\d+) is divided by (\d+)", question):
            base, power, modulus = map(int, found.groups())
            assert answer == str(base**power % modulus)
        elif found := re.match(r"In how many ways can (\d+) cents .* coins of ([\d, and]+) cents", question):
            total, (a, b, c) = int(found[1]), map(int, re.findall(r"\d+", found[2]))
            ways = sum((total - c * i - b * j) % a == 0 for i in range(total // c + 1) for j in
                       range((total - c * i) // b + 1))  # fmt: skip
            assert answer == str(ways)
        elif found := re.match(r"Which is the smallest whole number above (\d+) .* (\d+) when .* by (\d+), and .* "
                               r"(\d+) when divided by (\d+)", question):  # fmt: skip
            above, r, a, s, b = map(int, found.groups())
            assert answer == str(next(n for n in range(above + 1, above + a * b + 1) if (n % a, n % b) == (r, s)))


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("12/7", r"\frac{12}{7}", 1.0),
        ("12/7", "12/7", 1.0),
        ("12/7", r"$x = \frac{24}{14}$", 1.0),
        ("12/7", "1.7", 0.0),
        ("42", "42", 1.0),
        ("42", r"\boxed{42}", 1.0),
        ("42", "42.0", 1.0),
        ("1000", "1,000", 1.0),
        ("42", "-42", 0.0),
        ("42", "", 0.0),
        ("42", r"\frac{", 0.0),
        ("42", "$9^{9^{9^{9}}}$", 0.0),
        ("42", "4" * 30_000, 0.0),
        ("42", "\ud83d", 0.0),
    ],
)
def test_math_verify_compares_values_and_outlives_any_answer(gold, answer, score):
    assert VERIFIER.score(answer, gold=gold) == score


def test_an_answer_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    words = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for number, source in enumerate(DATASETS):
        question = {"gold": "1"} if source == INTEGERS else {"source": source, "seed": number}
        assert VERIFIER.score(words, **question) < 1
    assert not mark.exists()


def test_what_reasoning_gym_would_run_is_refused():
    """Read from its sources: a newer release may run more."""
    runs = re.compile(r"\b(?:eval|exec|parse_expr|sympify|parse_latex)\(\s*(?:str\()?\s*answer\b")
    found = set()
    for name, (kind, _) in gym().factory.DATASETS.items():
        module = inspect.getmodule(kind)
        assert module is not None
        if runs.search(inspect.getsource(module)):
            found.add(name)
    assert found == EVALUATED
    assert not EVALUATED & set(DATASETS)


def test_a_verifier_that_hangs_is_replaced(monkeypatch):
    assert VERIFIER.score("1", gold="1") == 1.0
    first = VERIFIER._child
    monkeypatch.setattr("envs.toolcall.verifying.SECONDS", 0.2)
    assert VERIFIER.score("$9^{9^{9^{9}}}$", gold="42") == 0.0
    monkeypatch.undo()
    assert VERIFIER.score("1", gold="1") == 1.0
    assert VERIFIER._child is not first
    assert first is not None
    assert first.poll() is not None


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ([], "no datasets are named"),
        (["gdc"], "there is no dataset 'gdc'; use some of .*gcd"),
        (["countdown"], "'countdown' is refused: reasoning-gym scores it by running the answer"),
    ],
)
def test_data_sets_that_cannot_be_used(datasets, words):
    with pytest.raises(EnvError, match=words):
        PythonEnv(datasets=datasets)


def test_a_missing_package_is_told_with_its_remedy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    gym.cache_clear()
    with pytest.raises(EnvError, match=r"pip install 'clawrl\[tools\]'"):
        check_sources(["gcd"])


def test_a_file_of_problems(tmp_path):
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps({"question": f"What is {n} + 1?", "answer": n + 1}) + "\n" for n in range(40)))
    env = PythonEnv(problems=file)
    ids = {split: {env.make_task(number, split).id for number in range(80)} for split in SPLITS}
    assert len(ids["train"] | ids["held_out"]) == 40
    assert not ids["train"] & ids["held_out"]
    assert env.make_task(0, "train").answer in {str(n) for n in range(1, 41)}
    file.write_text('{"question": "What?"}\n')
    with pytest.raises(EnvError, match="line 1 is not"):
        read_problems(file)
    with pytest.raises(EnvError, match="cannot be read"):
        read_problems(Path("nowhere.jsonl"))


def test_pycosat_is_not_pretended_to_be_there():
    gym()
    assert getattr(sys.modules.get("pycosat"), "itersolve", True)
