"""`clawrl sessions`: how requests were told apart, turn by turn: session, kind, what each goes on with, and why.

Knows the journal's outline of turns and how it is shown. Shows no word of what was said.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clawrl.commands.client import add_journal, add_json, journal_of


def add(commands: Any) -> None:
    """Register the command."""
    about = "the newest turns by session, and why each was classed as it was"
    parser = commands.add_parser("sessions", help=about, description=about)
    parser.add_argument("--user", metavar="U", help="of this user only")
    parser.add_argument("--session", metavar="S", help="of this session only")
    parser.add_argument("--last", type=int, default=50, metavar="COUNT", help="so many turns (default: 50)")
    add_journal(parser)
    add_json(parser)
    parser.set_defaults(run=_sessions)


def _sessions(options: argparse.Namespace) -> int:
    with journal_of(options) as journal:
        turns = journal.outline(max(1, options.last), options.user, options.session)
    if options.json:
        print(json.dumps(turns, indent=2))
    else:
        Console().print(_table(turns))
    return 0


def _table(turns: list[dict[str, Any]]) -> Table:
    """One row per turn, those of a session together, sessions by their newest turn; ids by their last letters."""
    table = Table("session", "user", "at", "turn", "after", "kind", "followed by", "score", "why", box=None)
    newest = {(turn["user"], turn["session"]): turn["started"] for turn in turns}
    for whose in sorted(newest, key=newest.__getitem__):
        shown = (whose[1], whose[0])
        for turn in (each for each in turns if (each["user"], each["session"]) == whose):
            row = (
                *shown,
                time.strftime("%H:%M:%S", time.localtime(turn["started"])),
                turn["id"][-8:],
                (turn["parent"] or "")[-8:],
                turn["kind"] if turn["finish_reason"] != "abort" else f"{turn['kind']}, cut off",
                "end" if turn["done"] else turn["role"] or "",
                "" if turn["score"] is None else f"{turn['score']:+d}",
                turn["reason"],
            )
            table.add_row(*map(escape, row))
            shown = ("", "")
    return table
