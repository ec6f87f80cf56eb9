"""What was really said: a conversation without what clients add, rewrite or leave out when they send it again.

Pure, small pieces: `said` holds for every client, a `Family` for the clients of one kind. Ignores sessions and digests
(`sessions`). What clients really send was measured (versions: README, "Sessions").

    any client    system messages, reasoning, <think> blocks, tool-call ids and unknown keys are left out;
                  arguments are compared as values, content parts as text
    OpenClaw      internal context and summaries are left out, and so are polls that were answered with silence
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clawrl.types import Message

UNSAID = ("system", "developer")
"""Roles that clients rewrite between turns."""

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
_THOUGHT_FROM_THE_PROMPT = re.compile(r"\A(?:(?!<think>).)*?</think>", re.DOTALL)
"""Some templates open the block themselves, so that the reply only closes it."""


@dataclass(frozen=True, slots=True)
class Said:
    """One message as it counts: where it stood in the request, and its normal form."""

    position: int
    role: str
    text: str
    calls: list[Any]
    added: bool  # the client added words of its own, which `text` lacks

    @property
    def normal(self) -> list[Any]:
        return [self.role, self.text, self.calls]


@dataclass(frozen=True, slots=True)
class Family:
    """How the clients of one kind write.

    `words` takes a user's text and returns what the user said of it; None: nothing. `is_poll` knows a user message
    that nobody wrote and that leaves no trace if it is answered with `silence`. `side` names the kind of a request that
    is no turn of anybody's. `session` finds a session's name in the messages.
    """

    name: str
    words: Callable[[str], str | None]
    is_poll: Callable[[str], bool]
    silence: tuple[str, ...]
    side: Callable[[Sequence[Message], bool], str | None]
    session: Callable[[Sequence[Message]], str | None]


def said(messages: Sequence[Message]) -> list[Said]:
    """The conversation, message by message, as it is the same however a client sends it."""
    out: list[Said] = []
    poll: int | None = None  # where an exchange begins that nobody may have noticed
    for position, message in enumerate(messages):
        role = message.get("role")
        if role in UNSAID:
            continue
        text, added = content_text(message.get("content")), False
        if role == "user":
            words = _words(text)
            if words is None:
                continue
            text, added = words, words != text
            _forget_silence(out, poll)
            poll = len(out) if any(family.is_poll(text) for family in FAMILIES) else None
        elif role == "assistant":
            text = _THOUGHT_FROM_THE_PROMPT.sub("", _THOUGHT.sub("", text), count=1)
        out.append(Said(position, str(role), text.strip(), _calls(message), added))
    _forget_silence(out, poll)
    return out


def side_marker(messages: Sequence[Message], has_tools: bool) -> str | None:
    """`family: kind` of a request that a client is known to make for itself; None of any other."""
    for family in FAMILIES:
        kind = family.side(messages, has_tools)
        if kind is not None:
            return f"{family.name}: {kind}"
    return None


def session_marker(messages: Sequence[Message]) -> str | None:
    """The session's name where a client writes it into the messages."""
    return next(filter(None, (family.session(messages) for family in FAMILIES)), None)


def content_text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        return ""
    return "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))


def _calls(message: Message) -> list[Any]:
    functions = [call.get("function") for call in message.get("tool_calls") or () if isinstance(call, dict)]
    return [
        [function.get("name"), _arguments(function.get("arguments"))]
        for function in functions
        if isinstance(function, Mapping)
    ]


def _arguments(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def _words(text: str) -> str | None:
    for family in FAMILIES:
        words = family.words(text)
        if words is None:
            return None
        text = words
    return text


def _forget_silence(out: list[Said], poll: int | None) -> None:
    """Drop a poll with what followed, if that ended with a reply that nobody was shown."""
    if poll is None or out[-1].role != "assistant":
        return
    answer = out[-1].text
    if not answer or any(word in answer for family in FAMILIES for word in family.silence):
        del out[poll:]


# -- OpenClaw ----------------------------------------------------------------------------------------------------------

_INTERNAL = re.compile(
    r"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>.*?(?:<<<END_OPENCLAW_INTERNAL_CONTEXT>>>|<<<END[^>\n]*>>>|\Z)", re.DOTALL
)
_RUNTIME = re.compile(r"^Runtime: .*$", re.MULTILINE)
_RUNTIME_SESSION = re.compile(r"\bsessionId=([^\s|]+)")
_RUNTIME_KEY = re.compile(r"\bsession=([^\s|]+)")
_DATED = re.compile(r"\A\[[A-Z][a-z]{2} \d{4}-\d{2}-\d{2}[^\]]*\]")
_HEARTBEAT = "[OpenClaw heartbeat poll]"
_FLUSH = "Pre-compaction memory flush."
_TITLE = "Generate a concise session title"
_SUMMARY = "The conversation history before this point was compacted into the following summary:"
_COMPACTION = "You are a context summarization assistant"


def _openclaw_words(text: str) -> str | None:
    if text.startswith(_SUMMARY):
        return None
    if "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>" not in text:
        return text
    rest = _INTERNAL.sub("", text)
    return rest if rest.strip() else None


def _openclaw_poll(text: str) -> bool:
    start = text.lstrip()
    return start.startswith((_HEARTBEAT, _FLUSH)) or ("HEARTBEAT.md" in text and "HEARTBEAT_OK" in text)


def _openclaw_side(messages: Sequence[Message], has_tools: bool) -> str | None:
    """Titles and compaction have no tools; the others are told by the last thing that a user seems to have said."""
    if not has_tools:
        texts = [content_text(message.get("content")) for message in (*messages[:2], *messages[-1:])]
        if any(_TITLE in text for text in texts):
            return "title"
        if any(_COMPACTION in text for text in texts):
            return "compaction"
    asked = [content_text(message.get("content")) for message in messages if message.get("role") == "user"]
    spoken = [words for words in map(_openclaw_words, asked) if words is not None]
    if not spoken:
        return None
    last = spoken[-1].lstrip()
    for start, kind in (
        (_FLUSH, "memory flush"),
        ("[cron:", "cron"),
        ("[Subagent Context]", "subagent"),
        ("A background task completed.", "subagent's completion"),
    ):
        if last.startswith(start) or _DATED.sub("", last, count=1).lstrip().startswith(start):
            return kind
    dates = any(_DATED.match(text.lstrip()) for text in spoken[:-1])
    hidden = len(spoken) == 1 and any(text.startswith(_SUMMARY) for text in asked)  # all that was dated is in a summary
    if _openclaw_poll(last) or (not _DATED.match(last) and (dates or hidden)):
        return "heartbeat"
    return _by_runtime(messages)


def _by_runtime(messages: Sequence[Message]) -> str | None:
    """Whose the session is, by the key in the runtime line: `agent:main:cron:…`, `agent:main:subagent:…`."""
    key = _runtime(messages, _RUNTIME_KEY) or ""
    return next((kind for kind in ("cron", "subagent") if f":{kind}:" in f"{key}:"), None)


def _openclaw_session(messages: Sequence[Message]) -> str | None:
    return _runtime(messages, _RUNTIME_SESSION)


def _runtime(messages: Sequence[Message], what: re.Pattern[str]) -> str | None:
    """A field of the line `Runtime: agent=main | session=… | sessionId=… | …`: in the first user message or the system
    prompt."""
    first = next((at for at, message in enumerate(messages) if message.get("role") == "user"), None)
    for message in messages[: 0 if first is None else first + 1]:
        text = content_text(message.get("content"))
        line = _RUNTIME.search(text) if "Runtime: agent=" in text else None
        found = what.search(line[0]) if line else None
        if found is not None:
            return found[1]
    return None


FAMILIES: Iterable[Family] = (
    Family(
        "OpenClaw", _openclaw_words, _openclaw_poll, ("HEARTBEAT_OK", "NO_REPLY"), _openclaw_side, _openclaw_session
    ),
)
