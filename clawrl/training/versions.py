"""The version registry: which state each version is in, which one to serve and which one to train from. Pure.

Knows versions and events. Ignores tensors, replicas and the journal that keeps the events. The latest event of a
version holds; version 0, the model as configured, serves from the start.

A version is everyone's or one user's (its scope), all under one numbering; a user's first one comes from everyone's.
States follow one another within a scope. A user without a version of their own has everyone's:

    everyone's    0 ── 1 ── 3 ── 6          3 is rejected: so are 6, 4 and 5
    Ann's                   └── 4 ── 5

    candidate ──► serving ──► retired          retired ──► serving   (its successors were rejected)
        │  └────────┼──────────► ▲ (overtaken)
        └───────────┴──► rejected                     the end: a rejected version never serves again
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from clawrl.errors import WeightSyncError
from clawrl.types import GROUP, Canary, Swap, VersionEvent, VersionState, WeightVersion

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

    Scopes are GROUP (the default) or users' names.

    Who must record events before they hold changes a `copy` and applies the events to the original.
    """

    def __init__(self, versions: Iterable[WeightVersion] = (), events: Iterable[VersionEvent] = ()) -> None:
        self.read(versions, events)

    def read(self, versions: Iterable[WeightVersion], events: Iterable[VersionEvent]) -> None:
        """Know what was recorded, and nothing else."""
        self._parents: dict[int, int] = {}
        self._states: dict[int, VersionState] = {0: "serving"}
        self._scopes: dict[int, str] = {0: GROUP}
        self._numbers: dict[str, list[int]] = {GROUP: [0]}  # of each scope, ascending
        for version in sorted(versions, key=lambda version: version.number):
            self._put(version.number, version.parent, version.scope, "candidate")
        self.apply(events)

    def _put(self, number: int, parent: int | None, scope: str, state: VersionState) -> None:
        self._parents[number], self._states[number], self._scopes[number] = parent or 0, state, scope
        self._numbers.setdefault(scope, []).append(number)

    def apply(self, events: Iterable[VersionEvent]) -> None:
        """Take in what was recorded. Raises WeightSyncError for an event of an unknown version."""
        for event in events:
            if event.version not in self._states:
                raise WeightSyncError(f"event {event.state} of version {event.version}, which was never recorded")
            self._states[event.version] = event.state

    def copy(self) -> Registry:
        other = Registry()
        other._parents, other._states, other._scopes = dict(self._parents), dict(self._states), dict(self._scopes)
        other._numbers = {scope: list(numbers) for scope, numbers in self._numbers.items()}
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

    def scope(self, number: int) -> str:
        """Whose policy a version is. Raises WeightSyncError for one that was never recorded."""
        self.state(number)
        return self._scopes[number]

    def scopes(self) -> list[str]:
        """Everyone's, and those of users who have versions, rejected ones too."""
        return list(self._numbers)

    @property
    def next_number(self) -> int:
        """Numbers are never used twice, not even those of rejected versions."""
        return max(self._states) + 1

    def head(self, scope: str = GROUP) -> int:
        """The version that training goes on from: the newest that was not rejected, everyone's if there is none."""
        found = self._newest(scope, "candidate", "serving", "retired")
        return self.head() if found is None else found

    def desired(self, scope: str = GROUP) -> int:
        """The version replicas should serve: the newest candidate or serving one, everyone's if there is none."""
        found = self.own(scope)
        return self.desired() if found is None else found

    def own(self, scope: str) -> int | None:
        """The newest candidate or serving version of a scope itself."""
        return self._newest(scope, "candidate", "serving")

    def serving(self, scope: str = GROUP) -> int | None:
        """The newest version that has proved itself."""
        return self._newest(scope, "serving")

    def _newest(self, scope: str, *states: VersionState) -> int | None:
        return next((each for each in reversed(self._numbers.get(scope, ())) if self._states[each] in states), None)

    def numbers(self, scope: str) -> list[int]:
        """A scope's versions, oldest first."""
        return list(self._numbers.get(scope, ()))

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

    def own_line(self, scope: str) -> tuple[int, ...]:
        """The versions of a scope itself that its head came from, newest first, and the head."""
        return tuple(each for each in self.line(self.head(scope)) if self._scopes[each] == scope)

    def newest(self, count: int) -> list[int]:
        """The newest versions of each scope that were not rejected."""
        left = ([each for each in numbers if self._states[each] != "rejected"] for numbers in self._numbers.values())
        return [number for numbers in left for number in numbers[-count:]]

    def candidate(self, number: int, parent: int | None, at: float, scope: str = GROUP) -> VersionEvent:
        """The event with which `number` may enter; `add` takes it once it is recorded.

        Raises WeightSyncError if the number is taken or the parent cannot have such children.
        """
        if number != self.next_number:
            raise WeightSyncError(f"version {number} cannot be next, {self.next_number} is; ask for the head again")
        if parent is None or self.state(parent) == "rejected":
            raise WeightSyncError(
                f"version {number} comes from {parent}, which is rejected; go on from {self.head(scope)}"
            )
        if self._scopes[parent] not in (GROUP, scope):
            raise WeightSyncError(f"version {number} comes from {parent}, which is another user's")
        return VersionEvent(number, "candidate", f"trained from {parent}", at)

    def add(self, event: VersionEvent, parent: int | None, scope: str = GROUP) -> None:
        """Take in a version by the event of `candidate`."""
        self._put(event.version, parent, scope, event.state)

    def accept(self, number: int, reason: str, at: float) -> list[VersionEvent]:
        """The version serves; those of its scope that it overtook retire. Nothing happens if it serves already."""
        if self.state(number) == "serving":
            return []
        events = [self._enter(number, "serving", reason, at)]
        for older in self._numbers[self._scopes[number]]:
            if older < number and self._states[older] in ("candidate", "serving"):
                events.append(self._enter(older, "retired", f"overtaken by {number}", at))
        return events

    def reject(self, number: int, reason: str, at: float) -> list[VersionEvent]:
        """Reject a version and all that was trained from it; where nothing is left to serve, the newest returns."""
        if self.state(number) == "rejected":
            return []
        if number == 0:
            raise WeightSyncError(
                "version 0 is the model as configured and cannot be rejected; configure another model"
            )
        events = self._reject_lines({number}, reason, f"trained from rejected {number}", at)
        for scope in sorted({self._scopes[event.version] for event in events}):
            left = self._newest(scope, "retired")
            if left is not None and self.own(scope) is None:
                events.append(self._enter(left, "serving", f"restored, {number} was rejected", at))
        return events

    def before(self, scope: str) -> int:
        """The version that a scope's serving one came from. Raises WeightSyncError if there is none."""
        serving = self.serving(scope)
        found = self.parent(self.desired(scope) if serving is None else serving)
        if found is None:
            raise WeightSyncError("version 0, the model as configured, serves; there is none before it")
        return found

    def rollback(
        self, number: int | None, reason: str | None, at: float, scope: str | None = None
    ) -> list[VersionEvent]:
        """Serve and train from `number` again (None: the parent of the serving version): all newer ones are rejected.

        Those of its scope, and what was trained from them. With a user's `scope` and a version of everyone's, all of
        the user's are rejected. Raises WeightSyncError if there is no such version, or it never proved itself, or it
        was rejected, or it is another user's.
        """
        if number is None:
            number = self.before(scope or GROUP)
        state = self.state(number)
        scope = self._scopes[number] if scope is None else scope
        if self._scopes[number] not in (GROUP, scope):
            raise WeightSyncError(f"version {number} is of the user {self._scopes[number]!r}; leave the user out")
        if state in ("candidate", "rejected") and self._scopes[number] == scope:
            proven = [each for each, now in self._states.items() if now in ("serving", "retired")]
            why = "has not served yet" if state == "candidate" else "was rejected"
            raise WeightSyncError(
                f"version {number} {why}; choose one that has served, the newest of them is {max(proven, default=0)}"
            )
        reason = reason or f"rolled back to {number} by user"
        own = self._scopes[number] == scope
        newer = {each for each in self._numbers.get(scope, ()) if each > number or not own}
        events = self._reject_lines(newer, reason, reason, at)
        if own and state != "serving":
            events.append(self._enter(number, "serving", reason, at))
        return events

    def _reject_lines(self, numbers: Set[int], reason: str, others: str, at: float) -> list[VersionEvent]:
        """Reject versions and, for the reason `others`, all that was trained from them, where it is not so already."""
        line = set(numbers)
        for each in sorted(self._parents):  # parents have lower numbers
            if self._parents[each] in line:
                line.add(each)
        return [
            self._enter(each, "rejected", reason if each in numbers else others, at)
            for each in sorted(line)
            if self._states[each] != "rejected"
        ]

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
