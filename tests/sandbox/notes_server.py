"""An MCP server of another maker: JSON-RPC by hand, the standard library alone. Notes are files of a folder.

`python3 notes_server.py FOLDER [broken]`; broken: a schema that leads out of itself.
"""

import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
TEXT = {"type": "string"}


def schema(*required: str, **properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(required)}


TOOLS = {
    "notes.write": schema("name", "text", name=TEXT, text=TEXT),
    "move": schema("name", "to", name=TEXT, to=TEXT),
    "sleep": schema("seconds", seconds={"type": "number"}),
    "picture": schema(),
    "noise": schema(),
    "fail": schema(),
    "die": schema(),
    "network": schema(),
}
if "broken" in sys.argv:
    TOOLS["move"] = {"type": "object", "properties": {"name": {"$ref": "https://example.org/name.json"}}}


def act(tool: str, given: dict) -> list[dict]:
    if tool == "notes.write":
        (FOLDER / given["name"]).write_text(given["text"])
    elif tool == "move":
        (FOLDER / given["name"]).rename(FOLDER / given["to"])
    elif tool == "sleep":
        time.sleep(given["seconds"])
    elif tool == "picture":
        return [{"type": "image", "data": "AAAA", "mimeType": "image/png"}, {"type": "text", "text": "a picture"}]
    elif tool == "noise":
        sys.stdout.write("this is no JSON\n")
        return [{"type": "text", "text": "x" * 3_000_000}]
    elif tool == "fail":
        raise ValueError("told to")
    elif tool == "network":
        return [
            {
                "type": "text",
                "text": " ".join(line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line),
            }
        ]
    else:
        sys.stderr.write("goodbye\n")
        os._exit(7)
    return [{"type": "text", "text": f"{tool}: done"}]


def answer(method: str, given: dict) -> dict:
    if method == "initialize":
        about = {"name": "notes", "version": "1"}
        return {"protocolVersion": given["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": about}
    if method == "tools/list":  # in pages of three
        start = int(given.get("cursor") or 0)
        shown = [{"name": name, "inputSchema": each} for name, each in TOOLS.items()][start : start + 3]
        return {"tools": shown} | ({"nextCursor": str(start + 3)} if start + 3 < len(TOOLS) else {})
    assert method == "tools/call", method
    try:
        return {"content": act(given["name"], given.get("arguments") or {})}
    except (ValueError, OSError) as error:
        return {"content": [{"type": "text", "text": str(error)}], "isError": True}


for line in sys.stdin:
    request = json.loads(line)
    if "id" not in request:
        continue
    reply = {"jsonrpc": "2.0", "id": request["id"]}
    try:
        reply["result"] = answer(request["method"], request.get("params") or {})
    except AssertionError as error:
        reply["error"] = {"code": -32601, "message": f"no method {error}"}
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()
