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

SAME, LONG = 0.9, 12
"""A request is asked again if it is this similar (difflib's ratio) and has so many characters."""

_UP, _DOWN = re.compile("[👍🎉✅💯]"), re.compile("[👎❌]")
_PRAISE = frozenset("thanks thank thx perfect great excellent awesome exactly wonderful".split())
_COMPLAINT = frozenset("wrong incorrect useless terrible".split())
_FILLERS = frozenset("you so very much a lot that thats is it its this just completely the answer your reply".split())
_NOT_WANTED = re.compile(r"(no )?(this|that|thats|that is|its|it is) ?not what i (meant|wanted|asked for|asked|said)")

_FAILURE = re.compile(
    r"\A\s*(error\b|fatal:|traceback \(most recent call last\)|\w*(error|exception): |command not found)"
    r"|\b(exit(ed)?( with)?( code| status)?|returncode)[ :=]+(?!0\b)\d+",
    re.IGNORECASE,
)


def read_off(turn: Turn, next_state: NextState) -> int | None:
    """-1: a tool failed, the user only complains, or asks the same again; +1: the user only praises.

    None: it cannot be told so. Of several tool results one that failed is enough.
    """
    texts = [_text(message) for message in next_state.messages]
    if next_state.role == "tool":
        return -1 if any(map(_failed, texts)) else None
    if next_state.role != "user" or not texts:
        return None
    said = " ".join(texts)
    asked, told = _words(_request(turn.messages)), _words(said)
    praised = bool(_UP.search(said)) or _is_all(told, _PRAISE, said)
    complained = bool(_DOWN.search(said)) or _is_all(told, _COMPLAINT, said) or bool(_NOT_WANTED.fullmatch(told))
    if praised or complained:
        return None if praised and complained else 1 if praised else -1
    return -1 if _same(told, asked) else None


def _is_all(told: str, words: frozenset[str], said: str) -> bool:
    """Whether a message has words of a kind, nothing else but fillers, and asks nothing."""
    spoken = set(told.split())
    return bool(spoken & words) and spoken <= words | _FILLERS and "?" not in said


def _words(text: str) -> str:
    """Lower case, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", "", text).lower().split())


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
    return asked[-1] if asked else ""


def _same(one: str, other: str) -> bool:
    return len(other) >= LONG and SequenceMatcher(None, one, other, autojunk=False).ratio() >= SAME


def _text(message: Message) -> str:
    content: Any = message.get("content")
    if isinstance(content, list):
        return " ".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content or ""
