"""Where a hint is placed and which of several is used, by cases small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from clawrl.algorithms.hints import overlaps, select_hint, with_hint, with_note

# Two positions, k = 2. Hint 0 overlaps (1, 0), hint 1 (0, 2), hint 2 (1, 1).
STUDENT = np.array([[1, 2], [3, 4]], np.int32)
TEACHERS = [
    np.array([[2, 9], [8, 9]], np.int32),
    np.array([[8, 9], [4, 3]], np.int32),
    np.array([[1, 9], [9, 3]], np.int32),
]


def test_overlaps_count_shared_top_tokens():
    assert overlaps(STUDENT, TEACHERS).tolist() == [[1, 0], [0, 2], [1, 1]]


@pytest.mark.parametrize(
    ("rule", "chosen"), [("sequence", [1, 1]), ("token", [0, 1]), ("shortest", [0, 0]), ("longest", [2, 2])]
)
def test_each_rule_chooses_as_counted_by_hand(rule, chosen):
    picked = select_hint(STUDENT, TEACHERS, rule)
    assert picked.tolist() == chosen
    assert picked.dtype == np.int32


def test_sequence_ties_go_to_the_shortest():
    assert select_hint(STUDENT, [TEACHERS[0] * 0, TEACHERS[1], TEACHERS[2]], "sequence").tolist() == [1, 1]


def test_a_wider_teacher_support_counts_too():
    wide = np.array([[7, 2, 1], [4, 9, 3]], np.int32)
    assert overlaps(STUDENT, [wide]).tolist() == [[2, 2]]


def test_random_is_reproducible_and_within_range():
    drawn = {int(select_hint(STUDENT, TEACHERS, "random", np.random.default_rng(seed))[0]) for seed in range(40)}
    again = [select_hint(STUDENT, TEACHERS, "random", np.random.default_rng(3)).tolist() for _ in range(2)]
    assert drawn == {0, 1, 2}
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("teachers", "rule", "words"),
    [([], "sequence", "no hint"), (TEACHERS, "random", "rng"), (TEACHERS, "best", "best")],
)
def test_misuse_is_refused_with_a_remedy(teachers, rule, words):
    with pytest.raises(ValueError, match=words):
        select_hint(STUDENT, teachers, rule)


def test_a_hint_is_appended_to_the_last_user_message_only():
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": "two"},
        {"role": "tool", "content": "3"},
    ]
    hinted = with_hint(messages, "Be brief.")
    assert hinted[2]["content"] == "two\n\n[user's hint / instruction]\nBe brief."
    assert [hinted[at] for at in (0, 1, 3)] == [messages[at] for at in (0, 1, 3)]
    assert messages[2]["content"] == "two"


def test_a_hint_joins_content_in_parts_as_one_more_part():
    hinted = with_hint([{"role": "user", "content": [{"type": "text", "text": "one"}]}], "Be brief.")
    assert hinted[0]["content"] == [
        {"type": "text", "text": "one"},
        {"type": "text", "text": "\n\n[user's hint / instruction]\nBe brief."},
    ]


def test_a_prompt_without_a_user_message_takes_no_hint():
    with pytest.raises(ValueError, match="needs a user message"):
        with_hint([{"role": "system", "content": "rules"}], "Be brief.")


def test_a_note_ends_the_system_message_or_becomes_one():
    asked = [{"role": "user", "content": "hi"}]
    [note, *rest] = with_note(asked, "Do be brief.")
    assert (note, rest) == ({"role": "system", "content": "Do be brief."}, asked)
    ruled = [{"role": "system", "content": "Rules."}, *asked]
    [noted, *rest] = with_note(ruled, "Do be brief.")
    assert noted == {"role": "system", "content": "Rules.\n\nDo be brief."}
    assert rest == asked
    assert ruled[0]["content"] == "Rules.", "the input is left as it was"
