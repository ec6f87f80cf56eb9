"""What the journal holds after the faults, held against what clients were told.

Reads the database beside the program that writes it, as `clawrl journal check` does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from sqlalchemy import func, select

from clawrl.journal import archive
from clawrl.journal.store import JournalReader
from clawrl.journal.tables import CONSUMPTIONS, EVENTS, SAMPLES, TURNS, VERSIONS


@dataclass(frozen=True, slots=True)
class Audit:
    """Counts over the whole life of one journal."""

    turns: int
    acknowledged_lost: int
    trained_twice: int  # samples that two versions learnt from
    consumed_by_none: int  # samples that a version lists and that are not marked as its own, or the reverse
    contradictions: tuple[str, ...]  # what `clawrl journal check` finds
    samples_waiting: int
    versions: int
    rejected: int

    @property
    def clean(self) -> bool:
        return not (self.acknowledged_lost or self.trained_twice or self.consumed_by_none or self.contradictions)


def audit(url: str, acknowledged: Sequence[str]) -> Audit:
    """Compare the journal at `url` with the response ids that clients saw acknowledged."""
    with closing(JournalReader(url)) as journal:
        contradictions = tuple(archive.check(journal))
        with journal.database.snapshot() as connection:
            turns = set(connection.scalars(select(TURNS.c.id)))
            uses = archive.uses(connection)
            samples, consumed, versions = (
                connection.scalar(select(func.count()).select_from(table)) or 0
                for table in (SAMPLES.table, CONSUMPTIONS, VERSIONS.table)
            )
            rejected = set(connection.scalars(select(EVENTS.c.version).where(EVENTS.c.state == "rejected")))
    return Audit(
        turns=len(turns),
        acknowledged_lost=len(set(acknowledged) - turns),
        trained_twice=len(uses.twice),
        consumed_by_none=len(uses.unmarked) + len(uses.unlearnt),
        contradictions=contradictions,
        samples_waiting=samples - consumed,
        versions=versions,
        rejected=len(rejected),
    )


def newest_ahead(url: str) -> float | None:
    """How many seconds the newest turn ended ahead of this machine's clock; None if there is no turn."""
    with closing(JournalReader(url)) as journal, journal.database.snapshot() as connection:
        ended = connection.scalar(select(TURNS.c.ended).order_by(TURNS.c.seq.desc()).limit(1))
    return None if ended is None else ended - time.time()
