"""A request to the shop: its form, checked field by field, and the two ways a page may end otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


class Refused(Exception):
    """A form that cannot be taken as it is; the text is the page's."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: its form (the query's, where it is a GET) and the numbers in its path."""

    form: Mapping[str, str]
    id: int
    cookie: str

    def number(self, name: str, least: int, most: int) -> int:
        """A whole number of the form. Raises Refused for anything else."""
        given = self.form.get(name, "").strip()
        if not re.fullmatch(r"\d{1,9}", given) or not least <= int(given) <= most:
            raise Refused(f"{name.capitalize()} must be a number from {least} to {most}.")
        return int(given)

    def one_of(self, name: str, known: Sequence[str]) -> str:
        given = self.form.get(name, "")
        if given not in known:
            raise Refused(f"{name.capitalize()} must be one of {', '.join(known)}.")
        return given

    def words(self, name: str) -> str:
        given = self.form.get(name, "").strip().replace("\r\n", "\n")
        if not given:
            raise Refused(f"{name.capitalize()} must not be empty.")
        return given


class Goto(Exception):
    """See another page."""

    def __init__(self, where: str, cookie: str = "") -> None:
        super().__init__(where)
        self.where, self.cookie = where, cookie
