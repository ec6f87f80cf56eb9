"""`clawrl journal stats|export|import|check`: a journal looked at, carried elsewhere and proved whole.

Knows the options and how answers are shown. Ignores how it is done (`journal.archive`). Works on the database itself,
beside a clawrl that is running; `import` alone writes, and is refused while another process does.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def add(commands: Any) -> None:
    """Register the family in the subparsers of `clawrl`."""
    family = commands.add_parser("journal", help="figures, export, import and check of a journal")
    verbs = family.add_subparsers(required=True, metavar="VERB")
    stats = _verb(verbs, "stats", _stats, "counts, users, size and age")
    stats.add_argument("--json", action="store_true", help="print JSON")
    export = _verb(verbs, "export", _export, "write all records as Parquet files (columns: docs/journal.md)")
    export.add_argument("folder", type=Path, help="a new folder")
    restore = _verb(verbs, "import", _import, "add the records of an export, also into the other kind of database")
    restore.add_argument("folder", type=Path, help="a folder that `clawrl journal export` wrote")
    _verb(verbs, "check", _check, "look for damage and contradictions; exit code 1 if there are any")


def _verb(verbs: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(name, help=help, description=help)
    which = parser.add_mutually_exclusive_group(required=name == "import")
    which.add_argument(
        "--run", dest="run_directory", type=Path, metavar="DIR", help="run with the journal (default: runs/latest)"
    )
    which.add_argument("--journal", metavar="URL", help="its URL, as in journal.url")
    parser.set_defaults(run=run)
    return parser


def _url(options: argparse.Namespace) -> str:
    return options.journal or f"sqlite:///{(options.run_directory or Path('runs/latest')).resolve() / 'journal.sqlite'}"


def _stats(options: argparse.Namespace) -> int:
    from clawrl.journal import archive  # Parquet and the database load only when needed
    from clawrl.journal.store import JournalReader

    with closing(JournalReader(_url(options))) as journal:
        found = archive.stats(journal)
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name in ("oldest", "newest"):
        if found[name] is not None:
            found[name] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found[name]))
    _show(found)
    return 0


def _export(options: argparse.Namespace) -> int:
    from clawrl.journal import archive
    from clawrl.journal.store import JournalReader

    with closing(JournalReader(_url(options))) as journal:
        _show(archive.export(journal, options.folder))
    return 0


def _import(options: argparse.Namespace) -> int:
    from clawrl.journal import archive
    from clawrl.journal.store import JournalStore

    with closing(JournalStore(_url(options))) as journal:
        _show(archive.restore(journal, options.folder))
    return 0


def _check(options: argparse.Namespace) -> int:
    from clawrl.journal import archive
    from clawrl.journal.store import JournalReader

    with closing(JournalReader(_url(options))) as journal:
        problems = archive.check(journal)
    for problem in problems:
        print(problem)
    print(f"{journal.name}: {len(problems) or 'no'} problem{'s' * (len(problems) != 1)}")
    return 1 if problems else 0


def _show(found: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)
