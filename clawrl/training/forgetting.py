"""What forgetting somebody means for the versions: which learnt from them, where training goes on, what is deleted.

Pure. Knows versions and events. Ignores the content itself (`journal/erasure`), and who deletes checkpoints.

    version   1 ── 2 ── 3* ── 4 ── 5           * learnt from the erased turns; 4 and 5 carry it on
    retrain   1 ── 2 ─────────────── 6 …       3, 4 and 5 are rejected, and their other samples train again

A policy of the user's own goes with all that they said, asked for or not: it is nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from clawrl.errors import ClawrlError
from clawrl.journal.erasure import Content
from clawrl.training.versions import Registry
from clawrl.types import GROUP, Erasure, Pin, VersionEvent, WeightVersion


@dataclass(frozen=True, slots=True)
class Plan:
    """The consequences of one erasure."""

    erasure: Erasure  # to be recorded
    samples: int
    events: tuple[VersionEvent, ...]  # to be recorded with it
    checkpoints: tuple[int, ...]  # to be deleted from disk
    pinned: tuple[int, ...]  # those of them that were to be kept for good
    unknown: int = 0  # expired samples that versions learnt from: whether they were the user's is not known

    def records(self) -> tuple[VersionEvent | Pin, ...]:
        """What the journal takes in the same transaction; a pin holds nothing that is deleted."""
        return (*self.events, *(Pin(number, False, self.erasure.at) for number in self.pinned))

    def told(self, *, done: bool, unwiped: str | None = None) -> dict[str, Any]:
        """The plan for JSON: what was done, or would be; `unwiped` says why deleted bytes are on disk still."""
        rejected = [event.version for event in self.events if event.state == "rejected"]
        return {
            "user": self.erasure.user,
            "session": self.erasure.session,
            "turns": self.erasure.turns,
            "samples": self.samples,
            "versions": list(self.erasure.versions),
            "restored": self.erasure.restored,
            "rejected": rejected,
            "checkpoints": list(self.checkpoints),
            "pinned": list(self.pinned),
            "unknown": self.unknown,
            "unwiped": unwiped,
            "done": done,
        }


def owner(user: Any, session: Any, owners: Collection[str]) -> str:
    """Whose content is meant: the user named, or the only one of the session's `owners`. Raises ClawrlError."""
    for name, value in (("user", user), ("session", session)):
        if not isinstance(value, str | None):
            raise ClawrlError(f"{name}={value!r} is not text")
    if user:
        return user
    if not session:
        raise ClawrlError("neither user nor session was given; name whose content is to be erased")
    if len(owners) != 1:
        known = f"of {len(owners)} users; name one too" if owners else "recorded of nobody; check the name"
        raise ClawrlError(f"session {session!r} is {known}")
    return next(iter(owners))


def plan(
    user: str,
    session: str | None,
    content: Content,
    versions: Iterable[WeightVersion],
    events: Iterable[VersionEvent],
    *,
    retrain: bool,
    on_disk: Collection[int],
    at: float,
) -> Plan:
    """What follows from erasing `content`; `on_disk` has the versions whose checkpoints are there (0 always is)."""
    registry = Registry(versions, events)
    decided: list[VersionEvent] = []
    learnt, own = content.versions, registry.numbers(user) if session is None else []
    doomed = {*own, *(learnt if retrain else ())}
    for number in sorted(doomed):
        decided += registry.reject(number, "learnt from what was erased", at)
    if retrain:
        for scope in registry.scopes() if decided else ():
            while (head := registry.head(scope)) != 0 and head not in on_disk:
                decided += registry.reject(head, "its checkpoint is gone, training goes on from before", at)
    carried = {number for number in on_disk if _carries(registry, number, doomed)}
    restored = registry.head() if any(registry.scope(event.version) == GROUP for event in decided) else None
    erasure = Erasure(user, session, content.turns, learnt, restored, at)
    pinned = sorted(carried & set(content.pinned))
    return Plan(erasure, content.samples, tuple(decided), tuple(sorted(carried)), tuple(pinned), content.unknown)


def _carries(registry: Registry, number: int, learnt: Collection[int]) -> bool:
    """Whether a version or one that it came from learnt from the content."""
    at: int | None = number
    while at is not None and at not in learnt:
        at = registry.parent(at)
    return at is not None
