"""Hints: where one is placed in a prompt, and which of several is used. Pure numpy.

Knows OpenAI messages and top-k token ids. Ignores who found the hints and who scored them. After overlap-guided
hint selection of OpenClaw-RL v2 (arXiv:2603.10165): a hint under which the teacher would say nearly what the
student said is one that the student can learn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from clawrl.types import Message

HintRule = Literal["sequence", "token", "shortest", "longest", "random"]

HINT_HEADER = "\n\n[user's hint / instruction]\n"


def with_hint(messages: Sequence[Message], hint: str) -> list[Message]:
    """A copy of `messages` with the hint appended to the last user message; the input is left as it was."""
    for at in range(len(messages) - 1, -1, -1):
        if messages[at].get("role") == "user":
            hinted = {**messages[at], "content": _append(messages[at].get("content"), HINT_HEADER + hint)}
            return [*messages[:at], hinted, *messages[at + 1 :]]
    raise ValueError("a hint needs a user message to stand in, and the prompt has none; drop the distillation term")


def with_note(messages: Sequence[Message], note: str) -> list[Message]:
    """A copy of `messages` with the note at the end of its system message, or as one; the input is left as it was."""
    if messages and messages[0].get("role") in ("system", "developer"):
        return [{**messages[0], "content": _append(messages[0].get("content"), f"\n\n{note}")}, *messages[1:]]
    return [{"role": "system", "content": note}, *messages]


def overlaps(student_top_ids: np.ndarray, teacher_top_ids: Sequence[np.ndarray]) -> np.ndarray:
    """i32[H, T]: how many of the student's top tokens (i32[T, k]) are among the teacher's (i32[T, K]), per hint."""
    counts = [(student_top_ids[:, :, None] == top[:, None, :]).any(-1).sum(-1) for top in teacher_top_ids]
    return np.stack(counts).astype(np.int32)


def select_hint(
    student_top_ids: np.ndarray,
    teacher_top_ids: Sequence[np.ndarray],
    rule: HintRule = "sequence",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """i32[T]: the index of the hint used at each reply position.

    student_top_ids is i32[T, k]; teacher_top_ids holds one i32[T, K] per hint, hints in order of length, shortest
    first, so that ties go to the shortest. `sequence` takes one hint for the whole reply, the one with the largest
    overlap; `token` chooses position by position.
    """
    num_hints, num_tokens = len(teacher_top_ids), len(student_top_ids)
    if num_hints == 0:
        raise ValueError("select_hint got no hint; a turn without a hint has no distillation term")
    if rule == "token":
        return overlaps(student_top_ids, teacher_top_ids).argmax(0).astype(np.int32)
    if rule == "sequence":
        chosen = int(overlaps(student_top_ids, teacher_top_ids).sum(1).argmax())
    elif rule == "random":
        if rng is None:
            raise ValueError("hint rule 'random' needs rng=np.random.default_rng(seed)")
        chosen = int(rng.integers(num_hints))
    elif rule in ("shortest", "longest"):
        chosen = 0 if rule == "shortest" else num_hints - 1
    else:
        raise ValueError(f"hint rule {rule!r} is unknown; choose sequence, token, shortest, longest or random")
    return np.full(num_tokens, chosen, dtype=np.int32)


def _append(content: str | list | None, text: str) -> str | list:
    """Text content grows at its end; content in parts gets one more text part."""
    if isinstance(content, list):
        return [*content, {"type": "text", "text": text}]
    return (content or "") + text
