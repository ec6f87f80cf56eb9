"""Who continues whom: a request's identity, and the conversation it continues, told from its content.

Pure: no I/O, no engine. The gateway looks the digests up in the journal.

    messages:   system  user  assistant  user            ── the request
                └─────── history ──────┘ └─ fresh ─┘
    digest(history) = Turn.conversation of the turn it continues; fresh = that turn's next state
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clawrl.errors import GatewayError
from clawrl.types import Message, Role, TurnKind

NAME_BYTES = 1000
"""Of a user or session: both stand in one index entry, of which PostgreSQL takes 2,700 bytes."""
_UNSAID = ("system", "developer")  # clients rewrite them between turns


@dataclass(frozen=True, slots=True)
class Identity:
    """What a request says about itself."""

    user: str
    session: str | None  # None: to be told from the content
    kind: TurnKind
    source: str
    group: str | None
    key: str | None = None  # the client's idempotency key, made unique among users
    opts_out: bool = False  # its session is not to be recorded from here on
    retried: bool = False  # the client's SDK sent this request before and got no answer


@dataclass(frozen=True, slots=True)
class Continuation:
    """A request seen as the continuation of an earlier reply."""

    history: str | None  # digest up to and with the last assistant message; None: a first message
    fresh: tuple[Message, ...]  # what came after it
    role: Role


def identify(headers: Mapping[str, str], body: Mapping[str, Any]) -> Identity:
    """Read the identity from `X-Session-Id`, `X-Turn-Type`, `X-Source`, `X-Group` and the body's `user`.

    `X-Train: no` opts its session out.
    A request sent again says so by `Idempotency-Key`, or as OpenAI's SDKs do by `X-Stainless-Retry-Count`.
    Raises GatewayError for a turn type other than main or side, an X-Train other than yes or no, and a user or session
    that no journal can store.
    """
    kind, train = headers.get("x-turn-type", "main"), headers.get("x-train", "yes").strip().lower()
    if kind not in ("main", "side"):
        raise GatewayError(f"X-Turn-Type: {kind!r} is unknown; use main or side", param="X-Turn-Type")
    if train not in ("yes", "no"):  # what is meant as an opt-out must not be taken for none
        raise GatewayError(f"X-Train: {train!r} is unknown; use no, or leave it out", param="X-Train")
    user, session = str(body.get("user") or "local"), headers.get("x-session-id") or None
    if "\x00" in user or any("\ud800" <= letter <= "\udfff" for letter in user):
        raise GatewayError(f"user {user!a} has a NUL or half a surrogate pair; leave it out", param="user")
    for param, name in (("user", user), ("X-Session-Id", session or "")):
        if (size := len(name.encode())) > NAME_BYTES:
            raise GatewayError(f"{param} has {size} bytes; give one of at most {NAME_BYTES}", param=param)
    return Identity(
        user=user,
        session=session,
        kind=kind,
        source=headers.get("x-source", "chat"),
        group=headers.get("x-group"),
        key=_unique_key(user, headers.get("idempotency-key")),
        opts_out=train == "no",
        retried=headers.get("x-stainless-retry-count", "0") != "0",
    )


def _unique_key(user: str, key: str | None) -> str | None:
    """An idempotency key with its user; as a digest where it is too long for a database's index."""
    if key is None:
        return None
    whole = json.dumps([user, key])
    return whole if len(whole) <= NAME_BYTES else hashlib.sha256(whole.encode()).hexdigest()


def continuation(messages: Sequence[Message]) -> Continuation:
    """Split a request at its last assistant message."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        return Continuation(None, tuple(messages), "user")
    fresh = tuple(messages[last + 1 :])
    said = [message for message in fresh if message["role"] not in _UNSAID]
    role: Role = "tool" if said and all(message["role"] == "tool" for message in said) else "user"
    return Continuation(digest(messages[: last + 1]), fresh, role)


def digest(messages: Sequence[Message]) -> str:
    """A conversation's digest, the same however a client replays it.

    Left out: system messages, reasoning, tool-call ids; tool arguments are compared as values, content parts as text.
    """
    said = [_normal(message) for message in messages if message["role"] not in _UNSAID]
    text = json.dumps(said, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()  # half a pair is valid JSON


def request_digest(body: Mapping[str, Any]) -> str:
    """A request's digest, the same for the same request sent again only: all that its prompt is made of, as it is."""
    prompt = [body["messages"], body.get("tools") or [], body.get("chat_template_kwargs") or {}]
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()


def _normal(message: Message) -> list[Any]:
    calls = [
        [call["function"]["name"], _arguments(call["function"].get("arguments"))]
        for call in message.get("tool_calls") or ()
    ]
    return [message["role"], content_text(message.get("content")).strip(), calls]


def content_text(content: Any) -> str:
    """The text of a message's content: a string, a list of parts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, dict))


def _arguments(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
