"""How commands speak to a running clawrl: its status by GET, its acts by POST /admin/<name>.

Knows the gateway's routes and the shape of its errors. Ignores what the acts do.
"""

from __future__ import annotations

import argparse
from typing import Any

import httpx

from clawrl.errors import ClawrlError

GET_S = 10.0
ACT_S = 300.0
"""An act may write a whole checkpoint."""


def add_url(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="where clawrl serves (default: %(default)s)")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


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
