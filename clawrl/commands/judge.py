"""`clawrl judge`: the judge's votes against what people said of the same turns with their thumbs.

Knows the journal's labelled turns and how the figures are shown. Shows no word of what was said. A turn of which
somebody also said something in words is left out: the judge has read those.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from clawrl.algorithms.calibration import Calibration, Verdict, calibrate
from clawrl.commands.client import add_journal, add_json, journal_of
from clawrl.errors import ClawrlError
from clawrl.types import Feedback, Judgement

FEW = 20
"""Labels of either kind, below which a figure says little."""


def add(commands: Any) -> None:
    """Register the command."""
    about = "how right the judge is, by explicit feedback: accuracy, coverage, calibration"
    parser = commands.add_parser("judge", help=about, description=about)
    add_journal(parser)
    add_json(parser)
    parser.set_defaults(run=_judge)


def _judge(options: argparse.Namespace) -> int:
    with journal_of(options) as journal:
        found = calibrate(verdicts(journal.labelled()))
    if found.approved + found.refused == 0:
        raise ClawrlError(
            "no judged turn has a thumb up or down and nothing else; people give them by POST /v1/feedback (score)"
        )
    if options.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        Console().print(_table(found))
    return 0


def verdicts(labelled: Sequence[tuple[Judgement, Feedback]]) -> list[Verdict]:
    """Of each turn with thumbs only, against the latest of them; feedback comes oldest first.

    The votes count, not the score: above that stands the feedback itself.
    """
    spoken = {feedback.turn for _, feedback in labelled if feedback.text}
    latest = {feedback.turn: (judgement, feedback.score) for judgement, feedback in labelled if feedback.score}
    return [
        Verdict(*_verdict(judgement.votes), label)
        for turn, (judgement, label) in latest.items()
        if turn not in spoken and label and judgement.votes
    ]


def _verdict(votes: Sequence[int | None]) -> tuple[int | None, float]:
    """(score, share of the votes that it has), as the collector reads them: a tie is neutral."""
    from clawrl.serving.judging import plurality

    score = plurality(votes)
    return score, sum(vote == score for vote in votes) / len(votes)


def _table(found: Calibration) -> Table:
    table = Table(box=None, show_header=False)
    add_figures(
        table,
        ("labels", found.approved, found.refused),
        ("coverage", found.coverage, "of them the judge takes a side"),
        ("accuracy", found.accuracy, "of those it takes the people's side"),
        ("calibration error", found.ece, "mean gap between its share of votes and its accuracy"),
    )
    return table


def add_figures(table: Table, labels: tuple[str, int, int], *figures: tuple[str, float | None, str]) -> None:
    """Rows on labels (what they are, thumbs up, down) and on what was measured by them (name, value, meaning)."""
    name, approved, refused = labels
    few = "  (few: say so where you report it)" if min(approved, refused) < FEW else ""
    table.add_row(name, f"{approved} thumbs up, {refused} down{few}")
    for name, value, meaning in figures:
        table.add_row(name, "none" if value is None else f"{value:.3f}", f"[dim]{meaning}[/dim]")
