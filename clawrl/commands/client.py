"""How commands speak to a running clawrl: its status by GET, its acts by POST /admin/<name>; or read a run's journal.

Knows the gateway's routes and the shape of its errors, and where commands may write. Ignores what the acts do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from clawrl.errors import ClawrlError

if TYPE_CHECKING:
    from clawrl.journal.store import JournalReader

GET_S = 10.0
ACT_S = 300.0
"""An act may write a whole checkpoint."""


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where clawrl serves (default: %(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def new_folder(path: Path) -> Path:
    """The whole path of a folder to write. Raises ClawrlError if there is something already."""
    folder = path.expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ClawrlError(f"{folder} is there and not empty; name a new folder")
    return folder


def get(url: str, path: str) -> Any:
    """A JSON answer of a running clawrl. Raises ClawrlError when nobody answers there."""
    try:
        response = httpx.get(url + path, timeout=GET_S)
        response.raise_for_status()
        return response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise nobody(url, error) from error


def post(url: str, name: str, **arguments: Any) -> Any:
    """What the act `name` of a running clawrl answers.

    Raises ClawrlError with the system's own message if it refuses, and when nobody answers there.
    """
    try:
        response = httpx.post(f"{url}/admin/{name}", json=arguments, timeout=ACT_S)
        answer = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise nobody(url, error) from error
    if response.is_success:
        return answer
    try:
        raise ClawrlError(answer["error"]["message"])
    except (KeyError, TypeError):
        raise nobody(url, f"HTTP {response.status_code}") from None


def nobody(url: str, reason: object) -> ClawrlError:
    return ClawrlError(f"no clawrl answers at {url} ({reason}); start one with `clawrl serve`, or give --url")


def add_journal(parser: argparse.ArgumentParser) -> None:
    """--run and --journal, for commands that read a journal without its system."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", dest="folder", type=Path, metavar="DIR", help="run (default: runs/latest)")
    which.add_argument("--journal", metavar="URL", help="its journal's URL, as in journal.url")


@contextmanager
def journal_of(options: argparse.Namespace) -> Iterator[JournalReader]:
    """The journal that `add_journal`'s options name."""
    from clawrl.journal.store import JournalReader  # the database loads only when needed

    url = options.journal or f"sqlite:///{(options.folder or Path('runs/latest')).resolve() / 'journal.sqlite'}"
    with closing(JournalReader(url)) as journal:
        yield journal
