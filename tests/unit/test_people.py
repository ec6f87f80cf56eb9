"""Problems from a file, users played by a model, and who takes part in a demonstration."""

import asyncio
import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import httpx
import openai
import pytest

from clawrl.config import ChatSection
from clawrl.errors import ConfigError, EnvError
from envs.chat.conversation import hold_conversation
from envs.chat.file_problems import FileProblem, equations, read_problems
from envs.chat.model_user import END, ModelUser
from envs.chat.user import SimulatedUser
from envs.chat.world import bucket, make_problem
from jobs.people import People

EGGS = FileProblem("Janet's ducks lay 16 eggs a day. She eats 3 and bakes with 4, and sells the rest at $2. How much?",
                   Fraction(18), "18")  # fmt: skip


def lines(number: int) -> list[str]:
    rows = ({"question": f"What is {n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1:,}"} for n in range(number))
    return [json.dumps(row) for row in rows]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join([*lines(60), ""]))
    return path


# -- what a reply got right --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "correct", "shows_work"),
    [
        ("She sells 16 - 3 - 4 = 9 eggs, so she makes 9 * 2 = $18.", True, True),
        ("16 eggs − 3 eggs − 4 eggs = 9 eggs. 9 × $2 = $18", True, True),
        ("1. **Left:** 16 - (3 + 4) = 9\n2. **Money:** $9 \\times 2 = 18$\n\n\\boxed{18}", True, True),
        ("\\boxed{18}, which took 2 steps", True, False),
        ("18", True, False),
        ("16 - 3 - 4 = 10 and 10 x 2 = 18, so 18.", True, False),
        ("16 - 3 - 4 = 9, 9 * 2 = 18. That makes 18 dollars a day, or 126 a week.", False, True),
        ("I do not know.", False, False),
    ],
)
def test_a_reply_of_any_model_is_read(reply, correct, shows_work):
    found = EGGS.read(reply)
    assert (found.correct, found.shows_work) == (correct, shows_work)


def test_equations_are_read_in_any_notation():
    assert equations("1,200 / 4 = 300 and 10 ÷ 4 = 2.5; 1/3 + 1/3 = 0.67; 2 + 2 x 3 = 8") == [True] * 4
    assert equations("7 = 7, x = 3, 12 apples = 12, 2026-11 is a date, 4 / 0 = 4, 2 ** 3 = 8") == []
    assert equations("5 + 5 = 11") == [False]


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_fifth_of_the_file_is_held_out_by_its_text(file):
    train, held_out = read_problems(file, "train"), read_problems(file, "heldout")
    assert len(train) + len(held_out) == 60
    assert {bucket(problem.question) for problem in held_out} == {"heldout"}
    assert all(problem.number == int(problem.question.split()[2]) + 1 for problem in train)


def test_numbers_of_the_file_may_have_thousands_and_decimals(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [{"question": f"q{n}", "answer": "so #### 1,234.5"} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_problems(path, "train")[0].number == Fraction("1234.5")
    assert read_problems(path, "train")[0].read("It is 1234.50").correct


@pytest.mark.parametrize("line", ["{", "[]", '{"question": "a"}', '{"question": "a", "answer": "seven"}', '"x"'])
def test_a_line_of_another_form_is_named(file, line):
    file.write_text("\n".join([*lines(3), line]))
    with pytest.raises(ConfigError, match=r"chat.problems: .*problems.jsonl:4: not "):
        People(ChatSection(problems=str(file)))


def test_a_file_that_is_missing_or_too_short_is_told(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        People(ChatSection(problems=str(tmp_path / "none.jsonl")))
    (tmp_path / "one.jsonl").write_text(lines(1)[0])
    with pytest.raises(ConfigError, match="needs more lines"):
        People(ChatSection(problems=str(tmp_path / "one.jsonl")))


# -- who takes part ----------------------------------------------------------------------------------------------------


def test_people_take_turns_and_share_the_held_out_problems(file):
    people = People(ChatSection(persona="all", problems=str(file)))
    assert [people.person(number).persona for number in range(4)] == ["student", "assistant", "teacher", "student"]
    shares = [people.problems_of(persona) for persona in people.personas]
    questions = [problem.question for share in shares for problem in share]
    assert sorted(questions) == sorted(problem.question for problem in read_problems(file, "heldout"))
    assert all(bucket(people.person(number).begin()) == "train" for number in range(30))
    assert people.person(7).begin() == people.person(7).begin()
    few = People(ChatSection(problems=str(file), evaluation_problems=2))
    assert len(few.problems_of("student")) == 2


def test_without_a_file_people_bring_made_up_sums():
    people = People(ChatSection(evaluation_problems=5))
    assert isinstance(people.person(0), SimulatedUser)
    assert len(people.problems_of("student")) == 5


# -- a model as the user -----------------------------------------------------------------------------------------------


def endpoint(replies: list[str], seen: list[dict[str, Any]]) -> openai.AsyncOpenAI:
    """A real client; what it sends is kept, and answered in order."""

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        seen.append(body)
        choice = {
            "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": replies.pop(0)},
        }  # fmt: skip
        made = {"id": "c", "created": 0, "model": body["model"], "object": "chat.completion", "choices": [choice]}
        return httpx.Response(200, json=made)

    transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return openai.AsyncOpenAI(api_key="none", base_url="http://scripted/v1", http_client=cast(Any, transport))


def test_a_model_plays_the_user_until_it_has_nothing_to_say():
    asked: list[dict[str, Any]] = []
    served: list[dict[str, Any]] = []
    simulator = endpoint(["You: No bold, please.", f"Thanks! {END}"], asked)
    policy = endpoint(["**18**", "9 * 2 = 18, so 18."], served)
    user = ModelUser(simulator, "big", "student", random.Random(0), make_problem)
    held = asyncio.run(hold_conversation(policy, "m", user, cast(Any, EGGS), "s", max_turns=5, stream=False))
    assert [(each.said, each.reaction) for each in held.exchanges] == [
        (EGGS.question, "open"), ("No bold, please.", "model"),
    ]  # fmt: skip
    assert [each.satisfied for each in held.exchanges] == [False, True]
    assert [each.solution.shows_work for each in held.exchanges] == [False, True]
    assert [message["role"] for message in asked[1]["messages"]] == ["system", "user"]
    assert "the right answer is 18" in asked[0]["messages"][0]["content"]
    assert "Assistant: **18**\n\nYou: No bold, please.\n\nAssistant: 9 * 2" in asked[1]["messages"][1]["content"]
    assert served[1]["messages"][-1]["content"] == "No bold, please.", "the served model sees what was said, no more"
    assert asked[0]["model"] == "big"


def test_a_simulator_that_does_not_answer_is_named():
    user = People(ChatSection(simulator_url="http://127.0.0.1:9/v1", simulator_model="big")).person(0)
    user.begin()
    with pytest.raises(EnvError, match=r"'big' at http://127.0.0.1:9/v1/ .*chat.simulator_url"):
        asyncio.run(user.react("19."))
