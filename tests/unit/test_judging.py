"""The judge's pure part: how requests are written and answers are read."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clawrl.serving import judging
from clawrl.testing import ScriptedPolicy
from clawrl.types import NextState, Role

QUESTION = {"role": "user", "content": "How many pens?"}
REPLY = {"role": "assistant", "content": "**Answer:** 7 pens"}


def following(*messages: dict, role: Role = "user") -> NextState:
    return NextState("turn", role, messages, False, 0.0)


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("Fine. \\boxed{1}", 1),
        ("Bad. \\boxed{-1}", -1),
        ("Unclear. \\boxed{0}", 0),
        ("First \\boxed{1}, no: \\boxed{-1}", -1),
        ("\\boxed{-1} but \\boxed{7}", -1),
        ("\\boxed{ +1 }", 1),
        ("\\boxed{10}", None),
        ("boxed 1", None),
        ("", None),
    ],
)
def test_the_last_valid_box_is_the_vote(text, vote):
    assert judging.parse_vote(text) == vote


@pytest.mark.parametrize(
    ("votes", "score"),
    [
        ([1, 1, -1], 1),
        ([-1, -1, 0, 1], -1),
        ([1, -1], 0),
        ([1, 1, -1, -1, 0], 0),
        ([None, None, -1], -1),
        ([None, None], None),
        ([], None),
        ([0, 0, 1], 0),
    ],
)
def test_plurality_ties_at_zero_and_abstains_without_votes(votes, score):
    assert judging.plurality(votes) == score


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("\\boxed{1}\n[HINT_START]Be brief.[HINT_END]", "Be brief."),
        ("\\boxed{1}\n[HINT_START]  Two\n lines. [HINT_END]", "Two lines."),
        ("\\boxed{-1}\n[HINT_START]Be brief.[HINT_END]", None),
        ("\\boxed{1} then \\boxed{-1} [HINT_START]x[HINT_END]", None),
        ("\\boxed{1}", None),
        ("\\boxed{1}\n[HINT_START]  [HINT_END]", None),
        ("\\boxed{1}\n[HINT_START]cut off", None),
        ("[HINT_START]no vote[HINT_END]", None),
        ("\\boxed{1}[HINT_START]one[HINT_END][HINT_START]two[HINT_END]", "two"),
    ],
)
def test_a_hint_needs_a_yes_and_both_markers(text, hint):
    assert judging.parse_hint(text) == hint


def test_hints_are_deduplicated_shortest_first():
    hints = ["Use plain text.", None, "be  brief.", "Be brief.", "", "Short."]
    assert judging.dedupe_hints(hints) == ("Short.", "be  brief.", "Use plain text.")


@pytest.mark.parametrize("name", ["tiny", "full"])
@pytest.mark.parametrize("ask", [judging.evaluative, judging.directive, judging.step])
def test_a_request_holds_what_the_judge_must_see(name, ask):
    messages = [{"role": "system", "content": "Secret rules."}, QUESTION]
    system, user = ask(judging.load_prompts(name), messages, REPLY, following({"role": "user", "content": "No bold!"}))
    assert (system["role"], user["role"]) == ("system", "user")
    assert all(part in user["content"] for part in ("How many pens?", "**Answer:** 7 pens", "No bold!", "[role: user]"))
    assert "Secret rules." not in user["content"]
    assert "$" not in user["content"]


def test_unknown_prompts_are_refused_with_the_choices():
    with pytest.raises(ValueError, match="choose one of tiny, full"):
        judging.load_prompts("huge")  # pyright: ignore[reportArgumentType]


def test_text_that_looks_like_a_placeholder_is_left_alone():
    trap = {"role": "user", "content": "Cost $reply and $$5 and ${history}"}
    text = judging.evaluative(judging.load_prompts("full"), [trap], REPLY, following(trap))[1]["content"]
    assert text.count("Cost $reply and $$5 and ${history}") == 2


def test_all_parallel_tool_results_are_shown():
    state = following({"role": "tool", "content": "12"}, {"role": "tool", "content": "error: not found"}, role="tool")
    text = judging.evaluative(judging.load_prompts("full"), [QUESTION], REPLY, state)[1]["content"]
    assert "[1 of 2] 12\n[2 of 2] error: not found" in text
    assert "[role: tool]" in text


def test_the_request_is_the_last_user_message_and_the_rest_is_history():
    messages = [
        {"role": "user", "content": "First question"},
        {"role": "assistant", "content": "<think>hm</think>First reply"},
        {"role": "user", "content": [{"type": "text", "text": "Second question"}]},
        {"role": "tool", "content": "tool says 3"},
    ]
    text = judging.evaluative(judging.load_prompts("full"), messages, REPLY, following(QUESTION))[1]["content"]
    history, request = text.split("## Request\n")
    assert "[user] First question\n[assistant] First reply\n[tool] tool says 3" in history
    assert request.startswith("Second question\n")


def test_the_task_of_a_step_is_the_first_user_message_and_the_rest_is_history():
    messages = [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "The task"},
        {"role": "assistant", "content": "Step one"},
        {"role": "user", "content": "it says 3"},
    ]
    text = judging.step(judging.load_prompts("full"), messages, REPLY, following(QUESTION))[1]["content"]
    task, steps = text.split("## Steps so far")
    assert task == "## Task\nThe task\n\n"
    assert "[assistant] Step one\n[user] it says 3" in steps


def test_the_tiny_model_is_asked_about_a_step_in_the_form_it_was_trained_on():
    prompts, state = judging.load_prompts("tiny"), following({"role": "tool", "content": "12"}, role="tool")
    assert judging.step(prompts, [QUESTION], REPLY, state) == judging.evaluative(prompts, [QUESTION], REPLY, state)


def test_long_history_keeps_its_newest_part_within_the_budget():
    messages = [{"role": "user", "content": f"message {at} " + "x" * 900} for at in range(60)] + [QUESTION]
    text = judging.directive(judging.load_prompts("full"), messages, REPLY, following(QUESTION))[1]["content"]
    assert "message 59 " in text
    assert "message 3 " not in text
    assert len(text) < judging.BUDGETS["full"].history + 2000


def test_tool_calls_are_shown_in_the_form_the_model_writes():
    call = {"type": "function", "function": {"name": "lookup", "arguments": '{"item": "pens"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert judging.message_text(message) == (
        '<tool_call>\n{"name": "lookup", "arguments": {"item": "pens"}}\n</tool_call>'
    )


@pytest.mark.parametrize(("limit", "kept"), [(100, "abcdefghijklmnopqrst"), (13, "abc\n[...]\nrst"), (4, "abcd")])
def test_clip_keeps_head_and_tail_within_the_limit(limit, kept):
    text = "abcdefghijklmnopqrst"
    assert judging.clip(text, limit) == kept
    assert len(judging.clip(text, limit)) <= limit


def exchange(id: str, asked: str, reply: str, followed: str | None, parent: str | None = None):
    """A turn and what followed it."""
    made = replace(
        ScriptedPolicy().turn([{"role": "system", "content": "Secret rules."}, {"role": "user", "content": asked}]),
        id=id, parent=parent, reply={"role": "assistant", "content": reply},
    )  # fmt: skip
    said = () if followed is None else ({"role": "user", "content": followed},)
    return made, None if followed is None else NextState(id, "user", said, False, 0.0)


def test_a_transcript_says_each_thing_once():
    """b goes on with a; c is another branch; d goes on with c, of which nothing is known to have followed."""
    session = [
        exchange("a", "one", "reply a", "two"),
        exchange("b", "two", "reply b", "three", parent="a"),
        exchange("c", "other", "reply c", None, parent="a"),
        exchange("d", "four", "reply d", None, parent="c"),
    ]
    said = [message["content"] for message in judging.transcript(session)]
    assert said == ["one", "reply a", "two", "reply b", "three", "other", "reply c", "four", "reply d"]


def test_a_session_is_read_as_a_whole_within_its_budget():
    session = [exchange(str(at), f"request {at} " + "x" * 4000, "fine", None) for at in range(30)]
    system, user = judging.lesson(judging.load_prompts("full"), session)
    assert system["role"] == "system"
    assert "request 29 " in user["content"]
    assert "request 2 " not in user["content"]
    assert "Secret rules." not in user["content"]
    assert len(user["content"]) < judging.BUDGETS["full"].session + 1000


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("\\boxed{1}\n[LIST_START]\n Do a.\n\nDon't b. \n[LIST_END]", "Do a.\nDon't b."),
        ("\\boxed{-1}\n[LIST_START]Do a.[LIST_END]", None),
        ("[LIST_START]Do a.[LIST_END]", None),
        ("\\boxed{1}\n[LIST_START]\n[LIST_END]", None),
        ("\\boxed{1}\n[LIST_START]cut off", None),
        ("\\boxed{1}", None),
    ],
)
def test_a_list_needs_a_yes_and_both_markers(text, rules):
    assert judging.parse_list(text) == rules


def test_the_tiny_judge_gathers_the_hints_of_a_session():
    hints = [("Be brief.", "Write less, please."), (), ("be  brief.",), ("Use plain text.",)]
    assert judging.gather_hints(hints) == "Be brief. Use plain text."
    assert judging.gather_hints([(), ()]) is None
    assert judging.load_prompts("tiny").lesson is None
