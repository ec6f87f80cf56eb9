"""Problems, styles, phrases and simulated users; conversations over a real OpenAI client on a scripted transport."""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any, cast

import httpx
import openai
import pytest

from envs.chat.conversation import Answer, evaluate, hold_conversation, pooled, summarise
from envs.chat.phrases import TOPICS, WRITTEN, say, strings
from envs.chat.styles import FORM_SHARES, FORMS, Style, classify, default_style, render
from envs.chat.user import PERSONAS, REACTIONS, Mood, SimulatedUser, satisfies
from envs.chat.world import HELDOUT_NAMES, KINDS, TRAIN_NAMES, Problem, check, make_problem, make_problems
from jobs.notes import opening

ALL_STYLES = [
    Style(form, friendly, checked) for form in FORMS for friendly in (False, True) for checked in (False, True)
]


def gain() -> Problem:
    return Problem(
        kind="gain",
        wording="",
        question="Mia has 12 pens and buys 7 more. How many?",
        equations=("12 + 7 = 19",),
        labels=("Add",),
        answer="19 pens",
        sentence="Mia has 19 pens",
        number=19,
        winner=None,
        check="19 - 7 = 12",
        numbers=(12, 7),
    )


def test_the_split_never_overlaps():
    train, heldout = make_problems(600, "train", 1), make_problems(600, "heldout", 1)
    assert {problem.key for problem in train}.isdisjoint(problem.key for problem in heldout)
    assert set(TRAIN_NAMES).isdisjoint(HELDOUT_NAMES)
    names = "|".join(HELDOUT_NAMES)
    assert not any(re.search(rf"\b({names})\b", problem.question) for problem in train)


def test_problems_come_again_with_their_seed():
    first, again, other = (
        make_problems(50, "heldout", 3),
        make_problems(50, "heldout", 3),
        make_problems(50, "heldout", 4),
    )
    assert first == again
    assert first != other
    assert {problem.kind for problem in make_problems(200, "train", 0)} == set(KINDS)


def test_every_reference_reply_is_right_and_classified_as_rendered():
    rng = random.Random(5)
    for at in range(600):
        problem, style = make_problem(rng, ("train", "heldout")[at % 2]), rng.choice(ALL_STYLES)
        reply = render(problem, style, rng)
        solution = check(problem, reply)
        assert classify(reply) == style, reply
        assert solution.correct, reply
        assert solution.shows_work == (style.form != "brief"), reply


@pytest.mark.parametrize(
    ("reply", "form"),
    [
        ("- first add\n- then stop", "steps"),
        ("# Answer\n19", "steps"),
        ("The result is \\boxed{19}.", "steps"),
        ("1) add\n2) done", "steps"),
        ("You take the twelve pens and put seven more beside them, which is 19.", "plain"),
        ("12 + 7 = 19", "plain"),
        ("19", "brief"),
        ("", "brief"),
        ("Great question! Hope that helps you on! 19 pens.", "brief"),
    ],
)
def test_free_text_is_classified_by_its_markup_and_its_words(reply, form):
    assert classify(reply).form == form


@pytest.mark.parametrize(
    ("reply", "correct", "shows_work"),
    [
        ("**Step 1:** 12 + 7 = 19\n**Answer:** 19 pens", True, True),
        ("12 + 7 = 19, so Mia has 19 pens.\nCheck: 19 - 7 = 12.", True, True),
        ("19 pens.", True, False),
        ("12 + 7 = 18, so Mia has 18 pens.", False, False),
        ("12 + 7 = 19 and 3 + 4 = 8, so Mia has 19 pens.", True, False),
        ("12 + 7 = 19, so Mia has 12 pens.", False, True),
        ("I do not know.", False, False),
    ],
)
def test_an_answer_is_the_last_number_before_the_check(reply, correct, shows_work):
    solution = check(gain(), reply)
    assert (solution.correct, solution.shows_work) == (correct, shows_work)


def test_a_comparison_must_name_the_winner():
    problem = make_problem(random.Random(2), "heldout", "compare")
    right = f"{problem.equations[0]}, so {problem.winner} has {problem.number} more."
    assert check(problem, right).correct
    assert not check(problem, right.replace(str(problem.winner), "Nobody")).correct


def test_the_default_mix_is_as_stated():
    rng = random.Random(0)
    styles = [default_style(rng) for _ in range(4000)]
    for form, share in zip(FORMS, FORM_SHARES, strict=True):
        assert sum(style.form == form for style in styles) / 4000 == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("topic", TOPICS)
def test_unseen_and_written_strings_are_never_among_the_trained(topic):
    train, unseen = set(strings(topic)), set(strings(topic, "unseen"))
    assert train
    assert unseen
    assert train.isdisjoint(unseen)
    assert (train | unseen).isdisjoint(WRITTEN[topic])


def test_said_phrases_come_from_the_asked_set():
    rng = random.Random(1)
    for topic in TOPICS:
        assert {say(topic, rng) for _ in range(30)} <= set(strings(topic))
        assert {say(topic, rng, "unseen") for _ in range(30)} <= set(strings(topic, "unseen"))


def test_a_user_reacts_in_the_stated_shares():
    rng, reactions = random.Random(0), []
    user = SimulatedUser("student", rng)
    for _ in range(3000):
        user.begin()
        user.answer(render(cast(Problem, user.problem), Style("steps"), rng))
        reactions.append(user.reaction)
    for reaction, share in REACTIONS.items():
        assert reactions.count(reaction) / 3000 == pytest.approx(share, abs=0.03), reaction


@pytest.mark.parametrize("persona", PERSONAS)
def test_a_satisfied_user_never_complains(persona):
    rng = random.Random(3)
    user = SimulatedUser(persona, rng, Mood(unseen=0.5, written=0.5))
    for _ in range(200):
        user.begin()
        user.answer(render(cast(Problem, user.problem), Style("plain", friendly=True, checked=True), rng))
        assert user.reaction in ("thanks", "praise", "agree", "next")


def test_personas_want_different_things():
    plain, checked, friendly = Style("plain"), Style("steps", checked=True), Style("brief", friendly=True)
    wants = [[satisfies(persona, style) for style in (plain, checked, friendly)] for persona in PERSONAS]
    assert wants == [[True, False, False], [False, True, False], [False, False, True]]


def scripted(replies: list[str | int], seen: list[httpx.Request]) -> openai.AsyncOpenAI:
    """A real client whose transport answers with the replies in order; a number is an HTTP error."""

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        reply = replies.pop(0)
        if isinstance(reply, int):
            return httpx.Response(reply, json={"error": {"message": "down"}})
        body = json.loads(request.content)
        base = {"id": "c", "created": 0, "model": body["model"]}
        if body.get("stream"):
            deltas = [{"delta": {"content": part}, "index": 0} for part in re.findall(r"\S+\s*|\s+", reply)]
            chunks = [{**base, "object": "chat.completion.chunk", "choices": [delta]} for delta in deltas]
            lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
            return httpx.Response(200, text="".join(lines), headers={"content-type": "text/event-stream"})
        choice = {"index": 0, "message": {"role": "assistant", "content": reply}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
        return httpx.Response(200, json={**base, "object": "chat.completion", "choices": [choice], "usage": usage})

    transport = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    return openai.AsyncOpenAI(api_key="none", base_url="http://scripted/v1", http_client=cast(Any, transport))


@pytest.mark.parametrize("stream", [True, False])
def test_a_conversation_sends_its_history_and_session_and_counts_failures(stream):
    seen: list[httpx.Request] = []
    client = scripted(["**Answer:** 19 pens", 503, "19.", "never sent"], seen)
    user = SimulatedUser("student", random.Random(0))
    held = asyncio.run(hold_conversation(client, "m", user, gain(), "s-1", max_turns=2, stream=stream))
    bodies = [json.loads(request.content) for request in seen]
    assert [exchange.reply for exchange in held.exchanges] == ["**Answer:** 19 pens", "19."]
    assert [exchange.style.form for exchange in held.exchanges] == ["steps", "brief"]
    assert [message["role"] for message in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    assert bodies[1] == bodies[2]
    assert all(request.headers["x-session-id"] == "s-1" for request in seen)
    assert held.num_failed == 1


def test_notes_go_before_what_the_user_said():
    seen: list[httpx.Request] = []
    noted = opening(["Use plain sentences."])
    client = scripted(["19.", "19.", "19."], seen)
    user = SimulatedUser("student", random.Random(0))
    asyncio.run(hold_conversation(client, "m", user, gain(), "s-1", max_turns=2, stream=False, opening=noted))
    asyncio.run(evaluate(client, "m", "student", [gain()], account="ann", opening=noted))
    bodies = [json.loads(request.content) for request in seen]
    note = {"role": "system", "content": "Notes about this user:\n- Use plain sentences."}
    assert [body["messages"][0] for body in bodies] == [note] * 3
    assert [len(body["messages"]) for body in bodies] == [2, 4, 2]
    assert bodies[-1]["user"] == "ann"


def test_several_personas_are_pooled_by_their_replies():
    plain = [Answer("12 + 7 = 19, so Mia has 19 pens.", 12, "a")] * 3
    pool = pooled([summarise("student", [gain()] * 3, plain), summarise("teacher", [gain()], [Answer("18.", 4, "b")])])
    assert (pool.num_replies, pool.score, pool.sound, pool.mean_length) == (4, 0.75, 0.75, 10)
    assert pool.forms == {"steps": 0.0, "plain": 0.75, "brief": 0.25}


def test_an_evaluation_asks_first_messages_as_side_calls():
    problems, seen = make_problems(3, "heldout", 9), []
    rng = random.Random(0)
    client = scripted([render(problem, Style("plain"), rng) for problem in problems], seen)
    found = asyncio.run(evaluate(client, "m", "student", problems, concurrency=1))
    assert (found.num_replies, found.score, found.correct, found.shows_work) == (3, 1.0, 1.0, 1.0)
    assert found.mean_length == 9
    assert all(request.headers["x-turn-type"] == "side" for request in seen)
    assert [len(json.loads(request.content)["messages"]) for request in seen] == [1, 1, 1]


def test_a_summary_tells_style_and_answers_apart():
    problems = [gain()] * 4
    texts = ["12 + 7 = 19, so Mia has 19 pens.", "12 + 7 = 18, so Mia has 18 pens.", "19."]
    answers = [Answer(text, length, str(at)) for at, (text, length) in enumerate(zip(texts, (10, 10, 4), strict=True))]
    found = summarise("student", problems, [*answers, None])
    assert found.num_failed == 1
    assert found.score == pytest.approx(2 / 3)
    assert found.correct == pytest.approx(2 / 3)
    assert found.sound == pytest.approx(1 / 3), "neither a wrong answer nor a bare number is sound"
    assert found.good == pytest.approx(1 / 3)
    assert found.ids == ("0", "1", "2")
    assert found.mean_length == 8
