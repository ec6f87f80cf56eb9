"""MCP servers in sandboxes: our inventory, and a second server of another make; what goes wrong, and what is left."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from lacking import lacking

from clawrl.errors import EnvError
from clawrl.rollout.env import message_of, split_of
from envs.sandbox.mapped import missing
from envs.toolcall.mcp_env import McpEnv

pytestmark = pytest.mark.sandbox

NOTES = Path(__file__).with_name("notes_server.py")
DONE = {"role": "assistant", "content": "Done."}
TASK = {
    "instruction": "Write a note called b.txt with the word hello, and remove what is called a.txt.",
    "files": {"/notes/a.txt": "old"},
    "wanted": {"/notes/b.txt": "hello", "/notes/a.txt": None},
    "gold": [["move", {"name": "a.txt", "to": "b.txt"}], ["notes_write", {"name": "b.txt", "text": "hello\n"}]],
}


def notes(*words: str) -> dict[str, Any]:
    return {"command": "python3", "args": ["/opt/notes.py", "/notes", *words]}


def make(**options: Any) -> McpEnv:
    if why := missing():
        lacking(why)
    return McpEnv(limits="enforce" if os.getuid() == 0 else "best_effort", run="tests", **options)


@pytest.fixture(scope="module")
def other(home: Path, folder: Path) -> dict[str, Any]:
    """Options for the second server, on the plain image of this machine's programs, and tasks in a file."""
    names = [next(f"{split}-{i}" for i in range(99) if split_of(f"{split}-{i}") == split) for split in
             ("train", "held_out")]  # fmt: skip
    file = folder / "tasks.json"
    file.write_text(json.dumps([{"id": name, **TASK} for name in names]))
    return {"tasks": file, "files": {"/opt/notes.py": NOTES}, "image": "base"}


@pytest.fixture(scope="module")
def env(other: dict[str, Any]) -> Iterator[McpEnv]:
    made = make(servers={"notes": notes()}, call_seconds=0.5, **other)
    yield made
    made.close()


def ask(env: McpEnv, tool: str, /, **arguments: Any) -> str:
    (message,), reward, terminated, *_ = env.step(message_of(tool, **arguments))
    assert (message["role"], reward, terminated) == ("tool", 0.0, False)
    return message["content"]


def test_gymnasium_finds_nothing_wrong(env):
    check_env(env)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_server_of_another_make_is_judged_by_what_it_leaves(env, split):
    _, facts = env.reset(options={"split": split})
    names = [tool["function"]["name"] for tool in facts["tools"]]
    assert names[:2] == ["notes_write", "move"]
    assert len(names) == 8, "tools come in pages"
    for action in env.gold(env.task):
        _, reward, terminated, *_ = env.step(action)
    assert (reward, terminated) == (1.0, True)
    env.reset(options={"split": split})
    assert env.step(DONE)[1:] == (-1.0, True, False, {"outcome": -1.0})


def test_a_world_is_fresh_and_half_a_solution_is_none(env):
    env.reset()
    assert ask(env, "notes_write", name="b.txt", text="hello") == "notes.write: done"
    assert env.step(DONE)[1] == -1.0  # a.txt is still there


def test_what_goes_wrong_in_a_server_is_told_in_words(env):
    env.reset()
    assert ask(env, "fail") == "error: told to"
    assert ask(env, "move", name="a.txt") == "error: move: 'to' is a required property"
    assert "there is no tool 'write'; the tools are notes_write" in ask(env, "write")
    assert ask(env, "picture") == "[image, not shown]\na picture"
    assert ask(env, "network") == "lo"
    assert len(ask(env, "noise")) == 3_000_000
    assert ask(env, "sleep", seconds=1) == "error: sleep took longer than 0.5 s and was given up"
    time.sleep(0.6)
    assert ask(env, "sleep", seconds=0) == "sleep: done"
    assert "must be valid JSON" in env.step({"role": "assistant", "content": "<tool_call>{"})[0][0]["content"]
    assert ask(env, "die") == "error: server notes is gone: it ended with exit status 7"
    assert ask(env, "sleep", seconds=0) == "error: server notes is gone: it ended with exit status 7"
    assert env.step(DONE)[1] == -1.0


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (
            {"command": "nosuch"},
            r"server 'x' did not start: it ended with exit status 127; it said: .*nosuch.*packages",
        ),
        (
            {"command": "python3", "args": ["-c", "import nosuch"]},
            "(?s)exit status 1; it said: .*No module named 'nosuch'",
        ),
        ({"command": "sleep", "args": ["60"]}, "gave no list of tools within 1 s"),
        (notes("broken"), r"the schema of its tool 'move' cannot be used: .*example.org.* leads out of it"),
    ],
    ids=["missing", "crash", "silence", "schema"],
)
def test_a_server_that_does_not_start_is_an_error_with_a_remedy(other, server, words):
    env = make(servers={"x": server}, start_seconds=1.0 if server["command"] == "sleep" else 30.0, **other)
    try:
        with pytest.raises(EnvError, match=words):
            env.reset()
    finally:
        env.close()


def test_the_inventory_beside_another_server(home):
    """Both have a tool `move`, which is then named after its server."""
    env = make(servers={"notes": notes()}, files={"/opt/notes.py": NOTES, "/notes/x": NOTES})
    try:
        number = next(n for n in range(9) if env.make_task(n, "train").id.startswith("inventory/ship"))
        _, facts = env.reset(options={"task": number})
        names = {tool["function"]["name"] for tool in facts["tools"]}
        assert env.task is not None
        assert {"inventory_move", "notes_move", "ship", "notes_write"} <= names
        assert "error" in ask(env, "ship", order=1)
        assert ask(env, "list_places") == json.dumps(sorted(json.loads(env.task.files["/srv/world.json"])["stock"]))
        for action in env.gold(env.task):
            _, reward, *_ = env.step(action)
        assert reward == 1.0
        env.reset(options={"task": number})
        ask(env, "receive", item="pears", count=1, place=json.loads(ask(env, "list_places"))[0])
        assert env.step(DONE)[1] == -1.0
    finally:
        env.close()


def test_nothing_is_left_after_close_nor_after_a_kill(other, home):
    """A killed owner's servers end by themselves; its folders go when the next process of the run begins."""
    env = make(servers={"notes": notes()}, **other)
    others = _processes()
    env.reset()
    threads = threading.active_count()
    env.close()
    env.close()
    assert threading.active_count() == threads  # the one event loop, of all servers
    assert _processes() == others
    program = (
        "import sys, time; sys.path[:0] = sys.argv[1:3]\nfrom test_mcp import *\n"
        "env = make(servers={'notes': notes()}, tasks=sys.argv[3], files={'/opt/notes.py': NOTES}, image='base')\n"
        "env.reset(); print('ready', flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", program, str(NOTES.parent), str(NOTES.parents[1]), str(other["tasks"])]
    with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"ready\n"
        assert _processes() > others
        owner.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _processes() != others and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes() == others
    boxes = set((home / "boxes").glob("*"))
    McpEnv.reconcile("tests")
    assert len(boxes - set((home / "boxes").glob("*"))) == 1


def _processes() -> set[str]:
    """Notes servers that live."""
    found = set()
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = each.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[:2] == [b"python3", b"/opt/notes.py"]:
            found.add(each.parent.name)
    return found
