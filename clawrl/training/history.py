"""What the registry and the journal say of versions, put together for people. Pure; everything returned is JSON.

Knows records. Ignores tensors, disks and who asks. A user's words never appear, only ids of turns.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from clawrl.training.versions import Registry
from clawrl.types import GateDecision, VersionEvent, WeightVersion


def listing(
    registry: Registry,
    versions: Iterable[WeightVersion],
    events: Iterable[VersionEvent],
    decisions: Iterable[GateDecision],
    *,
    pinned: Collection[int],
    on_disk: Collection[int],
) -> list[dict[str, Any]]:
    """One entry per version, oldest first: where it came from, what became of it, and why."""
    records = {version.number: version for version in versions}
    last_event = {event.version: event for event in events}
    decision = {each.version: _json(asdict(each)) for each in decisions}
    entries = []
    for number, state in sorted(registry.states().items()):
        record, event = records.get(number), last_event.get(number)
        entries.append(
            {
                "number": number,
                "parent": registry.parent(number),
                "scope": registry.scope(number),
                "state": state,
                "at": record.at if record else None,
                "samples": len(record.samples) if record else 0,
                "metrics": _json(record.metrics) if record else {},
                "pinned": number in pinned,
                "on_disk": number in on_disk,
                "reason": event.reason if event else "the model as configured",
                "decision": decision.get(number),
            }
        )
    return entries


def apart(registry: Registry, one: int, other: int) -> list[int]:
    """The versions that lie between two: on the way to one of them but not to the other, oldest first."""
    lines = [set(registry.line(number, number + 1)) for number in (one, other)]
    return sorted(lines[0] ^ lines[1])


def difference(
    entries: Sequence[dict[str, Any]],
    between: Sequence[int],
    versions: Iterable[WeightVersion],
    authors: Iterable[tuple[str, str, str]],
) -> dict[str, Any]:
    """Two entries of `listing` side by side, and the turns that the versions between them learnt from.

    `authors` are (turn, user, session); a turn that is not among them was erased.
    """
    known = {turn: (user, session) for turn, user, session in authors}
    chosen = {version.number: version for version in versions if version.number in between}
    turns = [
        {"turn": turn, "user": user, "session": session, "version": number}
        for number in between
        if number in chosen
        for turn in chosen[number].samples
        for user, session in [known.get(turn, (None, None))]
    ]
    users = Counter(turn["user"] or "(erased)" for turn in turns)
    return {"versions": list(entries), "between": list(between), "users": dict(users.most_common()), "turns": turns}


def _json(value: Any) -> Any:
    """JSON has no word for numbers that are not finite: they become text."""
    if isinstance(value, dict):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
