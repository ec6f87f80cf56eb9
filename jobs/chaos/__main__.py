"""`python -m jobs.chaos`: under load, one fault after the other, and what each cost.

    load on ─► whole? ─► strike ─► chat back, loop back ─► next fault … ─► load off ─► audit of the journal

A fault is over when a request begun after it was acknowledged (chat back), a batch of turns was judged after it, and a
weight version made after it is served (loop back): gateway, policy, journal, collector, judge, buffer, trainer and
weight store have then all done their part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clawrl.errors import ClawrlError, JournalError
from clawrl.journal.database import parse_url
from jobs.chaos.audit import Audit, audit
from jobs.chaos.faults import FAULTS, Fault
from jobs.chaos.load import Load
from jobs.chaos.postgres import Postgres, Schemas, private_server
from jobs.chaos.target import Target, prepared

USERS = 16
BACK_S = 240.0
IN_THE_PIPE = 40
"""Turns that may have been judged, or be with the judge, when a fault strikes: only what comes after them counts."""
console = Console(highlight=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One fault. Requests in flight when it struck are told apart from those begun after it."""

    fault: str
    chat_back_s: float | None  # None: not within BACK_S
    loop_back_s: float | None
    acknowledged: int
    failed_in_flight: int
    failed_later: int  # begun after the fault
    survivor: bool  # something of the killed kind was alive, so none of these may have failed
    version_before: int
    version_after: int | None
    parts: tuple[str, ...] = ()  # of the system, that the fault took
    errors: list[str] = field(default_factory=list)

    @classmethod
    def not_done(cls, fault: Fault, error: Exception) -> Outcome:
        told = f"{type(error).__name__}: {error}"
        return cls(fault.name, None, None, 0, 0, 0, fault.survivor, 0, None, errors=[told])

    @property
    def held(self) -> bool:
        back = self.chat_back_s is not None and self.loop_back_s is not None
        return back and not (self.survivor and self.failed_later)


async def strike(fault: Fault, target: Target, load: Load) -> Outcome:
    """Do it to a whole system and wait until it is whole again."""
    before = await _whole(target, beyond=-1)
    if before is None:
        raise RuntimeError(f"the system is not whole before {fault.name!r}: no weight version is served")
    first = len(load.requests)
    done = await asyncio.to_thread(fault.strike, target)
    struck = done.at
    then = await _answering(target)
    after = None if then is None else await _whole(target, beyond=then["versions"]["head"], judged=_judged(then))
    loop_back = time.time() if after is not None else None
    await _acknowledged(load, first, struck)
    seen = load.requests[first:]
    back = [request.ended for request in seen if request.error is None and request.started > struck]
    failed = [request for request in seen if request.error is not None]
    return Outcome(
        fault=fault.name,
        chat_back_s=round(min(back) - struck, 1) if back else None,
        loop_back_s=round(loop_back - struck, 1) if loop_back else None,
        acknowledged=sum(request.error is None for request in seen),
        failed_in_flight=sum(request.started <= struck for request in failed),
        failed_later=sum(request.started > struck for request in failed),
        survivor=fault.survivor,
        version_before=before,
        version_after=after,
        parts=done.parts,
        errors=sorted({str(request.error)[:160] for request in failed}),
    )


async def _whole(target: Target, beyond: int, judged: int | None = None) -> int | None:
    """The version served, once it is newer than `beyond` and turns were judged beyond `judged`; None: too late.

    A version alone could be made of samples that had waited; an abstention is no judgement.
    """
    deadline = time.monotonic() + BACK_S
    while time.monotonic() < deadline:
        status = await asyncio.to_thread(target.status)
        if (
            status is not None
            and status["policy"]["version"] > beyond
            and (judged is None or _judged(status) >= judged + IN_THE_PIPE)
        ):
            return status["policy"]["version"]
        await asyncio.sleep(0.3)
    return None


async def _answering(target: Target) -> dict[str, Any] | None:
    """The first status after the fault."""
    deadline = time.monotonic() + BACK_S
    while time.monotonic() < deadline:
        status = await asyncio.to_thread(target.status)
        if status is not None:
            return status
        await asyncio.sleep(0.2)
    return None


def _judged(status: dict[str, Any]) -> int:
    return status["journal"]["judgements"] - status["journal"]["abstentions"]


async def _acknowledged(load: Load, first: int, since: float) -> None:
    """Return when a request begun after the fault was acknowledged, or too late."""
    deadline = time.monotonic() + BACK_S
    while time.monotonic() < deadline:
        if any(request.error is None and request.started > since for request in load.requests[first:]):
            return
        await asyncio.sleep(0.1)


async def run(
    faults: Sequence[Fault], folder: Path, database: Postgres | Schemas | None
) -> tuple[list[Outcome], dict[str, Audit]]:
    """The faults, those of one setting on one system; each system is audited at its end."""
    outcomes: list[Outcome] = []
    audits: dict[str, Audit] = {}
    for setting in dict.fromkeys(fault.setting for fault in faults):
        group = [fault for fault in faults if fault.setting == setting]
        with prepared(setting, folder, database) as system:
            found, audits[setting.name] = await _on_one_system(group, system)
        outcomes += found
    return outcomes, audits


async def _on_one_system(group: Sequence[Fault], target: Target) -> tuple[list[Outcome], Audit]:
    outcomes = []
    console.print(f"chaos: starting a system in {target.run_root}")
    await asyncio.to_thread(target.start)
    try:
        async with Load(f"{target.url}/v1", USERS) as load:
            await _whole(target, beyond=0)
            for fault in group:
                console.print(f"chaos: {fault.name} …")
                try:
                    outcomes.append(await strike(fault, target, load))
                except Exception as error:  # one that could not be done is told, the others go on
                    outcomes.append(Outcome.not_done(fault, error))
                console.print(f"chaos: {_told(outcomes[-1])}")
        checked = await asyncio.to_thread(audit, target.journal, load.acknowledged)
    finally:
        await asyncio.to_thread(target.stop)
    return outcomes, checked


def _told(outcome: Outcome) -> str:
    word = "held" if outcome.held else "NOT HELD"
    return (
        f"{outcome.fault}: {word}; chat back {outcome.chat_back_s} s, loop back {outcome.loop_back_s} s, "
        f"{outcome.failed_in_flight} failed in flight, {outcome.failed_later} later {outcome.errors or ''}"
    )


COLUMNS = (
    "fault",
    "chat back s",
    "whole loop back s",
    "acknowledged",
    "failed in flight",
    "failed later",
    "version",
    "",
)


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """The table's cells; failures that nothing of the killed kind could have prevented stand in brackets."""
    return [
        [
            one.fault,
            *map(str, (one.chat_back_s, one.loop_back_s, one.acknowledged, one.failed_in_flight)),
            str(one.failed_later) if one.survivor else f"({one.failed_later})",
            f"{one.version_before} → {one.version_after}",
            "held" if one.held else "NOT HELD",
        ]
        for one in outcomes
    ]


def audited(audits: dict[str, Audit]) -> list[str]:
    """A line for each system's journal, and one for each contradiction in it."""
    lines = []
    for name, found in audits.items():
        figures = {**asdict(found), "contradictions": len(found.contradictions)}
        lines.append(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in figures.items()))
        lines += [f"{name}: {contradiction}" for contradiction in found.contradictions]
    return lines


def markdown(outcomes: Sequence[Outcome], audits: dict[str, Audit]) -> str:
    """The table for the docs."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows(outcomes)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return table + "\n\n" + "\n".join(f"- audit of {line}" for line in audited(audits)) + "\n"


def show(outcomes: Sequence[Outcome], audits: dict[str, Audit]) -> None:
    table = Table(title="What a fault costs", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for row in rows(outcomes):
        table.add_row(*row)
    wide = Console(highlight=False, width=max(140, console.width))
    wide.print(table)
    for line in audited(audits):
        wide.print(f"audit of {line}")


@contextmanager
def journals(where: str) -> Iterator[Postgres | Schemas | None]:
    """Where the journals go: None for the runs' folders. Raises ClawrlError if that cannot be had."""
    if where == "sqlite":
        yield None
    elif where == "postgresql":
        with private_server() as server:
            yield server
    else:
        url = parse_url(where)
        if url.get_backend_name() != "postgresql":
            raise JournalError(f"--journal {where!r} names a file; say sqlite, and each run has one of its own")
        schemas = Schemas(url)
        try:
            yield schemas
        finally:
            schemas.drop()


def possible(faults: Sequence[Fault], database: Postgres | Schemas | None) -> list[Fault]:
    """Those of the faults that can be done to this database; the others are told."""
    can = {None, "sqlite"} if database is None else {None, "private"} if isinstance(database, Postgres) else {None}
    for fault in faults:
        if fault.database not in can:
            needed = "--journal sqlite" if fault.database == "sqlite" else "--journal postgresql"
            console.print(f"chaos: {fault.name!r} is left out, it needs {needed}")
    return [fault for fault in faults if fault.database in can]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 when something was lost, trained twice, refused while it could be served, or did not heal."""
    parser = argparse.ArgumentParser(prog="python -m jobs.chaos", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(FAULTS), metavar="NAME", help=", ".join(FAULTS))
    parser.add_argument(
        "--journal",
        default="sqlite",
        metavar="URL",
        help="sqlite: a file of each run's own (default); postgresql: a private server, started here; or the URL of a "
        "PostgreSQL database, in which each system has a schema for the time being",
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/chaos"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="and the table beside it (.md)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended
    folder = options.folder / time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    try:
        with journals(options.journal) as database:
            faults = possible([FAULTS[name] for name in options.only or FAULTS], database)
            outcomes, audits = asyncio.run(run(faults, folder.resolve(), database))
    except (ClawrlError, FileNotFoundError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    show(outcomes, audits)
    if options.json:
        found: dict[str, Any] = {
            "users": USERS,
            "journal": options.journal if options.journal in ("sqlite", "postgresql") else "a named database",
            "faults": [asdict(one) for one in outcomes],
            "audits": {name: asdict(one) for name, one in audits.items()},
        }
        options.json.with_suffix(".md").write_text(markdown(outcomes, audits))
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    clean = all(one.clean for one in audits.values())
    return 0 if clean and outcomes and all(one.held for one in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
