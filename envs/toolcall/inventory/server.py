"""`python -m envs.toolcall.inventory.server WORLD.json`: an MCP server over stdio, by the official SDK.

Runs inside the sandbox, where only this file and `world` are. Every change is on disk before it is answered.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Literal

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from envs.toolcall.inventory import world

server = MCPServer("inventory", log_level="ERROR")
FILE = Path(sys.argv[1] if len(sys.argv) > 1 else "world.json")


def _read() -> world.World:
    return json.loads(FILE.read_text())


def _change(act: Any, *arguments: Any) -> str:
    now = _read()
    try:
        said = act(now, *arguments)
    except ValueError as error:
        raise ToolError(str(error)) from None
    new = FILE.with_suffix(".new")
    new.write_text(json.dumps(now))
    os.replace(new, FILE)
    return said


@server.tool(structured_output=False)
def list_places() -> str:
    """The names of all places."""
    return json.dumps(world.places(_read()))


@server.tool(structured_output=False)
def list_stock(place: str) -> str:
    """What lies at a place: item and count."""
    try:
        return json.dumps(world.stock(_read(), place))
    except ValueError as error:
        raise ToolError(str(error)) from None


@server.tool(structured_output=False)
def list_orders(status: Literal["open", "shipped", "cancelled", "all"] = "open") -> str:
    """Orders by their status. An order is shipped from its place."""
    return json.dumps(world.orders(_read(), status))


@server.tool(structured_output=False)
def move(item: str, count: int, source: str, target: str) -> str:
    """Move so many of an item from one place to another."""
    return _change(world.move, item, count, source, target)


@server.tool(structured_output=False)
def receive(item: str, count: int, place: str) -> str:
    """Book a delivery of so many of an item into a place."""
    return _change(world.receive, item, count, place)


@server.tool(structured_output=False)
def ship(order: int) -> str:
    """Ship an open order, given by its number: takes its items out of stock."""
    return _change(world.ship, order)


@server.tool(structured_output=False)
def cancel(order: int) -> str:
    """Cancel an open order, given by its number."""
    return _change(world.cancel, order)


if __name__ == "__main__":
    server.run("stdio")
