"""Where a turn stands, and what is kept of it: the journal as one gateway replica speaks to it.

Knows sessions, consent and the journal's calls. Ignores HTTP, OpenAI's shapes and the engine.

    request ─► place: which turn does it go on with? ─► that turn gets its next state ─► keep: the turn, once it is said

Secrets are taken out before anything goes to the journal, and of who opted out nothing goes there; the digests by which
conversations are known are those of the words as they were.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from clawrl.config import PrivacySection
from clawrl.errors import GatewayError
from clawrl.serving.consent import HEADER, OptOuts
from clawrl.serving.redaction import Redactor
from clawrl.serving.sessions import Continuation, Identity, continuation, digest, session_before
from clawrl.types import Consent, Message, NextState, Turn

log = logging.getLogger(__name__)

UNRECORDED = ""
"""The journal's id for a turn that it knows of and does not have."""
NO_SESSION = ""
"""A session that no request can name, and no turn is in."""
CONSENTS, FOLLOW_S, FOLLOW_RETRY_S = 1000, 30.0, 0.5
"""Words read at once from the journal, one long poll of it, and the pause after a failed one."""
KNOWN_OWNERS = 10_000
"""Sessions whose owner was asked for and need not be again."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn stands: its session, its position in it, what it goes on with, and how all that was told."""

    session: str
    index: int
    recorded: bool = True
    parent: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a request goes on with."""

    turn: str | None
    session: str
    index: int
    how: str
    answers: bool = False  # what is new in the request follows that very turn's reply


class Placing:
    """One per gateway replica. `journal` is its handle."""

    def __init__(self, journal: Any, privacy: PrivacySection) -> None:
        self._journal = journal
        self.redactor = Redactor(privacy)
        self.opt_outs = OptOuts(privacy.opt_out_users)
        self._owned: OrderedDict[tuple[str, str], None] = OrderedDict()
        self.following = asyncio.create_task(self._follow_consents())

    async def require_own(self, identity: Identity) -> None:
        """Raises GatewayError 404 for a session that is another user's."""
        if not identity.explicit or identity.session is None:
            return
        mine = (identity.user, identity.session)
        if mine in self._owned:
            return
        owners = await self._journal.owners.remote(identity.session)
        if owners and identity.user not in owners:
            raise no_session(identity.session)
        self._owned[mine] = None
        if len(self._owned) > KNOWN_OWNERS:
            self._owned.popitem(last=False)

    async def place(self, messages: list[Message], identity: Identity) -> Place:
        """Find the turn this request continues and give it its next state; side calls stand alone.

        Where the request, its session or its user opted out, or the conversation was served unrecorded so far, nothing
        is recorded.
        """
        user = identity.user
        session = identity.session or identity.run or f"session-{uuid.uuid4().hex}"
        if identity.kind == "side":
            recorded = not (identity.opts_out or self.opt_outs.cover(user, session))
            return Place(session, 0, recorded, reason=_reason(identity, ""))
        seen = continuation(messages, identity.scope)
        found = await self._found(seen, identity, session)
        session = found.session
        if identity.opts_out and found.turn in (None, UNRECORDED) and identity.session is None:
            await self._remember(user)
            return Place(session, 0, recorded=False)
        if identity.opts_out and not self.opt_outs.cover(user, session):
            word = await self._journal.consent.remote(user=user, train=False, session=session)
            self.opt_outs.take(Consent(**word))
        if found.turn == UNRECORDED or self.opt_outs.cover(user, session):
            return Place(session, 0, recorded=False)
        if found.answers and found.turn is not None and seen.fresh:
            next_state = NextState(found.turn, seen.role, seen.fresh, False, time.time())
            await self._journal.append.remote(self.redactor.record(next_state))
        return Place(session, found.index, parent=found.turn, reason=_reason(identity, found.how))

    async def end(self, identity: Identity) -> str:
        """Nothing will follow the last turn of the named session; its id. Raises GatewayError 404 if there is none."""
        last = await self._journal.last_turn.remote(identity.user, identity.session)
        if last is None:
            raise no_session(identity.session)
        await self._journal.append.remote(NextState(last[0], "user", (), True, time.time()))
        return last[0]

    async def _found(self, seen: Continuation, identity: Identity, fresh_session: str) -> Found:
        """The turn that a request goes on with, the newest first: by what was said, and in a named session by its last
        reply alone, where a client has rewritten what was before it (all, or a part: old images left out)."""
        earlier: Found | None = None
        if seen.histories:
            named = identity.session
            found = await self._journal.continued.remote(identity.user, list(seen.histories), named)
            if found is not None:
                turn, session, index, at = found
                if turn == UNRECORDED:
                    return Found(UNRECORDED, named or session, 0, "")
                if at == 0:
                    return Found(turn, session, index + 1, "goes on with its words", answers=True)
                earlier = Found(turn, session, index + 1, f"goes on with its words, {at} replies ago")
        if identity.session is None:
            how = "its history is of no turn here" if seen.histories else "a first message"
            return earlier or Found(None, fresh_session, 0, how)
        last = await self._journal.last_turn.remote(identity.user, identity.session)
        if last is None:
            compacted = await self._compacted(seen, identity)
            return compacted or earlier or Found(None, identity.session, 0, "the session's first")
        turn, session, index = last[:3]
        if await self._said(turn, seen.reply):
            return Found(turn, session, index + 1, "its last reply, before it a rewritten history", answers=True)
        return earlier or Found(None, session, index + 1, "its history is of no turn of the session")

    async def _compacted(self, seen: Continuation, identity: Identity) -> Found | None:
        """What a session goes on with whose name a compaction has changed; `/new`, which does too, has no history."""
        before = session_before(identity)
        if before is None or identity.session is None or seen.reply is None:
            return None
        if self.opt_outs.cover(identity.user, before):
            return Found(UNRECORDED, identity.session, 0, "")
        last = await self._journal.last_turn.remote(identity.user, before)
        if last is None or not await self._said(last[0], seen.reply):
            return None
        return Found(last[0], identity.session, last[2] + 1, "the last reply before a compaction", answers=True)

    async def _said(self, turn: str, reply: str | None) -> bool:
        """Whether the turn's reply is the one of this digest."""
        if reply is None:
            return False
        said = await self._journal.turn.remote(turn)
        return said is not None and digest([said.reply]) == reply

    async def _remember(self, user: str) -> None:
        """A conversation without a session opts out: its own mark says so, and one word, for all of the user's, that
        every replica should ask for such marks."""
        if not self.opt_outs.concern(user):
            word = await self._journal.consent.remote(user=user, train=False, session=NO_SESSION)
            self.opt_outs.take(Consent(**word))

    async def told(self, identity: Identity, placing: asyncio.Task[Place]) -> dict[str, str]:
        """The headers that say whether this reply is recorded; only who ever opted out waits for the journal here."""
        certain = identity.opts_out or self.opt_outs.cover(identity.user, identity.session)
        if certain or (self.opt_outs.concern(identity.user) and not (await placing).recorded):
            return HEADER
        return {}

    async def keep(self, turn: Turn, place: Place, *, done: bool = False) -> None:
        """Record the turn without its secrets; of one that is not recorded, only that its conversation is not.

        `done`: nothing will follow it.
        """
        if place.recorded:
            end = [NextState(turn.id, "user", (), True, turn.ended)] if done and turn.kind == "main" else []
            await self._journal.append.remote(self.redactor.record(turn), *end)
        elif turn.kind == "main":
            await self._journal.append.remote(Consent(turn.user, turn.session, False, turn.ended, turn.conversation))

    async def _follow_consents(self) -> None:
        """Take in what users say, to whichever replica, for ever."""
        after = 0
        while True:
            try:
                words = await self._journal.consents.remote(after, CONSENTS, FOLLOW_S)
            except Exception as error:
                log.warning("event=journal_unreachable error=%s retry_s=%g", type(error).__name__, FOLLOW_RETRY_S)
                await asyncio.sleep(FOLLOW_RETRY_S)
                continue
            for seq, word in words:
                self.opt_outs.take(word)
                after = seq


def no_session(name: str | None) -> GatewayError:
    return GatewayError(
        f"there is no session {name!r} of yours; choose another name", status=404, code="session_not_found"
    )


def _reason(identity: Identity, how: str) -> str:
    """Why a turn is what it is, for `clawrl sessions`."""
    named = f"session by {identity.named_by}" if identity.named_by else ""
    return "; ".join(filter(None, (identity.reason, named, how)))
