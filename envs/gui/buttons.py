"""One small page with made-up words, for the built-in model: an instruction of a line, one or two actions.

    Click "zorp".           - button "kimal" [ref=e3]        click("e4") ─► the page ends the episode
                            - button "zorp" [ref=e4]

Words stand in double quotes in the instruction as in the snapshot, so that a model this small can copy their tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar
from urllib.parse import parse_qs

from playwright.async_api import Page

from clawrl.rollout.env import message_of
from clawrl.types import Message
from envs.gui.site import GuiTask, Site
from envs.toolcall.stock import invented_word

FIELD = "text"
Press = tuple[str, str]
"""The button that was pressed, and what stood in the field then ("" where there is none)."""


@dataclass(frozen=True, slots=True)
class Puzzle:
    """`wanted` are the presses that solve it."""

    kind: str
    instruction: str
    buttons: tuple[str, ...]
    wanted: tuple[Press, ...]

    @property
    def has_field(self) -> bool:
        return any(text for _, text in self.wanted)

    @property
    def actions(self) -> tuple[tuple[str, dict[str, str]], ...]:
        """Tool and arguments, one after the other; elements are named by role and name."""
        typed = [("fill", {"target": named("textbox", FIELD), "text": text}) for _, text in self.wanted if text]
        return (*typed, *(("click", {"target": named("button", button)}) for button, _ in self.wanted))


def named(role: str, name: str) -> str:
    """A target, as the snapshot writes an element."""
    return f"{role} {json.dumps(name)}"


def click_one(words: Sequence[str], spare: str) -> Puzzle:
    return Puzzle("one", f'Click "{words[0]}".', tuple(words), ((words[0], ""),))


def click_two(words: Sequence[str], spare: str) -> Puzzle:
    first, second = words[:2]
    return Puzzle("two", f'Click "{first}", then "{second}".', tuple(words), ((first, ""), (second, "")))


def fill_and_click(words: Sequence[str], spare: str) -> Puzzle:
    return Puzzle("fill", f'Type "{spare}", then click "{words[0]}".', tuple(words), ((words[0], spare),))


KINDS: tuple[Callable[[Sequence[str], str], Puzzle], ...] = (click_one, click_two, fill_and_click)


def draw_puzzle(make: Callable[[Sequence[str], str], Puzzle], rng: random.Random) -> Puzzle:
    """A puzzle with three to five buttons, in any order."""
    words: dict[str, None] = {}
    while len(words) < 6:
        words[invented_word(rng, 2)] = None
    spare, *others = words
    puzzle = make(others[: rng.randint(3, 5)], spare)
    return replace(puzzle, buttons=tuple(rng.sample(puzzle.buttons, len(puzzle.buttons))))


def shown(puzzle: Puzzle, typed: str = "") -> str:
    """The page as the agent reads it, for demonstrations that are made without a browser."""
    lines = [f"Panel {Panel.url}"]
    if puzzle.has_field:
        lines.append(f'- textbox "{FIELD}" ' + (f"[active] [ref=e1]: {typed}" if typed else "[ref=e1]"))
    lines += [f'- button "{button}" [ref={ref_of(puzzle, button)}]' for button in puzzle.buttons]
    return "\n".join(lines)


def ref_of(puzzle: Puzzle, button: str) -> str:
    return f"e{puzzle.buttons.index(button) + 1 + puzzle.has_field}"


@dataclass(slots=True)
class Panel(Site):
    """The page, and what was pressed on it. A wrong press ends the episode, and so does the last right one."""

    host = "panel.test"
    url: ClassVar[str] = f"http://{host}/"
    puzzle: Puzzle
    pressed: list[Press] = field(default_factory=list)

    @property
    def _right(self) -> int:
        """How many presses were right before a wrong one."""
        return sum(
            1 for at in range(len(self.pressed)) if tuple(self.pressed[: at + 1]) == self.puzzle.wanted[: at + 1]
        )

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "POST":
            sent = parse_qs(environ["wsgi.input"].read().decode())
            self.pressed.append((sent["press"][0], sent.get("text", [""])[0]))
        start_response("200 OK", [("Content-Type", "text/html; charset=utf-8")])
        return [self._html().encode()]

    def _html(self) -> str:
        box = f'<input name=text autocomplete=off aria-label="{FIELD}">' if self.puzzle.has_field else ""
        presses = "".join(f'<button name=press value="{word}">{word}</button>' for word in self.puzzle.buttons)
        return f"<!doctype html><title>Panel</title><form method=post style='display:contents'>{box}{presses}</form>"

    async def begin(self, page: Page) -> str:
        return self.puzzle.instruction

    async def over(self, page: Page) -> bool:
        return len(self.pressed) > self._right or self._right == len(self.puzzle.wanted)

    async def verdict(self, page: Page) -> float:
        """The share of presses that were right, stretched to [-1, 1]."""
        return 2.0 * self._right / len(self.puzzle.wanted) - 1.0

    async def gold(self, page: Page) -> Sequence[Message]:
        return [message_of(name, **arguments) for name, arguments in self.puzzle.actions]


def _maker(make: Callable[[Sequence[str], str], Puzzle], rng: random.Random) -> GuiTask:
    puzzle = draw_puzzle(make, rng)
    wanted = "/".join(f"{text}:{button}" if text else button for button, text in puzzle.wanted)
    return GuiTask(f"buttons/{puzzle.kind}/{'+'.join(puzzle.buttons)}/{wanted}", partial(Panel, puzzle))


MAKERS = {f"buttons/{name}": partial(_maker, make) for name, make in zip(("one", "two", "fill"), KINDS, strict=True)}
