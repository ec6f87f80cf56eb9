"""The version registry: which state each version is in, which one to serve and which one to train from. Pure.

Knows versions and events. Ignores tensors, replicas and the journal that keeps the events. The latest event of a
version holds; version 0, the model as configured, serves from the start.

    candidate ──► serving ──► retired          retired ──► serving   (its successors were rejected)
        │  └────────┼──────────► ▲ (overtaken)
        └───────────┴──► rejected                     the end: a rejected version never serves again
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from clawrl.errors import WeightSyncError
from clawrl.types import Canary, Swap, VersionEvent, VersionState, WeightVersion

_SUCCESSORS: dict[VersionState, tuple[VersionState, ...]] = {
    "candidate": ("serving", "retired", "rejected"),
    "serving": ("retired", "rejected"),
    "retired": ("serving", "rejected"),
    "rejected": (),
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a canary says of a version; None: it cannot tell."""

    accepted: bool | None
    reason: str


LINE = 1024
"""So many of a version's ancestors are looked at; a sample of an older version counts as this old."""


class Registry:
    """States of all versions, kept consistent; every change comes back as events to be recorded.

    Who must record events before they hold changes a `copy` and applies the events to the original.
    """

    def __init__(self, versions: Iterable[WeightVersion] = (), events: Iterable[VersionEvent] = ()) -> None:
        self.read(versions, events)

    def read(self, versions: Iterable[WeightVersion], events: Iterable[VersionEvent]) -> None:
        """Know what was recorded, and nothing else."""
        self._parents: dict[int, int] = {}
        self._states: dict[int, VersionState] = {0: "serving"}
        for version in sorted(versions, key=lambda version: version.number):
            self._parents[version.number] = version.parent or 0
            self._states[version.number] = "candidate"
        self.apply(events)

    def apply(self, events: Iterable[VersionEvent]) -> None:
        """Take in what was recorded. Raises WeightSyncError for an event of an unknown version."""
        for event in events:
            if event.version not in self._states:
                raise WeightSyncError(f"event {event.state} of version {event.version}, which was never recorded")
            self._states[event.version] = event.state

    def copy(self) -> Registry:
        other = Registry()
        other._parents, other._states = dict(self._parents), dict(self._states)
        return other

    def __contains__(self, number: int) -> bool:
        return number in self._states

    def state(self, number: int) -> VersionState:
        """Raises WeightSyncError for a version that was never recorded."""
        if number not in self._states:
            raise WeightSyncError(f"version {number} does not exist; the newest is {max(self._states)}")
        return self._states[number]

    def parent(self, number: int) -> int | None:
        return self._parents.get(number)

    @property
    def next_number(self) -> int:
        """Numbers are never used twice, not even those of rejected versions."""
        return max(self._states) + 1

    @property
    def head(self) -> int:
        """The version that training goes on from: the newest that was not rejected."""
        return max(number for number, state in self._states.items() if state != "rejected")

    @property
    def desired(self) -> int:
        """The version replicas should serve: the newest candidate or serving one."""
        return max(number for number, state in self._states.items() if state in ("candidate", "serving"))

    @property
    def serving(self) -> int | None:
        """The newest version that has proved itself."""
        return max((number for number, state in self._states.items() if state == "serving"), default=None)

    def states(self) -> dict[int, VersionState]:
        return dict(self._states)

    def line(self, number: int, count: int = LINE) -> tuple[int, ...]:
        """A version and those it came from, newest first, at most `count`."""
        found: list[int] = []
        at: int | None = number
        while at is not None and len(found) < count:
            found.append(at)
            at = self._parents.get(at)
        return tuple(found)

    def newest(self, count: int) -> list[int]:
        """The newest versions that were not rejected."""
        return sorted((number for number, state in self._states.items() if state != "rejected"), reverse=True)[:count]

    def candidate(self, number: int, parent: int | None, at: float) -> VersionEvent:
        """The event with which `number` may enter; `add` takes it once it is recorded.

        Raises WeightSyncError if the number is taken or the parent cannot have children.
        """
        if number != self.next_number:
            raise WeightSyncError(f"version {number} cannot be next, {self.next_number} is; ask for the head again")
        if parent is None or self.state(parent) == "rejected":
            raise WeightSyncError(f"version {number} comes from {parent}, which is rejected; go on from {self.head}")
        return VersionEvent(number, "candidate", f"trained from {parent}", at)

    def add(self, event: VersionEvent, parent: int | None) -> None:
        """Take in a version by the event of `candidate`."""
        self._parents[event.version], self._states[event.version] = parent or 0, event.state

    def accept(self, number: int, reason: str, at: float) -> list[VersionEvent]:
        """The version serves; those it overtook retire. Nothing happens if it serves already."""
        if self.state(number) == "serving":
            return []
        events = [self._enter(number, "serving", reason, at)]
        for older in sorted(self._states):
            if older < number and self._states[older] in ("candidate", "serving"):
                events.append(self._enter(older, "retired", f"overtaken by {number}", at))
        return events

    def reject(self, number: int, reason: str, at: float) -> list[VersionEvent]:
        """Reject a version and all that was trained from it; if nothing is left to serve, its parent returns."""
        if self.state(number) == "rejected":
            return []
        if number == 0:
            raise WeightSyncError(
                "version 0 is the model as configured and cannot be rejected; configure another model"
            )
        events = [self._enter(number, "rejected", reason, at)]
        for later in sorted(self._states):
            if later > number and self._descends(later, number) and self._states[later] != "rejected":
                events.append(self._enter(later, "rejected", f"trained from rejected {number}", at))
        if not any(state in ("candidate", "serving") for state in self._states.values()):
            events.append(self._enter(self.head, "serving", f"restored, {number} was rejected", at))
        return events

    def rollback(self, number: int | None, reason: str | None, at: float) -> list[VersionEvent]:
        """Serve and train from `number` again (None: the parent of the serving version): all newer ones are rejected.

        Raises WeightSyncError if there is no such version, or it never proved itself, or it was rejected.
        """
        if number is None:
            number = self.parent(self.desired if self.serving is None else self.serving)
            if number is None:
                raise WeightSyncError("version 0, the model as configured, serves; there is none before it")
        state = self.state(number)
        if state in ("candidate", "rejected"):
            proven = [each for each, now in self._states.items() if now in ("serving", "retired")]
            why = "has not served yet" if state == "candidate" else "was rejected"
            raise WeightSyncError(
                f"version {number} {why}; choose one that has served, the newest of them is {max(proven, default=0)}"
            )
        reason = reason or f"rolled back to {number} by user"
        newer = sorted(each for each, now in self._states.items() if each > number and now != "rejected")
        events = [self._enter(each, "rejected", reason, at) for each in newer]
        if state != "serving":
            events.append(self._enter(number, "serving", reason, at))
        return events

    def _descends(self, number: int, ancestor: int) -> bool:
        at: int | None = number
        while at is not None and at > ancestor:
            at = self._parents.get(at)
        return at == ancestor

    def _enter(self, number: int, state: VersionState, reason: str, at: float) -> VersionEvent:
        now = self.state(number)
        if state not in _SUCCESSORS[now]:
            allowed = ", ".join(_SUCCESSORS[now]) or "nothing"
            raise WeightSyncError(f"version {number} is {now} and cannot become {state}, only {allowed}")
        self._states[number] = state
        return VersionEvent(number, state, reason, at)


def lag(line: Sequence[int], version: int) -> int:
    """How many steps the head is ahead of a sample of `version`: the versions of its line (newest first) above it.

    Without rejected versions that is the difference of the numbers. Numbers are never reused, so after a rollback the
    difference would say that what the restored version samples is as old as all the rejected ones together.
    """
    return bisect_left(line, -version, key=lambda number: -number)


def canary_verdict(swap: Swap, *, tolerance: float, expected_move: float | None) -> Verdict:
    """Whether the engine that reports `swap` really runs the version's weights.

    Its canary log-probabilities must equal the trainer's within `tolerance`, and must have moved since before the
    swap if the trainer's own moved (`expected_move`, see `canary_distance`; None if unknown). All in nats.
    """
    if swap.canary_error is None:
        return Verdict(None, "the replica measured no canary")
    if not swap.canary_error <= tolerance:  # NaN is no proof either
        return Verdict(False, f"canary error {swap.canary_error:.3g} exceeds {tolerance:g}: other weights are served")
    if swap.canary_moved == 0 and expected_move is not None and expected_move > 0:
        return Verdict(False, f"canary did not move, {expected_move:.3g} was expected: the old weights are served")
    return Verdict(True, f"canary error {swap.canary_error:.3g}")


def canary_distance(one: Canary, other: Canary) -> float | None:
    """Largest |difference| of log-probabilities, in nats; None if the two score different tokens."""
    pairs = list(zip(one.token_ids, other.token_ids, strict=False))
    if len(one.token_ids) != len(other.token_ids) or not all(np.array_equal(a, b) for a, b in pairs):
        return None
    return max(
        (float(np.abs(a - b).max()) for a, b in zip(one.logprobs, other.logprobs, strict=True) if len(a)), default=None
    )
