"""The tools of the GUI environment, as the agent reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clawrl.types import Tool

_TARGET = {"type": "string", "description": 'a ref such as e4, or a role and name such as button "Save"'}
_POINT = {"type": "string", "description": 'a ref, a role and name, or a point such as "120,80"'}
_TEXT = {"type": "string"}
_PIXELS = {"type": "number", "minimum": -10_000, "maximum": 10_000}


def tool(name: str, description: str, required: Sequence[str] = (), **properties: dict[str, Any]) -> Tool:
    """A tool, as OpenAI's API describes one."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS: tuple[Tool, ...] = (
    tool("click", "Click an element.", ["target"], target=_TARGET),
    tool("fill", "Replace what stands in a field.", ["target", "text"], target=_TARGET, text=_TEXT),
    tool(
        "press", "Press a key, such as Enter, ArrowDown, a or Control+a, in the focused element or in target.", ["key"],
        key=_TEXT, target=_TARGET,
    ),
    tool(
        "select", "Choose options of a combobox or listbox by their labels.", ["target", "options"],
        target=_TARGET, options={"type": "array", "items": _TEXT, "minItems": 1},
    ),
    tool("scroll", "Turn the wheel, over target or the page's middle.", target=_TARGET, dx=_PIXELS, dy=_PIXELS),
    tool("drag", "Drag with the mouse.", ["source", "to"], source=_POINT, to=_POINT),
    tool("goto", "Open an address of this site.", ["url"], url=_TEXT),
    tool("click_at", "Click at a point of the window.", ["x", "y"], x=_PIXELS, y=_PIXELS),
    tool("done", "Say that the task is done. The episode ends."),
)  # fmt: skip
