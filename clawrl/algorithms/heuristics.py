"""What can be read off a turn and what followed it without asking a model. Pure.

Rules speak only where they are nearly sure, and abstain (None) everywhere else: then the judge is asked. They know no
language but English words of praise and complaint, thumbs, and what programs print when they fail.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from clawrl.types import Message, NextState, Turn

SHORT = 4
"""Words of a message that is nothing but praise or complaint."""
SAME, LONG = 0.9, 12
"""A request is asked again if it is this similar (difflib's ratio) and has so many characters."""

_PRAISE = re.compile(
    r"[👍🎉✅💯❤]|\b(thanks?|thank you|thx|perfect|great|excellent|awesome|exactly|well done|good job)\b"
)
_COMPLAINT = re.compile(r"[👎❌]|\b(wrong|incorrect|useless|bad|no|nope|terrible|not what i \w+)\b")
_FAILURE = re.compile(
    r"\A\s*(error\b|fatal:|traceback \(most recent call last\)|\w*(error|exception): |command not found)"
    r"|\b(exit(ed)?( with)?( code| status)?|returncode)[ :=]+(?!0\b)\d+",
    re.IGNORECASE,
)


def read_off(turn: Turn, next_state: NextState) -> int | None:
    """-1: a tool failed, the user complains in few words, or asks the same again; +1: the user praises in few words.

    None: it cannot be told so. Of several tool results one that failed is enough.
    """
    texts = [_text(message) for message in next_state.messages]
    if next_state.role == "tool":
        return -1 if any(map(_failed, texts)) else None
    if next_state.role != "user" or not texts:
        return None
    said = " ".join(" ".join(texts).split()).lower()
    if len(said.split()) <= SHORT:
        praised, complained = bool(_PRAISE.search(said)), bool(_COMPLAINT.search(said))
        return None if praised == complained else 1 if praised else -1
    return -1 if _same(said, _request(turn.messages)) else None


def _failed(text: str) -> bool:
    """By its first words, an exit code, or JSON's `error` or `isError`."""
    try:
        found = json.loads(text)
    except ValueError:
        return _FAILURE.search(text) is not None
    return isinstance(found, dict) and bool(found.get("error") or found.get("isError"))


def _request(messages: Sequence[Message]) -> str:
    """What the user said last before the reply."""
    asked = [_text(message) for message in messages if message.get("role") == "user"]
    return " ".join(asked[-1].split()).lower() if asked else ""


def _same(one: str, other: str) -> bool:
    return len(other) >= LONG and SequenceMatcher(None, one, other, autojunk=False).ratio() >= SAME


def _text(message: Message) -> str:
    content: Any = message.get("content")
    if isinstance(content, list):
        return " ".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""
