"""Simulated users: people with a preference who see only what a reply says and answer as people do.

Knows problems, styles and phrases. Ignores models, HTTP and training. A user is told nothing about how it is judged
and never states its preference beforehand: it only reacts.

    student    no bold, no numbered steps, nothing boxed: the working in plain sentences ("not AI-like")
    assistant  a teaching assistant who wants every reply to end with a check line naming the numbers
    teacher    wants a friendly tone
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from string import Template
from typing import Literal, Protocol

from envs.chat.phrases import Phrasing, Want, say
from envs.chat.styles import Style, classify
from envs.chat.world import Question, make_problem

Persona = Literal["student", "assistant", "teacher"]
PERSONAS: tuple[Persona, ...] = ("student", "assistant", "teacher")
WANTED: dict[Persona, Want] = {"student": "plain", "assistant": "checked", "teacher": "friendly"}

REACTIONS = {"ask": 0.55, "reask": 0.15, "vague": 0.10, "ambiguous": 0.07, "pass": 0.13}
CONTENT = {"thanks": 0.35, "praise": 0.20, "agree": 0.15, "next": 0.30}
NOTICES_ERRORS: dict[Persona, float] = {"student": 0.3, "assistant": 0.8, "teacher": 0.8}
ASK_AND_GO_ON = 0.2  # of complaints, those that bring the next question along


@dataclass(frozen=True, slots=True)
class Mood:
    """How a user phrases things: shares of phrasings never trained on and of hand-written ones."""

    unseen: float = 0.5
    written: float = 0.5

    def phrasing(self, rng: random.Random) -> Phrasing:
        draw = rng.random()
        return "written" if draw < self.written else "unseen" if draw < self.written + self.unseen else "train"


def satisfies(persona: Persona, style: Style) -> bool:
    """Whether a reply in this style is what the persona wants."""
    if persona == "student":
        return style.form == "plain"
    return style.checked if persona == "assistant" else style.friendly


class Person(Protocol):
    """Whoever holds a conversation: opens it with a problem and reacts to replies until there is nothing to say."""

    persona: Persona
    problem: Question
    reaction: str

    def begin(self, problem: Question | None = None) -> str: ...
    async def react(self, reply: str) -> str | None: ...


class SimulatedUser:
    """One person over many conversations; `begin` opens one, `answer` continues it until it returns None.

    `reaction` says why the last message was sent: ask, reask, vague, ambiguous, pass, wrong, thanks, praise, agree,
    next. It is for evidence only and never leaves this process.
    """

    def __init__(
        self,
        persona: Persona,
        rng: random.Random,
        mood: Mood | None = None,
        draw: Callable[[random.Random], Question] = make_problem,
    ) -> None:
        self.persona: Persona = persona
        self.rng, self.mood, self._draw_problem = rng, mood or Mood(), draw
        self.problem: Question = draw(rng)
        self.reaction, self.leaving = "open", False

    def begin(self, problem: Question | None = None) -> str:
        """The first message: a question, without any word on how to answer it."""
        self.problem = problem or self._draw_problem(self.rng)
        self.reaction, self.leaving = "open", False
        return self.problem.question

    def answer(self, reply: str) -> str | None:
        """The next message, or None when the conversation is over."""
        if self.leaving:
            return None
        solution = self.problem.read(reply)
        if not solution.correct and self.rng.random() < NOTICES_ERRORS[self.persona]:
            return self._say("wrong", "wrong")
        if satisfies(self.persona, classify(reply)):
            return self._content()
        return self._displeased()

    async def react(self, reply: str) -> str | None:
        """`answer`, for whoever may have to wait for it (see Person)."""
        return self.answer(reply)

    def _content(self) -> str:
        reaction = self._draw(CONTENT)
        if reaction == "next":
            return self._go_on("next")
        self.leaving = True
        return self._say(reaction, reaction)

    def _displeased(self) -> str:
        reaction = self._draw(REACTIONS)
        if reaction == "pass":
            if self.rng.random() < 0.5:
                return self._go_on("pass")
            self.leaving = True
            return self._say("thanks", "pass")
        if reaction != "ask":
            return self._say(reaction, reaction)
        complaint = self._say(f"ask_{WANTED[self.persona]}", "ask")
        return f"{complaint} {self._go_on('ask')}" if self.rng.random() < ASK_AND_GO_ON else complaint

    def _go_on(self, reaction: str) -> str:
        self.reaction = reaction
        self.problem = self._draw_problem(self.rng)
        return self.problem.question

    def _say(self, topic: str, reaction: str) -> str:
        self.reaction = reaction
        text = say(topic, self.rng, self.mood.phrasing(self.rng))
        return Template(text).safe_substitute(question=self.problem.question, answer=self.problem.answer)

    def _draw(self, shares: dict[str, float]) -> str:
        return self.rng.choices(list(shares), list(shares.values()))[0]
