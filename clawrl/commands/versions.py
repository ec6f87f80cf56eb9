"""`clawrl versions | rollback | pin | diff | export`: the versions of a running clawrl, as a person handles them.

Knows the weight store's acts and how to show their answers. Ignores how they are carried out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from clawrl.commands.client import add_json, add_url, post

SHOWN_TURNS = 20
_COLOURS = {"serving": "green", "candidate": "yellow", "rejected": "red"}


def add(commands: Any) -> None:
    """Register this family's parsers."""
    versions = _command(commands, "versions", _versions, "the numbered sets of weights, and what became of each")
    versions.add_argument("--last", type=int, default=20, metavar="COUNT", help="the newest so many (default: 20)")
    add_json(versions)
    rollback = _command(
        commands,
        "rollback",
        _rollback,
        "serve and train on from an earlier version; all newer ones, and what came from them, are rejected",
    )
    rollback.add_argument("number", type=int, nargs="?", help="the version (default: the serving one's parent)")
    rollback.add_argument("--user", help="whose own policy goes back (default: the one that the version is of)")
    rollback.add_argument("--reason", help="why, kept in the journal")
    pin = _command(commands, "pin", _pin, "keep a version's checkpoint for good")
    pin.add_argument("number", type=int)
    pin.add_argument("--remove", action="store_true", help="keep it no longer than others")
    diff = _command(commands, "diff", _diff, "two versions side by side, and the turns that made the difference")
    diff.add_argument("one", type=int)
    diff.add_argument("other", type=int)
    add_json(diff)
    export = _command(commands, "export", _export, "write a version as a plain Hugging Face folder")
    export.add_argument("number", type=int)
    export.add_argument("folder", help="made if need be, never overwritten; on the machine that serves")


def _command(commands: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about)
    add_url(parser)
    parser.set_defaults(run=run)
    return parser


def _versions(options: argparse.Namespace) -> int:
    entries = post(options.url, "versions", last=max(1, options.last))
    if options.json:
        print(json.dumps(entries, indent=2))
        return 0
    whose = [(entry["scope"] or "everyone",) for entry in entries]
    if {("everyone",)}.issuperset(whose):  # so it goes without saying
        whose = [()] * len(entries)
    own = ("whose",) if any(whose) else ()
    table = Table("version", *own, "from", "state", "made", "samples", "loss", "kl", "on disk", "why", box=None)
    for entry, user in zip(entries, whose, strict=True):
        state, decision = entry["state"], entry["decision"]
        table.add_row(
            str(entry["number"]),
            *map(escape, user),
            _shown(entry["parent"]),
            f"[{_COLOURS.get(state, 'dim')}]{state}[/]",
            _when(entry["at"]),
            str(entry["samples"]),
            _shown(entry["metrics"].get("loss")),
            _shown(entry["metrics"].get("kl")),
            "pinned" if entry["pinned"] else "yes" if entry["on_disk"] else "",
            escape(entry["reason"] if decision is None else f"{entry['reason']}; {_decided(decision)}"),
        )
    Console().print(table)
    return 0


def _decided(decision: dict[str, Any]) -> str:
    """The latest decision on a version, and who took it."""
    return f"{'gate' if decision['stage'] == 'before' else 'watch'}: {decision['reason']}"


def _rollback(options: argparse.Namespace) -> int:
    answer = post(options.url, "rollback", number=options.number, reason=options.reason, user=options.user)
    rejected = " ".join(map(str, answer["rejected"])) or "none"
    print(f"version {answer['serving']} serves; rejected: {rejected}; the next version will be {answer['next']}")
    return 0


def _pin(options: argparse.Namespace) -> int:
    answer = post(options.url, "pin", number=options.number, pinned=not options.remove)
    print(f"version {answer['number']} is {'pinned' if answer['pinned'] else 'no longer pinned'}")
    return 0


def _export(options: argparse.Namespace) -> int:
    folder = Path(options.folder).expanduser().resolve()
    answer = post(options.url, "export", number=options.number, folder=str(folder))
    print(f"version {answer['number']} is in {answer['folder']}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    answer = post(options.url, "diff", one=options.one, other=options.other)
    if options.json:
        print(json.dumps(answer, indent=2))
        return 0
    console = Console()
    one, other = answer["versions"]
    table = Table("", f"version {one['number']}", f"version {other['number']}", box=None)
    for key in ("state", "parent", "samples", "reason"):
        table.add_row(key, _shown(one[key]), _shown(other[key]))
    for key in sorted(one["metrics"].keys() | other["metrics"].keys()):
        table.add_row(key, _shown(one["metrics"].get(key)), _shown(other["metrics"].get(key)))
    console.print(table)
    between = " ".join(map(str, answer["between"])) or "none"
    users = ", ".join(f"{user} {count}" for user, count in answer["users"].items()) or "none"
    console.print(f"\nversions between: {between}\nturns by user: {users}", markup=False, highlight=False)
    turns = Table("version", "turn", "user", "session", box=None)
    for turn in answer["turns"][:SHOWN_TURNS]:
        turns.add_row(*(_shown(turn[key]) for key in ("version", "turn", "user", "session")))
    if turns.row_count:
        console.print(turns)
    if (more := len(answer["turns"]) - SHOWN_TURNS) > 0:
        console.print(f"… and {more} more turns; --json lists them all")
    return 0


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _when(at: float | None) -> str:
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
