"""`clawrl doctor`: what this machine gives to sandboxes and environments, and what would help where it does not.

Looks, tries, and changes nothing. Exit code 1 if no isolating sandbox backend works.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clawrl.commands.client import add_json

if TYPE_CHECKING:
    from envs.sandbox.probe import Fact

_COLOURS = {"works": "green", "in part": "yellow", "missing": "red"}


def add(commands: Any) -> None:
    """Register the parser."""
    about = "what this machine can do for sandboxes and environments, and what would help"
    parser = commands.add_parser("doctor", help=about, description=about)
    add_json(parser)
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from envs.sandbox.probe import look  # docker's client loads only when needed

    facts = look()
    if options.json:
        print(json.dumps([asdict(fact) for fact in facts], indent=2))
    else:
        Console().print(_table(facts))
    return 0 if any(fact.state != "missing" for fact in facts if fact.name.startswith("backend")) else 1


def _table(facts: Sequence[Fact]) -> Table:
    table = Table("", "", "", box=None, show_header=False)
    for fact in facts:
        said = fact.said + (f". Remedy: {fact.remedy}" if fact.remedy else "")
        table.add_row(fact.name, f"[{_COLOURS[fact.state]}]{fact.state}[/]", escape(said))
    return table
