"""The ways a reply can be written: rendering a reference reply in one, and recognising one in free text.

Knows the problems of `world`. Ignores users and models. A style has three independent sides: form (numbered bold
steps, plain sentences, the bare answer), tone (friendly or not), and whether a closing check line stands at its end.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Literal

from envs.chat.world import Problem, body_of

Form = Literal["steps", "plain", "brief"]
FORMS: tuple[Form, ...] = ("steps", "plain", "brief")

FORM_SHARES = (0.82, 0.14, 0.04)  # of replies to which nobody said how they should look
FRIENDLY_SHARE = 0.15
CHECKED_SHARE = 0.12

OPENERS = (
    "Happy to help!",
    "Great question!",
    "Glad you asked!",
    "Sure, let's look together!",
    "Nice one, let's see!",
)
CLOSERS = ("Hope that helps!", "Well done for asking!", "Keep it up!", "Have a lovely day!", "Good luck!")
_WARM = re.compile(
    r"\b(happy|great|glad|nice|hope|helps|well done|keep it up|lovely|good luck|sure|together|cheers|wonderful|"
    r"welcome|pleasure|my friend|you can do)\b",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"\*\*|^\s*\d+[.)]\s|^\s*[-*•]\s|^#+\s|\\boxed|^\s*step\s*\d", re.IGNORECASE | re.MULTILINE)
_CHECK = re.compile(r"\bCheck:[^\n]*\d")


@dataclass(frozen=True, slots=True)
class Style:
    """How a reply is written."""

    form: Form
    friendly: bool = False
    checked: bool = False


def default_style(rng: random.Random) -> Style:
    """What the tiny model does when nobody asked for anything."""
    form = rng.choices(FORMS, FORM_SHARES)[0]
    return Style(form, rng.random() < FRIENDLY_SHARE, rng.random() < CHECKED_SHARE)


def render(problem: Problem, style: Style, rng: random.Random) -> str:
    """A right reply to the problem in the style."""
    body = {"steps": _steps, "plain": _plain, "brief": _brief}[style.form](problem, rng)
    if style.checked:
        body += f"\nCheck: {problem.check}."
    if not style.friendly:
        return body
    opened = rng.random() < 0.7
    gap = "\n" if style.form == "steps" else " "
    if opened:
        body = rng.choice(OPENERS) + gap + body
    if not opened or rng.random() < 0.4:
        body += ("\n" if style.checked or style.form == "steps" else " ") + rng.choice(CLOSERS)
    return body


def classify(reply: str) -> Style:
    """The style of any text. `steps`: any markup (bold, list, boxed, heading); `plain`: a sentence that shows how
    the answer came about; `brief`: neither."""
    body = body_of(reply)
    if _MARKUP.search(reply):
        form: Form = "steps"
    elif "=" in body or len(re.findall(r"[A-Za-z]+", _without_warmth(body))) >= 8:
        form = "plain"
    else:
        form = "brief"
    return Style(form, bool(_WARM.search(reply)), bool(_CHECK.search(reply)))


def _steps(problem: Problem, rng: random.Random) -> str:
    """Bold and numbered, in one of the ways chat models do it."""
    way = rng.choices(("step", "label", "boxed"), (0.5, 0.3, 0.2))[0]
    lines = []
    for at, (label, equation) in enumerate(zip(problem.labels, problem.equations, strict=True), 1):
        lines.append(f"{at}. **{label}:** {equation}" if way == "label" else f"**Step {at}:** {equation}")
    if way == "boxed" and problem.winner is None:
        return "\n".join([*lines, f"**Answer:** \\boxed{{{problem.number}}}"])
    return "\n".join([*lines, f"**Answer:** {problem.answer}"])


def _plain(problem: Problem, rng: random.Random) -> str:
    """One or two sentences with the working in them."""
    closing = problem.sentence
    if problem.kind == "lookup":
        return f"The list says {problem.equations[0]}, so {closing}."
    if len(problem.equations) == 1:
        return rng.choice((f"{problem.equations[0]}, so {closing}.", f"We get {problem.equations[0]}, so {closing}."))
    first, second = problem.equations
    return rng.choice((f"First {first}, then {second}, so {closing}.", f"{first} and {second}, so {closing}."))


def _brief(problem: Problem, rng: random.Random) -> str:
    return f"{problem.answer}." if rng.random() < 0.8 else f"It is {problem.answer}."


def _without_warmth(body: str) -> str:
    """The text without sentences that end in an exclamation mark."""
    return re.sub(r"[^.!?\n]*!", "", body)
