"""What a client remembers of its user: hints that the judge accepted, kept as notes and sent along in later sessions.

    journal (judgements) ──► newest notes of each user ──► system prompt of the next session

The baseline to learning, as memories of agents work: no weight changes. It reads the run's own journal, where an agent
of its own would ask a model for notes. Notes stand in a system prompt, which the built-in model was hardly trained on
and follows all the same (0.93 to 0.98 of first replies with the right note, 0.13 to 0.22 without).
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from envs.chat.conversation import Opening

KEPT = 3
HEADER = "Notes about this user:"
_AT_A_TIME = 256


def noteworthy(hint: str) -> bool:
    """Whether a hint is about the person: one that names a number is about the problem at hand."""
    return re.search(r"\d", hint) is None


def with_note(notes: Sequence[str], note: str) -> tuple[str, ...]:
    """The notes with a newer one: the newest KEPT, each once, oldest first."""
    return (*(each for each in notes if each != note), note)[-KEPT:]


def opening(notes: Sequence[str]) -> Opening:
    """Messages with the notes in a system prompt before them; as they are where there is none."""
    if not notes:
        return list
    text = "\n".join([HEADER, *(f"- {note}" for note in notes)])
    return lambda messages: [{"role": "system", "content": text}, *messages]


class Notebook:
    """The notes of all users, read from the journal as it grows."""

    def __init__(self, journal: Any) -> None:
        self._journal = journal
        self._notes: dict[str, tuple[str, ...]] = {}
        self._read_to = 0
        self._reading = asyncio.Lock()

    async def notes(self, user: str) -> tuple[str, ...]:
        """The user's, as of all judgements there are."""
        async with self._reading:
            while found := await self._journal.judged_turns.remote(self._read_to, _AT_A_TIME, 0.0):
                for seq, turn, judgement in found:
                    self._read_to = seq
                    for hint in filter(noteworthy, judgement.hints):
                        self._notes[turn.user] = with_note(self._notes.get(turn.user, ()), hint)
        return self._notes.get(user, ())


class NoNotes:
    """A client that remembers nothing."""

    async def notes(self, user: str) -> tuple[str, ...]:
        return ()


NO_NOTES = NoNotes()
