"""What is taken out of words before anything is written: secrets by pattern, and whatever a deployment's own function
takes out. Pure.

Knows the shapes of common credentials and which fields of a record hold words. Ignores the journal and HTTP. A turn in
which something was redacted keeps none of its tokens (`NOT_KEPT`), for they would spell it: it is recorded and never
trains, and neither do the later turns of its conversation, whose prompts hold it too.

    Turn, NextState, Feedback ──► record() ──► the same, each pattern's match replaced by [redacted]
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from clawrl.config import PrivacySection, load_function
from clawrl.types import NOT_KEPT, Feedback, NextState, Turn

log = logging.getLogger(__name__)

REDACTED = "[redacted]"
_STRUCTURE = frozenset({"role", "type"})
"""Keys whose values are a protocol's words, not anybody's."""

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True)
class Pattern:
    """A shape to take out; where none of `hints` occurs in a text it cannot match, which is quickly told."""

    name: str
    shape: re.Pattern[str]
    hints: tuple[str, ...] = ("",)


def _pattern(name: str, shape: str, *hints: str) -> Pattern:
    return Pattern(name, re.compile(shape, re.DOTALL), hints)


_START = r"(?<![A-Za-z0-9])"
_DIGIT = r"(?=[A-Za-z_-]{0,200}+\d)"
"""A digit comes within so many characters: whoever looks to the end of a word from each start in it, as of
`sk-sk-sk-…`, needs minutes for a long one."""
DEFAULT = (
    _pattern("sk- key (OpenAI, Anthropic and others)", _START + r"sk-" + _DIGIT + r"[A-Za-z0-9_-]{20,}", "sk-"),
    _pattern("GitHub token", _START + r"(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})", "gh", "github_pat_"),
    _pattern("Slack token", _START + r"xox[abeoprs]-" + _DIGIT + r"[A-Za-z0-9-]{10,}", "xox"),
    _pattern("AWS key id", _START + r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])", "AKIA", "ASIA"),
    _pattern("Google key", _START + r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])", "AIza"),
    _pattern("Hugging Face token", _START + r"hf_[A-Za-z0-9]{30,}", "hf_"),
    _pattern(
        "private key",  # one that was cut off is taken out to the end of the text
        r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----(?:.*?-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|.*)",
        "PRIVATE KEY",
    ),
    _pattern(
        "bearer token", _START + r"(?i:bearer)\s+(?=[A-Za-z._~+/-]{0,200}+\d)[A-Za-z0-9._~+/-]{16,}=*", "earer", "EARER"
    ),
    _pattern("JSON web token", _START + r"eyJ[\w-]{8,1024}+\.eyJ[\w-]{8,}+\.[\w-]{8,}", "eyJ"),
)
"""Each demands enough of its kind's length and alphabet that words of a language do not match, and looks a bounded way
ahead from each start, so that no text takes long."""


class Redactor:
    """Takes out what `[privacy]` names. Raises ConfigError for a function that cannot be found or called."""

    def __init__(self, settings: PrivacySection) -> None:
        self._patterns = DEFAULT if settings.redact == "default" else tuple(_pattern(x, x, "") for x in settings.redact)
        self._function = None if settings.redactor is None else load_function("privacy.redactor", settings.redactor)

    def record(self, record: _Record) -> _Record:
        """A turn, next state or feedback without what must not be written; digests stay those of the original."""
        cleaned: Any = record
        if isinstance(record, Turn):
            words = {name: getattr(record, name) for name in ("messages", "tools", "template", "reply")}
            clean = {name: self.value(value) for name, value in words.items()}
            cleaned = record if clean == words else replace(record, **clean, capture=NOT_KEPT)
        elif isinstance(record, NextState):
            cleaned = replace(record, messages=self.value(record.messages))
        elif isinstance(record, Feedback) and record.text is not None:
            cleaned = replace(record, text=self.text(record.text))
        return cleaned

    def value(self, value: Any) -> Any:
        """A JSON value with every text in it redacted."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: each if key in _STRUCTURE else self.value(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.value, value))
        return value

    def text(self, text: str) -> str:
        for pattern in self._patterns:
            if any(hint in text for hint in pattern.hints):
                text = pattern.shape.sub(REDACTED, text)
        return text if self._function is None else self._by_function(self._function, text)

    def _by_function(self, function: Callable[[str], str], text: str) -> str:
        """What the deployment's function leaves; nothing of a text on which it fails."""
        try:
            cleaned = function(text)
        except Exception as error:
            log.error("event=redactor_failed error=%s remedy='mend privacy.redactor'", type(error).__name__)
            return REDACTED
        if not isinstance(cleaned, str):
            log.error("event=redactor_failed returned=%s remedy='return text'", type(cleaned).__name__)
            return REDACTED
        return cleaned
