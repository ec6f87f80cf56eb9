"""Who continues whom: a request's identity, and the conversation it continues, told from its content.

Pure: no I/O, no engine. The gateway looks the digests up in the journal. What counts as said is in `normalisers`.

    messages:   system  user  assistant  user            ── the request
                └─────── history ──────┘ └─ fresh ─┘
    digest(history) = Turn.conversation of the turn it continues; fresh = that turn's next state

A session is named, in this order, by `X-Session-Id`, by what clients send of themselves, by their marks in the
messages, and else by the conversation that the request goes on with.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clawrl.errors import GatewayError
from clawrl.serving.keys import LOCAL_USER
from clawrl.serving.normalisers import Said, said, session_marker, side_marker
from clawrl.types import Message, Role, TurnKind

EARLIER = 16
"""So many replies of a history are looked up, the newest first, where the newest is none of ours."""
NAME_BYTES = 1000
"""Of a user or session: both stand in one index entry, of which PostgreSQL takes 2,700 bytes."""
_SESSION_HEADERS = ("x-session-affinity", "session_id", "session-id")
_BOUNDARY = re.compile(r"(.+):([1-9]\d{0,8})")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


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
    reason: str = ""  # why it is main or side
    named_by: str = ""  # what named the session
    explicit: bool = False  # the session is named by X-Session-Id
    run: str | None = None  # names the session of what goes on with nothing: one agent run
    scope: str = ""  # beside a key, the body's user: keeps conversations of one key's users apart
    done: bool = False  # the session ends with this turn


@dataclass(frozen=True, slots=True)
class Continuation:
    """A request seen as the continuation of an earlier reply."""

    histories: tuple[str, ...]  # digests up to and with each assistant message, the last first; () in a first message
    fresh: tuple[Message, ...]  # what came after the last of them, without what the client added
    role: Role
    reply: str | None = None  # digest of the last assistant message alone

    @property
    def history(self) -> str | None:
        return self.histories[0] if self.histories else None


def identify(headers: Mapping[str, str], body: Mapping[str, Any], key_user: str | None = None) -> Identity:
    """Read the identity from headers, body and messages; `key_user` is whose key the request carries.

    `X-Train: no` opts its session out. A request sent again says so by `Idempotency-Key`, or as OpenAI's SDKs do by
    `X-Stainless-Retry-Count`. Raises GatewayError for a header whose value is not one of those known, and for a name
    that no journal can store.
    """
    train = _one_of(headers, "X-Train", ("no", "yes"), "yes")  # what is meant as an opt-out must not be taken for none
    done = _one_of(headers, "X-Session-Done", ("yes", "true", "1", "no", "false", "0"), "no")
    said_user = _name(str(body.get("user") or ""), "user")
    user = key_user or said_user or LOCAL_USER
    kind, reason = _kind(headers, body)
    session, named_by = _session(headers, body)
    trace = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
    return Identity(
        user=user,
        session=session,
        kind=kind,
        source=_name(headers.get("x-source", "chat"), "X-Source"),
        group=_name(headers.get("x-group") or "", "X-Group") or None,
        key=_unique_key(user, headers.get("idempotency-key")),
        opts_out=train == "no",
        retried=headers.get("x-stainless-retry-count", "0") != "0",
        reason=reason,
        named_by=named_by,
        explicit=named_by == "X-Session-Id",
        run=f"run-{trace[1]}" if trace else None,
        scope="" if key_user is None else said_user,
        done=done in ("yes", "true", "1"),
    )


def session_before(identity: Identity) -> str | None:
    """The name before this one, where OpenClaw's affinity header counts (`<id>:<n>`) compactions and `/new`."""
    counted = _BOUNDARY.fullmatch(identity.session or "") if identity.named_by == _SESSION_HEADERS[0] else None
    return f"{counted[1]}:{int(counted[2]) - 1}" if counted else None


def _kind(headers: Mapping[str, str], body: Mapping[str, Any]) -> tuple[TurnKind, str]:
    """Main or side, and why. What cannot be told is side."""
    messages = body.get("messages") or []
    if "x-turn-type" in headers:
        kind = _one_of(headers, "X-Turn-Type", ("main", "side"), "main")
        return ("side" if kind == "side" else "main"), "X-Turn-Type"
    marker = side_marker(messages, bool(body.get("tools")))
    if marker is not None:
        return "side", marker
    if messages:
        spoken = said(messages[-1:]) or said(messages)[-1:]
        if not spoken or spoken[-1].role not in ("user", "tool"):
            return "side", "nobody asks: the last message is neither a user's nor a tool's"
    if (body.get("n") or 1) != 1:
        return "side", f"n={body['n']}: no one reply"
    return "main", ""


def _session(headers: Mapping[str, str], body: Mapping[str, Any]) -> tuple[str | None, str]:
    """(name, what named it); (None, "") where nothing does."""
    if headers.get("x-session-id"):
        return _name(headers["x-session-id"], "X-Session-Id"), "X-Session-Id"
    for header in _SESSION_HEADERS:
        if headers.get(header):
            return _name(headers[header], header), header
    key = body.get("prompt_cache_key")
    if isinstance(key, str) and key:
        return _name(key, "prompt_cache_key"), "prompt_cache_key"
    marked = session_marker(body.get("messages") or [])
    if marked is not None:
        return _name(marked, "sessionId"), "OpenClaw's runtime line"
    return None, ""


def _one_of(headers: Mapping[str, str], header: str, allowed: tuple[str, ...], default: str) -> str:
    value = headers.get(header.lower(), default).strip().lower()
    if value not in allowed:
        raise GatewayError(f"{header}: {value!r} is unknown; use {' or '.join(allowed)}, or leave it out", param=header)
    return value


def _name(name: str, param: str) -> str:
    if "\x00" in name or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise GatewayError(f"{param} {name!a} has a NUL or half a surrogate pair; leave it out", param=param)
    if (size := len(name.encode())) > NAME_BYTES:
        raise GatewayError(f"{param} has {size} bytes; give one of at most {NAME_BYTES}", param=param)
    return name


def _unique_key(user: str, key: str | None) -> str | None:
    """An idempotency key with its user; as a digest where it is too long for a database's index."""
    if key is None:
        return None
    whole = json.dumps([user, key])
    return whole if len(whole) <= NAME_BYTES else hashlib.sha256(whole.encode()).hexdigest()


def continuation(messages: Sequence[Message], scope: str = "") -> Continuation:
    """Split a request at its last assistant message, what the client added left out."""
    spoken = said(messages)
    replies = [at for at, each in enumerate(spoken) if each.role == "assistant"]
    last = replies[-1] if replies else -1
    fresh = tuple(_as_said(messages[each.position], each) for each in spoken[last + 1 :])
    role: Role = "tool" if fresh and all(each.role == "tool" for each in spoken[last + 1 :]) else "user"
    if not replies:
        return Continuation((), fresh, "user")
    wanted = set(replies[-EARLIER:])
    digests = _digests(spoken[: last + 1], wanted, scope)
    return Continuation(tuple(reversed(digests)), fresh, role, digest_of([spoken[last]]))


def digest(messages: Sequence[Message], scope: str = "") -> str:
    """A conversation's digest, the same however a client replays it (`normalisers`)."""
    return digest_of(said(messages), scope)


def digest_of(spoken: Sequence[Said], scope: str = "") -> str:
    return _digests(spoken, {len(spoken) - 1}, scope)[0]


def _digests(spoken: Sequence[Said], at: set[int], scope: str) -> list[str]:
    """SHA-256 of the JSON list of the messages up to each of these positions, in one pass."""
    hashed, found = hashlib.sha256(f"{scope}\n".encode() if scope else b""), []
    hashed.update(b"[")
    for position, each in enumerate(spoken):
        text = json.dumps(each.normal, ensure_ascii=False, sort_keys=True)
        hashed.update((", " * (position > 0) + text).encode("utf-8", "surrogatepass"))  # half a pair is valid JSON
        if position in at:
            ended = hashed.copy()
            ended.update(b"]")
            found.append(ended.hexdigest())
    if not spoken:
        hashed.update(b"]")
        found.append(hashed.hexdigest())
    return found


def request_digest(body: Mapping[str, Any], scope: str = "") -> str:
    """A request's digest, the same for the same request sent again only: all that its prompt is made of, as it is."""
    prompt = [body["messages"], body.get("tools") or [], body.get("chat_template_kwargs") or {}]
    text = json.dumps([*prompt, scope] if scope else prompt, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_said(message: Message, each: Said) -> Message:
    """The message as it stood, without the client's own words in it."""
    return {**message, "content": each.text} if each.added else message
