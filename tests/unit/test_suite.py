"""The suite of unrelated tasks and a client's notes: what is asked, what counts as right, what is remembered."""

import asyncio
import json
import random
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest

from envs.toolcall.stock import make_task
from jobs.notes import NO_NOTES, Notebook, noteworthy, opening, with_note
from jobs.suite import SuiteResult, ask_suite, questions


def call(name: str, **arguments: str) -> dict[str, Any]:
    return {"tool_calls": [{"function": {"name": name, "arguments": json.dumps(arguments)}}]}


def test_the_suite_is_the_same_in_every_run():
    asked = questions("tiny", 5)
    assert [question.messages for question in asked] == [question.messages for question in questions("tiny", 5)]
    assert [question.task for question in asked[::5]] == ["judge", "hint", "tool", "drill"]
    assert len({json.dumps(question.messages) for question in asked}) == 20
    assert len(questions("full")[0].messages[0]["content"]) > len(asked[0].messages[0]["content"])


def test_a_vote_and_a_hint_are_right_where_the_case_says_so():
    asked = questions("tiny", 30)
    judged, hinted = asked[:30], asked[30:60]
    votes = [[q.right({"content": f"so \\boxed{{{vote}}}"}) for vote in (-1, 0, 1)] for q in judged]
    assert all(sum(each) == 1 for each in votes), "one vote is right"
    assert all(any(column) for column in zip(*votes, strict=True)), "each vote is right somewhere"
    assert not any(question.right({"content": "well"}) for question in judged)
    hint = {"content": "\\boxed{1} [HINT_START]Use plain sentences.[HINT_END]"}
    assert [q.right(hint) for q in hinted] == [not q.right({"content": "\\boxed{-1}"}) for q in hinted]
    assert {q.right(hint) for q in hinted} == {True, False}


def test_the_first_look_up_is_right_in_either_place_and_a_guess_is_not():
    question, task = questions("tiny", 1)[2], make_task(random.Random("0 0"), invented=0.0)
    assert question.messages[0]["content"] == task.question
    assert question.tools
    for place in task.places:
        assert question.right(call("lookup", item=task.item, place=place))
    assert not question.right(call("lookup", item=task.item, place="nowhere"))
    assert not question.right({"content": "It is 12."})
    broken = {"tool_calls": [{"function": {"name": "lookup", "arguments": "{"}}]}
    assert not question.right(broken)


def test_a_sum_is_right_by_its_last_number():
    question = questions("tiny", 1)[3]
    words = question.messages[0]["content"].removeprefix("What is ").removesuffix("?")
    value = eval(words.replace("x", "*"))
    assert question.right({"content": f"{words} = {value}"})
    assert not question.right({"content": f"{value} is not {words}"})
    assert not question.right({})


def test_the_suite_is_asked_greedily_as_side_calls_and_failures_are_counted():
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if len(seen) % 4 == 0:
            return httpx.Response(400, json={"error": {"message": "no"}})
        choice = {"index": 0, "message": {"role": "assistant", "content": "\\boxed{1}"}, "finish_reason": "stop"}
        body = {"id": "c", "created": 0, "model": "m", "object": "chat.completion", "choices": [choice]}
        return httpx.Response(200, json=body)

    transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = openai.AsyncOpenAI(api_key="none", base_url="http://scripted/v1", http_client=cast(Any, transport))
    found = asyncio.run(ask_suite(client, "m", questions("tiny", 4)))
    assert (found.num_replies, found.num_failed) == (12, 4)
    assert found.shares["drill"] == 0
    assert found.shares.keys() == {"judge", "hint", "tool", "drill"}
    bodies = [json.loads(request.content) for request in seen]
    assert {body["temperature"] for body in bodies} == {0}
    assert sum("tools" in body for body in bodies) == 4
    assert all(request.headers["x-turn-type"] == "side" for request in seen)


def test_the_mean_counts_tasks_alike():
    assert SuiteResult({"judge": 1.0, "drill": 0.5}, 30, 0).mean == pytest.approx(0.75)


# -- notes -------------------------------------------------------------------------------------------------------------


def test_the_newest_notes_are_kept_each_once():
    notes: tuple[str, ...] = ()
    for note in ("a", "b", "a", "c", "d"):
        notes = with_note(notes, note)
    assert notes == ("a", "c", "d")


def test_a_hint_about_the_problem_at_hand_is_no_note():
    assert noteworthy("Use plain sentences.")
    assert not noteworthy("The right answer is 19 pens.")


def test_nothing_is_put_before_messages_without_notes():
    messages = [{"role": "user", "content": "hi"}]
    assert opening(())(messages) == messages
    assert [each["role"] for each in opening(("Be brief.",))(messages)] == ["system", "user"]


class Remote:
    """An actor's method with the journal's paging, over (user, hints) by seq."""

    def __init__(self, judged: list[tuple[str, tuple[str, ...]]]) -> None:
        self.judged = judged

    async def remote(self, after: int, limit: int, timeout_s: float) -> list[Any]:
        rows = [
            (seq, SimpleNamespace(user=user), SimpleNamespace(hints=hints))
            for seq, (user, hints) in enumerate(self.judged, 1)
        ]
        return [row for row in rows if row[0] > after][: min(limit, 2)]


async def test_a_user_has_their_own_notes_as_they_come():
    judged: list[tuple[str, tuple[str, ...]]] = [
        ("ann", ("Be brief.",)), ("ben", ("Use steps.", "It is 7.")), ("ann", ()),
    ]  # fmt: skip
    notebook = Notebook(SimpleNamespace(judged_turns=Remote(judged)))
    assert await notebook.notes("ann") == ("Be brief.",)
    assert await notebook.notes("ben") == ("Use steps.",)
    assert await notebook.notes("eve") == ()
    judged.append(("ann", ("Be kind.",)))
    assert await notebook.notes("ann") == ("Be brief.", "Be kind.")
    assert await NO_NOTES.notes("ann") == ()
