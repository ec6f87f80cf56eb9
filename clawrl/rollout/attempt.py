"""An attempt at a task: what it is called, and the record of its end. What pools and workers tell each other."""

from __future__ import annotations

import time
from dataclasses import dataclass

from clawrl.errors import ClawrlError
from clawrl.types import Episode, EpisodeStatus

CLOSE_S = 2.0
"""A worker that is dismissed may take so long to close its environments."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which task of which environment, and what it is called."""

    source: str
    group: str
    group_size: int
    session: str
    split: str
    number: int  # of the task


@dataclass(frozen=True, slots=True)
class Health:
    """What a worker says of itself."""

    pid: int
    environments: int
    hung: int  # environments that are called and do not come back


def ended(
    attempt: Attempt,
    status: EpisodeStatus,
    reason: str,
    seconds: float,
    *,
    task: str = "",
    outcome: float | None = None,
    rewards: tuple[float, ...] = (),
) -> Episode:
    """The record of an attempt that ends now."""
    return Episode(
        session=attempt.session,
        source=attempt.source,
        group=attempt.group,
        task=_storable(task),
        group_size=attempt.group_size,
        status=status,
        outcome=outcome,
        rewards=rewards,
        reason=_storable(reason),
        seconds=seconds,
        at=time.time(),
    )


def _storable(text: str) -> str:
    """Text as every database takes it: without NUL and halves of surrogate pairs, which programs may print."""
    return str(text).replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def told(error: Exception) -> str:
    """What went wrong, on one line."""
    words = " ".join(str(error).split())[:300]
    return words if isinstance(error, ClawrlError) else f"{type(error).__name__}: {words}"
