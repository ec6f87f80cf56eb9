"""`clawrl keys add | list | revoke`: who may speak to the server.

Knows the keys' file and how it is shown. Works on the file itself: a running clawrl follows it at once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clawrl.serving.keys import FILE, add_key, read_keys, revoke_key


def add(commands: Any) -> None:
    """Register the family in the subparsers of `clawrl`."""
    family = commands.add_parser("keys", help="API keys: whose a request is")
    verbs = family.add_subparsers(required=True, metavar="VERB")
    make = _verb(verbs, "add", _add, "make a key for a user and print it, this once")
    make.add_argument("user", help="whose words come with it")
    _verb(verbs, "list", _list, "all keys, by id and user")
    revoke = _verb(verbs, "revoke", _revoke, "refuse a key from now on")
    revoke.add_argument("id", help="as `clawrl keys list` shows it")


def _verb(verbs: Any, name: str, run: Any, about: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=about, description=about)
    parser.add_argument(
        "--run-root", type=Path, default=Path("runs"), metavar="DIR", help="the server's run_root (default: runs)"
    )
    parser.set_defaults(run=run)
    return parser


def _add(options: argparse.Namespace) -> int:
    made, secret = add_key(options.run_root / FILE, options.user)
    Console(stderr=True, highlight=False).print(f"key {made.id} of {made.user}; it is kept nowhere, note it now")
    print(secret)
    return 0


def _list(options: argparse.Namespace) -> int:
    table = Table("id", "user", "made", "revoked", box=None)
    for key in read_keys(options.run_root / FILE):
        table.add_row(key.id, key.user, _when(key.made), "" if key.revoked is None else _when(key.revoked))
    Console().print(table)
    return 0


def _revoke(options: argparse.Namespace) -> int:
    revoked = revoke_key(options.run_root / FILE, options.id)
    print(f"key {revoked.id} of {revoked.user} is refused from now on")
    return 0


def _when(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
