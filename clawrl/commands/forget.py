"""`clawrl forget`: erase what a user or a session said, and, where asked, all learning from it.

Knows a running system's act of that name, and a stopped run's journal and checkpoints. Without --yes it only tells.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from clawrl.commands.client import add_json, add_url, post
from clawrl.errors import ClawrlError, JournalError

console = Console(highlight=False, soft_wrap=True)


def add(commands: Any) -> None:
    """Register the command."""
    forget = commands.add_parser(
        "forget",
        help="erase what a user or a session said",
        description="Erase what a user or a session said. Tells what it would do, and does it with --yes.",
    )
    forget.add_argument("--user", metavar="U", help="whose content; with --session only that session's")
    forget.add_argument("--session", metavar="S", help="one session; --user can be left out if only one user has it")
    forget.add_argument(
        "--retrain",
        action="store_true",
        help="also go back to the last version that had not learnt from it, and train on from there without it; "
        "checkpoints that carry it are deleted, pinned ones too",
    )
    forget.add_argument("--yes", action="store_true", help="do it")
    add_url(forget)
    forget.add_argument(
        "--run", dest="folder", metavar="FOLDER", type=Path, help="a stopped run's folder, such as runs/latest"
    )
    forget.add_argument("--journal", metavar="URL", help="a stopped run's journal, where it is not in the run's folder")
    add_json(forget)
    forget.set_defaults(run=_forget)


def _forget(options: argparse.Namespace) -> int:
    whose = {"user": options.user, "session": options.session}
    asked = {"retrain": options.retrain, "yes": options.yes}
    if options.folder is None and options.journal is None:
        told = post(options.url, "forget", **whose, **asked)
    else:
        told = forget_offline(options.folder, options.journal, **whose, **asked)
    if options.json:
        console.out(json.dumps(told, indent=2), highlight=False)
    else:
        _show(told, options.retrain)
    return 0


def forget_offline(
    run: Path | None, journal: str | None, user: str | None, session: str | None, *, retrain: bool, yes: bool
) -> dict[str, Any]:
    """Forget in a run that is stopped: its journal (in its folder, or at `journal`) and its checkpoints.

    Raises ClawrlError if it runs, or it is not clear whose content is meant.
    """
    from clawrl.journal.store import JournalStore  # loads when needed, as in the other commands
    from clawrl.training.forgetting import owner, plan

    url = journal or f"sqlite:///{_journal_file(run)}"
    with closing(JournalStore(url)) as store:
        user = owner(user, session, [] if user or not session else store.owners(session))
        versions = store.versions()
        places = {
            each.number: Path(each.checkpoint) if run is None else run.resolve() / "versions" / str(each.number)
            for each in versions
            if each.checkpoint is not None
        }
        planned = plan(
            user,
            session,
            store.content(user, session),
            versions,
            store.version_events(),
            retrain=retrain,
            on_disk=[number for number, place in places.items() if place.is_dir()],
            at=time.time(),
        )
        if not yes:
            return planned.told(done=False)
        store.erase(planned.erasure, planned.records())
        for number in planned.checkpoints:
            shutil.rmtree(places[number])
        try:
            store.scrub()
        except JournalError as error:
            return planned.told(done=True, unwiped=str(error))
        return planned.told(done=True)


def _journal_file(run: Path | None) -> Path:
    file = (run or Path()).resolve() / "journal.sqlite"
    if not file.is_file():
        raise ClawrlError(f"there is no journal {file}; give a run's folder with --run, or its journal with --journal")
    return file


def _show(told: dict[str, Any], retrain: bool) -> None:
    done = told["done"]
    whose = f"user {told['user']!r}" + (f", session {told['session']!r}" if told["session"] else "")
    console.print(
        f"{'erased' if done else 'would erase'} {told['turns']} turns and {told['samples']} samples of {whose}",
        markup=False,
    )
    console.print(f"versions that learnt from them: {_numbers(told['versions'])}")
    if told["restored"] is not None:
        console.print(
            f"{'rejected' if done else 'would reject'}: {_numbers(told['rejected'])}; training goes on from "
            f"{told['restored']} without them"
        )
    if told["checkpoints"]:
        pinned = f" (pinned: {_numbers(told['pinned'])})" if told["pinned"] else ""
        console.print(f"{'deleted' if done else 'would delete'} checkpoints: {_numbers(told['checkpoints'])}{pinned}")
    if told["versions"] and not retrain:
        console.print("they keep what they learnt; --retrain goes back before them")
    if told.get("unknown"):
        console.print(
            f"{told['unknown']} samples that versions learnt from are older than journal.keep_days: whose they were is "
            "no longer known, so that versions which learnt from this user may be missing here"
        )
    if told.get("unwiped"):
        console.print(f"erased; free pages not overwritten yet: {told['unwiped']}; run again", markup=False)
    if not done:
        console.print("nothing was changed; add --yes to do it")


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
