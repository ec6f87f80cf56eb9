"""Demonstrations of the GUI's buttons for the tiny model's corpus. Deliberately noisy, as those of `tools`.

Knows how people get `envs/gui/buttons.py` wrong, and what the page looks like then. Starts no browser.
"""

from __future__ import annotations

import random
from typing import Literal

from clawrl.types import Message
from envs.gui.buttons import KINDS, Puzzle, draw_puzzle, ref_of, shown
from envs.gui.tools import TOOLS as ALL_TOOLS
from jobs.tiny_model.tools import call_message

PANEL_TOOLS = ALL_TOOLS[:2]
"""click and fill, as `options = { family = "buttons", tools = ["click", "fill"] }` offers them."""

PanelFlaw = Literal["none", "other", "late", "skip", "talk"]
PANEL_FLAW_SHARES: dict[PanelFlaw, float] = {"none": 0.40, "other": 0.32, "late": 0.14, "skip": 0.08, "talk": 0.06}
"""Nothing; another button; the second of two buttons, or of a field only the button; the wrong text; words."""


def demonstrate_panel(rng: random.Random) -> list[Message]:
    """An episode about made-up words, right or wrong."""
    puzzle = draw_puzzle(rng.choice(KINDS), rng)
    return demonstrate(puzzle, rng.choices(list(PANEL_FLAW_SHARES), list(PANEL_FLAW_SHARES.values()))[0], rng)


def demonstrate(puzzle: Puzzle, flaw: PanelFlaw, rng: random.Random) -> list[Message]:
    """An episode with the flaw in it; it ends where the page ends it."""
    messages: list[Message] = [{"role": "user", "content": f"{puzzle.instruction}\n\n{shown(puzzle)}"}]
    if flaw == "talk":
        return [*messages, {"role": "assistant", "content": puzzle.instruction}]
    presses = [button for button, _ in puzzle.wanted]
    typed = next((text for _, text in puzzle.wanted if text), "")
    if typed and flaw != "late":
        typed = rng.choice(puzzle.buttons) if flaw == "skip" else typed
        messages += [call_message("fill", {"target": "e1", "text": typed}), _said("filled e1", puzzle, typed)]
    if flaw == "late" and len(presses) > 1:
        presses = presses[1:]
    if flaw == "other":
        at = rng.randrange(len(presses))
        presses[at] = rng.choice([button for button in puzzle.buttons if button != presses[at]])
    for button in presses:
        ref = ref_of(puzzle, button)
        messages += [call_message("click", {"target": ref}), _said(f"clicked {ref}", puzzle)]
        if button != puzzle.wanted[0][0]:
            break
    return messages[:-1]


def _said(what: str, puzzle: Puzzle, typed: str = "") -> Message:
    return {"role": "tool", "content": f"{what}\n\n{shown(puzzle, typed)}"}
