"""The journal as everyone meets it: an asynchronous actor over the store.

Knows how concurrent appends share one commit, and wakes long polls when something they wait for is durable. Ignores
SQL (`store`) and what records mean.

    append ─┐                                          ┌─► each caller returns
    append ─┼─► waiting ─► one commit (writer thread) ─┤
    append ─┘   (meanwhile the next group gathers)     └─► long polls wake and read (reader threads)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from clawrl.errors import JournalError
from clawrl.journal.database import READERS
from clawrl.journal.erasure import Content
from clawrl.journal.store import JournalStore, Write
from clawrl.observe import metric
from clawrl.types import (
    GROUP,
    Comparison,
    Consent,
    Episode,
    Erasure,
    Feedback,
    GateDecision,
    Judgement,
    NextState,
    Pin,
    Sample,
    Swap,
    Turn,
    TurnKind,
    VersionEvent,
    WeightVersion,
)

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_DAY_S = 86400.0
_EXPIRE_S = 3600.0
_EXPIRE_TURNS = 100


@dataclass(frozen=True, slots=True)
class _Pending:
    """An append that waits for its commit."""

    write: Write
    kinds: frozenset[type]
    durable: asyncio.Future[None]


def _mark(record: Any) -> bool:
    """Whether this is no word of a user, see Consent: nobody waits for it."""
    return isinstance(record, Consent) and record.conversation is not None


class Journal:
    """Async actor: an append returns when it is durable; every method may raise JournalError and leaves it usable.

    Turns older than `keep_days` are deleted (see JournalStore.expire); None keeps them for ever.
    """

    def __init__(self, url: str, keep_days: float | None = None) -> None:
        self._store = JournalStore(url)
        self._writer = ThreadPoolExecutor(1, "journal-writer")
        self._readers = ThreadPoolExecutor(READERS, "journal-reader")
        self._waiting: list[_Pending] = []
        self._committing: asyncio.Task[None] | None = None
        self._arrivals: defaultdict[type, asyncio.Event] = defaultdict(asyncio.Event)
        self._closed = False
        self._expiring: asyncio.Task[None] | None = None
        if keep_days is not None:
            self._expiring = asyncio.get_running_loop().create_task(self._expire(keep_days * _DAY_S))

    async def append(self, *records: Any) -> None:
        """Store records of any mix of types together; a record already there is left as it was."""
        await self._commit(
            self._store.appending(*records), frozenset(type(each) for each in records if not _mark(each))
        )

    async def record_version(self, version: WeightVersion, event: VersionEvent | None) -> None:
        """Store a version, the consumption of its samples and its event together; a repetition is ignored.

        Raises JournalError if another version consumed one of the samples, or has the same number.
        """
        await self._commit(self._store.recording(version, event), frozenset({WeightVersion, VersionEvent}))

    async def turn(self, id: str) -> Turn | None:
        return await self._read(self._store.turn, id)

    async def open_turn(self, user: str, conversation: str) -> tuple[str, str, int] | None:
        """(id, session, index) of the user's newest main turn whose conversation has this digest.

        The id is empty if such a conversation was served unrecorded after that.
        """
        return await self._read(self._open_turn, user, conversation)

    def _open_turn(self, user: str, conversation: str) -> tuple[str, str, int] | None:
        unrecorded = self._store.unrecorded(user, [conversation])
        return ("", unrecorded, 0) if unrecorded is not None else self._store.open_turn(user, conversation)

    async def continued(
        self, user: str, conversations: list[str], session: str | None
    ) -> tuple[str, str, int, int] | None:
        """(id, session, index, position in the list) of the newest main turn of the first conversation that is known.

        In the session if one is named. The id is empty if one of them was served unrecorded after that.
        """
        return await self._read(self._continued, user, conversations, session)

    def _continued(self, user: str, conversations: list[str], session: str | None) -> tuple[str, str, int, int] | None:
        unrecorded = self._store.unrecorded(user, conversations)
        return ("", unrecorded, 0, 0) if unrecorded else self._store.continued(user, conversations, session)

    async def last_turn(self, user: str, session: str) -> tuple[str, str, int, str] | None:
        """(id, session, index, conversation) of the newest main turn of a session."""
        return await self._read(self._store.last_turn, user, session)

    async def keyed_turn(self, key: str) -> Turn | None:
        """The turn with this idempotency key, unless it was withdrawn."""
        return await self._read(self._store.keyed_turn, key)

    async def repeated_turn(
        self,
        user: str,
        request: str,
        since: float,
        kind: TurnKind,
        source: str,
        group: str | None,
        session: str | None,
    ) -> Turn | None:
        """The user's newest turn started since then whose request had this digest, if nothing has followed it yet.

        One of the same kind, source and group, and of the session if one is named; none that was withdrawn.
        """
        return await self._read(self._store.repeated_turn, user, request, since, kind, source, group, session)

    async def pairs_to_judge(self, after: int, limit: int, timeout_s: float) -> list[tuple[int, Turn, NextState]]:
        """Unjudged main turns and what followed, with the next state's seq (> after); [] after `timeout_s`."""
        return await self._poll(NextState, timeout_s, self._store.pairs_to_judge, after, limit)

    async def samples_to_train(
        self, after: int, limit: int, timeout_s: float
    ) -> list[tuple[int, Sample, tuple[str, ...]]]:
        """Samples with their seq (> after), and whose policies are still to learn from them; [] after `timeout_s`."""
        return await self._poll(Sample, timeout_s, self._store.samples_to_train, after, limit)

    async def groups_to_compare(self, after: int, limit: int, timeout_s: float) -> list[tuple[int, str]]:
        """Groups all of whose attempts have ended, with a seq (> after); [] after `timeout_s`."""
        return await self._poll(Episode, timeout_s, self._store.groups_to_compare, after, limit)

    async def group(self, group: str) -> tuple[list[Episode], list[Turn]]:
        """The attempts of a group and their main turns."""
        return await self._read(self._store.group, group)

    async def steps(self, group: str) -> list[tuple[NextState, Judgement | None]]:
        """What followed each main turn of a group, and how it was judged."""
        return await self._read(self._store.steps, group)

    async def comparisons(self) -> list[Comparison]:
        """All, oldest first."""
        return await self._read(self._store.comparisons)

    async def sessions_to_distil(self, before: float, limit: int) -> list[tuple[str, str]]:
        """See JournalReader.sessions_to_distil."""
        return await self._read(self._store.sessions_to_distil, before, limit)

    async def exchanges(self, user: str, session: str) -> list[tuple[Turn, NextState | None, Judgement | None, bool]]:
        """A session's main turns, what followed each, how it was judged, and whether its sample waits for the end."""
        return await self._read(self._store.exchanges, user, session)

    async def held_out(self, limit: int, scope: str = GROUP) -> list[tuple[Sample, int | None]]:
        """The newest held-out samples, of everyone or one user, newest first, and how their turns were judged."""
        return await self._read(self._store.held_out, limit, scope)

    async def judged_turns(self, after: int, limit: int, timeout_s: float) -> list[tuple[int, Turn, Judgement]]:
        """People's judged turns with the judgement's seq (> after); [] after `timeout_s`."""
        return await self._poll(Judgement, timeout_s, self._store.judged_turns, after, limit)

    async def recent_judged_turns(self, limit: int) -> list[tuple[int, Turn, Judgement]]:
        """The newest of them, in the same order."""
        return await self._read(self._store.judged_turns, None, limit)

    async def recent_scores(self, user: str, limit: int) -> list[int]:
        """Scores of the user's newest judged turns in the order they were judged; abstentions have none."""
        return await self._read(self._store.recent_scores, user, limit)

    async def take_feedback(self, feedback: Feedback) -> str:
        """Store what a user says of a turn; the id under which it is stored. The same again is ignored."""
        taken: list[tuple[str, bool]] = []
        await self._commit(self._store.taking_feedback(feedback, taken), frozenset({Feedback, NextState}))
        id, judged_again = taken[-1]
        if judged_again:
            await asyncio.to_thread(self._store.recount)
        return id

    async def feedback(self, turn: str) -> list[Feedback]:
        """What was said of a turn, oldest first."""
        return await self._read(self._store.feedback, turn)

    async def unanswered_feedback(self, after: int, before: float, limit: int) -> tuple[int, list[str]]:
        """See JournalReader.unanswered_feedback."""
        return await self._read(self._store.unanswered_feedback, after, before, limit)

    async def consent(self, user: str, train: bool, session: str | None = None) -> dict[str, Any]:
        """Record whether a user, or one session of theirs, is recorded and trained on from now on.

        An opt-out also keeps what was recorded before from ever being trained on; `clawrl forget` erases it.
        """
        if not isinstance(user, str) or not user or not isinstance(train, bool):
            raise JournalError(f"consent needs user (text) and train (true or false), not {user!r} and {train!r}")
        if not isinstance(session, str | None):
            raise JournalError(f"session={session!r} is not text; leave it out to speak of the whole user")
        word = Consent(user, session, train, time.time())
        await self._commit(self._store.taking_word(word), frozenset({Consent}))
        return asdict(word)

    async def consents(self, after: int, limit: int, timeout_s: float) -> list[tuple[int, Consent]]:
        """Words of users and sessions with their seq (> after); [] after `timeout_s`."""
        return await self._poll(Consent, timeout_s, self._store.consents, after, limit)

    async def withdrawals(self, known: int, timeout_s: float) -> int:
        """A number that grows whenever turns are withdrawn, as soon as it is not `known`; `known` after `timeout_s`."""
        news = await self._poll(Consent, timeout_s, self._news, known)
        return news[0] if news else known

    def _news(self, known: int) -> list[int]:
        number = self._store.withdrawals()
        return [] if number == known else [number]

    async def owners(self, session: str) -> list[str]:
        """Users who have a session of this name."""
        return await self._read(self._store.owners, session)

    async def content(self, user: str, session: str | None) -> Content:
        """What an erasure would find."""
        return await self._read(self._store.content, user, session)

    async def erase(self, record: Erasure, others: Sequence[VersionEvent | Pin]) -> None:
        """Delete a user's or session's content; what rejected versions consumed is free again.

        Its bytes are on disk until `scrub`.
        """
        await self._commit(self._store.erasing(record, others), frozenset({Consent, Erasure, Sample, VersionEvent}))
        await asyncio.to_thread(self._store.recount)

    async def scrub(self) -> None:
        """Wipe from disk whatever was deleted, now or before; appends wait while the database is rewritten."""
        self._require_open()
        await asyncio.get_running_loop().run_in_executor(self._writer, self._store.scrub)

    async def versions(self) -> list[WeightVersion]:
        return await self._read(self._store.versions)

    async def version_events(self) -> list[VersionEvent]:
        return await self._read(self._store.version_events)

    async def pins(self) -> list[Pin]:
        return await self._read(self._store.pins)

    async def gate_decisions(self) -> list[GateDecision]:
        return await self._read(self._store.gate_decisions)

    async def authors(self, turns: Sequence[str]) -> list[tuple[str, str, str]]:
        """(id, user, session) of those of the turns that are there."""
        return await self._read(self._store.authors, turns)

    async def swaps(self) -> list[Swap]:
        return await self._read(self._store.swaps)

    async def counts(self) -> dict[str, int]:
        return await self._read(self._store.counts)

    async def close(self) -> None:
        """Let the appends that wait become durable, end the long polls, refuse what comes later."""
        self._closed = True
        if self._expiring is not None:
            self._expiring.cancel()
        for event in self._arrivals.values():
            event.set()
        if self._committing is not None:
            await self._committing
        for threads in (self._writer, self._readers):
            await asyncio.to_thread(threads.shutdown)
        self._store.close()

    async def _commit(self, write: Write, kinds: frozenset[type]) -> None:
        self._require_open()
        started, loop = time.perf_counter(), asyncio.get_running_loop()
        pending = _Pending(write, kinds, loop.create_future())
        self._waiting.append(pending)
        if self._committing is None or self._committing.done():
            self._committing = loop.create_task(self._commit_groups())
        await pending.durable
        metric("journal/append_s").observe(time.perf_counter() - started)

    async def _commit_groups(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            writes = [pending.write for pending in group]
            outcomes = await asyncio.get_running_loop().run_in_executor(self._writer, self._store.commit, writes)
            for pending, error in zip(group, outcomes, strict=True):
                if error is not None:
                    log.error("event=append_refused error=%s", error)
                if not pending.durable.done():  # its caller may have gone
                    pending.durable.set_exception(error) if error else pending.durable.set_result(None)
            for kind in frozenset().union(*(pending.kinds for pending in group)):
                self._arrivals.pop(kind, asyncio.Event()).set()

    async def _expire(self, keep_s: float) -> None:
        """Delete what is too old, again and again, in batches between which appends commit."""
        loop = asyncio.get_running_loop()
        while not self._closed:
            seq: int | None = 0
            try:
                while seq is not None and not self._closed:
                    before = time.time() - keep_s
                    seq = await loop.run_in_executor(self._writer, self._store.expire, before, seq, _EXPIRE_TURNS)
                self._store.recount()
                await loop.run_in_executor(self._writer, self._store.shrink)
            except JournalError as error:
                log.warning("event=expiry_failed error=%s retry_s=%g", error, _EXPIRE_S)
            await asyncio.sleep(_EXPIRE_S)

    async def _poll(
        self, kind: type, timeout_s: float, read: Callable[..., list[_Answer]], *arguments: Any
    ) -> list[_Answer]:
        """Read until there is something, anew after each commit of a `kind`."""
        deadline = time.monotonic() + timeout_s
        while True:
            arrival = self._arrivals[kind]  # taken before the read: a commit in between is not missed
            found = await self._read(read, *arguments)
            left_s = deadline - time.monotonic()
            if found or left_s <= 0:
                return found
            try:
                await asyncio.wait_for(arrival.wait(), left_s)
            except TimeoutError:
                return []
            if self._closed:
                return []

    async def _read(self, read: Callable[..., _Answer], *arguments: Any) -> _Answer:
        self._require_open()
        return await asyncio.get_running_loop().run_in_executor(self._readers, read, *arguments)

    def _require_open(self) -> None:
        if self._closed:
            raise JournalError("the journal is closed; start the run again")
