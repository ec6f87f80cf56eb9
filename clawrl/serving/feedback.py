"""Explicit feedback as it arrives: thumbs and corrections, of a turn by its id or of a session's last turn.

Pure but for the journal's calls. Ignores what is learnt from it (`rollout/collector`).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clawrl.errors import GatewayError
from clawrl.serving.placing import no_session
from clawrl.serving.redaction import Redactor
from clawrl.types import Feedback

LONGEST = 20_000
_TURN_KEYS = ("turn", "response_id")
_KEYS = (*_TURN_KEYS, "session", "score", "text", "user")


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a request says of a turn, or of a session's last one."""

    turn: str | None
    session: str | None
    score: Literal[-1, 0, 1] | None
    text: str | None


def read_opinion(body: Mapping[str, Any]) -> Opinion:
    """Raises GatewayError for anything but one target, and a score of -1, 0 or 1, a text, or both."""
    unknown = sorted(set(body) - set(_KEYS))
    if unknown:
        raise GatewayError(f"{unknown[0]} is not known here; use {', '.join(_KEYS)}", param=unknown[0])
    named = [key for key in (*_TURN_KEYS, "session") if body.get(key) is not None]
    if len(named) != 1:
        raise GatewayError("name one of turn, response_id and session", param=named[1] if named else "turn")
    target = body[named[0]]
    if not isinstance(target, str) or not target or "\x00" in target:
        raise GatewayError(f"{named[0]}={target!r} is no id", param=named[0])
    score, text = body.get("score"), body.get("text")
    if score is not None and (isinstance(score, bool) or not isinstance(score, int) or score not in (-1, 0, 1)):
        raise GatewayError(f"score={score!r} is none of -1, 0 and 1", param="score")
    if text is not None and (not isinstance(text, str) or not text.strip() or len(text) > LONGEST):
        raise GatewayError(f"text must be words, at most {LONGEST} characters", param="text")
    if text is not None and ("\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text)):
        raise GatewayError("text has a NUL or half a surrogate pair; leave it out", param="text")
    if score is None and text is None:
        raise GatewayError("give a score of -1, 0 or 1, a text, or both", param="score")
    return Opinion(target if named[0] != "session" else None, target if named[0] == "session" else None, score, text)


async def take(journal: Any, redactor: Redactor, opinion: Opinion, user: str) -> dict[str, Any]:
    """Store it; what the client is told. Raises GatewayError 404 for what is not there, or another user's."""
    if opinion.turn is not None:
        found = [(id, session) for id, whose, session in await journal.authors.remote([opinion.turn]) if whose == user]
        if not found:
            raise GatewayError(f"there is no turn {opinion.turn!r} of yours", status=404, code="turn_not_found")
        turn, session = found[0]
    else:
        last = await journal.last_turn.remote(user, opinion.session)
        if last is None:
            raise no_session(opinion.session)
        turn, session = last[0], last[1]
    feedback = Feedback(f"feedback-{uuid.uuid4().hex}", turn, user, opinion.score, opinion.text, time.time())
    stored = await journal.take_feedback.remote(redactor.record(feedback))
    return {"id": stored, "object": "feedback", "turn": turn, "session": session, "score": opinion.score}
