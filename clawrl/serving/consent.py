"""Who is served unrecorded, as one gateway replica knows it: the configuration's users and the words in the journal.

Pure. The journal has the last word (it refuses turns of who opted out), so that a replica that learns of an opt-out a
moment late leaks nothing; knowing it here tells the client, and saves the journal the work.
"""

from __future__ import annotations

from collections.abc import Iterable

from clawrl.types import Consent

HEADER = {"x-clawrl-recorded": "no"}
"""Tells a client that neither its request nor the reply is kept."""


class OptOuts:
    """Users and sessions that opted out; a session is recorded if neither it nor its user did."""

    def __init__(self, users: Iterable[str] = ()) -> None:
        self._always = frozenset(users)
        self._out: set[tuple[str, str | None]] = set()
        self._seen: set[str] = set()

    def take(self, word: Consent) -> None:
        """A word of a user or session; the latest of each holds."""
        if word.train:
            self._out.discard((word.user, word.session))
        else:
            self._out.add((word.user, word.session))
            self._seen.add(word.user)

    def cover(self, user: str, session: str | None) -> bool:
        """Whether this is served unrecorded."""
        return user in self._always or bool(self._out & {(user, None), (user, session)})

    def concern(self, user: str) -> bool:
        """Whether some session or conversation of the user may be unrecorded: only then is it worth asking which."""
        return user in self._always or user in self._seen
