"""Who takes part in a demonstration, and what they bring: personas, problems, and who plays them.

Knows `[chat]` of the config. Ignores the system they talk to.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import openai

from clawrl.config import ChatSection
from clawrl.errors import ConfigError
from envs.chat.file_problems import read_problems
from envs.chat.model_user import ModelUser
from envs.chat.user import PERSONAS, Person, Persona, SimulatedUser
from envs.chat.world import Question, make_problem, make_problems

KEY = "CLAWRL_SIMULATOR_KEY"


def personas_of(chat: ChatSection) -> tuple[Persona, ...]:
    return PERSONAS if chat.persona == "all" else (chat.persona,)


class People:
    """The people of a config. Raises ConfigError for a file of problems that cannot be used."""

    def __init__(self, chat: ChatSection) -> None:
        self._chat = chat
        self.personas = personas_of(chat)
        self.draw: Callable[[random.Random], Question] = make_problem
        self.held_out: Sequence[Question] = ()
        if chat.problems is None:
            self.held_out = make_problems(chat.evaluation_problems, "heldout", seed=chat.seed)
        else:
            self._read(Path(chat.problems))

    def person(self, number: int) -> Person:
        """Who holds the conversation of this number: the personas in turn, each conversation with its own seed."""
        persona, rng = self.personas[number % len(self.personas)], random.Random(f"{self._chat.seed} {number}")
        if self._chat.simulator_url is None:
            return SimulatedUser(persona, rng, draw=self.draw)
        return ModelUser(self._simulator, self._chat.simulator_model, persona, rng, self.draw)

    @cached_property
    def _simulator(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self._chat.simulator_url, api_key=os.environ.get(KEY, "none"))

    def problems_of(self, persona: Persona) -> Sequence[Question]:
        """The persona's share of the held-out problems."""
        return self.held_out[self.personas.index(persona) :: len(self.personas)]

    def _read(self, file: Path) -> None:
        try:
            train, held_out = read_problems(file, "train"), read_problems(file, "heldout")
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat.problems: {error}") from error
        if len(held_out) < len(self.personas):
            raise ConfigError(
                f"chat.problems: {file} has {len(held_out)} held-out problems for {len(self.personas)} personas; "
                "it needs more lines"
            )
        random.Random(self._chat.seed).shuffle(held_out)
        self.draw, self.held_out = lambda rng: rng.choice(train), held_out[: self._chat.evaluation_problems]
