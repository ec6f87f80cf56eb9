"""What the journal holds after the faults, held against what clients were told.

Reads the database directly, beside the program, as its owner could.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import create_engine, select

from clawrl.journal.tables import CONSUMPTIONS, EVENTS, SAMPLES, TURNS, VERSIONS


@dataclass(frozen=True, slots=True)
class Audit:
    """Counts over the whole life of one journal."""

    turns: int
    acknowledged_lost: int
    trained_twice: int  # samples that two versions learnt from
    consumed_by_none: int  # consumptions that name no recorded version, or samples of a version not consumed
    samples_waiting: int
    versions: int
    rejected: int


def audit(url: str, acknowledged: Sequence[str]) -> Audit:
    """Compare the journal at `url` with the response ids that clients saw acknowledged."""
    engine = create_engine(url)
    with engine.connect() as connection:
        turns = set(connection.scalars(select(TURNS.c.id)))
        samples = set(connection.scalars(select(SAMPLES.c.id)))
        learnt = {
            number: json.loads(ids) for number, ids in connection.execute(select(VERSIONS.c.number, VERSIONS.c.samples))
        }
        consumed = {row.sample: row.version for row in connection.execute(select(CONSUMPTIONS))}
        rejected = set(connection.scalars(select(EVENTS.c.version).where(EVENTS.c.state == "rejected")))
    engine.dispose()
    uses = Counter(sample for ids in learnt.values() for sample in ids)
    made = {sample: number for number, ids in learnt.items() for sample in ids}
    return Audit(
        turns=len(turns),
        acknowledged_lost=len(set(acknowledged) - turns),
        trained_twice=sum(count > 1 for count in uses.values()),
        consumed_by_none=len(set(made.items()) ^ set(consumed.items())),
        samples_waiting=len(samples - set(consumed)),
        versions=len(learnt),
        rejected=len(rejected),
    )
