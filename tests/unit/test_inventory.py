"""The inventory's tasks and what tasks and servers of one's own must look like, without a sandbox."""

import json
from copy import deepcopy
from types import SimpleNamespace

import mcp_types
import pytest

from clawrl.errors import EnvError
from clawrl.rollout.env import SPLITS, Split, split_of
from envs.toolcall.inventory import world
from envs.toolcall.inventory.tasks import KINDS, make_asked
from envs.toolcall.mcp_env import McpEnv, read_tasks
from envs.toolcall.servers import offer, read_specs, told


def total(state: world.World) -> dict[str, int]:
    """All there is of each item, what was shipped included."""
    found: dict[str, int] = {}
    for items in state["stock"].values():
        for item, count in items.items():
            found[item] = found.get(item, 0) + count
    for order in state["orders"]:
        if order["status"] == "shipped":
            found[order["item"]] = found.get(order["item"], 0) + order["count"]
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_tasks_stay_the_same_ask_for_something_and_lose_nothing(split):
    seen = set()
    for number in range(40):
        task = make_asked(number, split)
        assert make_asked(number, split) == task
        assert split_of(task.id) == split
        assert task.wanted != task.world
        assert total(task.wanted) == total(task.world)
        seen.add(task.id.split("/")[1])
    assert seen == set(KINDS)


def test_each_kind_leaves_what_its_words_say():
    for number in range(80):
        task = make_asked(number, "train")
        words = task.instruction.split()
        kind = task.id.split("/")[1]
        if kind == "level":
            counts = [task.wanted["stock"][place].get(words[10].rstrip(":"), 0) for place in (words[4], words[6])]
            assert counts[0] - counts[1] in ((0, 1) if "odd" in task.instruction else (0,))
        elif kind == "gather":
            assert {words[2] in items for place, items in task.wanted["stock"].items() if place != words[-1][:-1]} == {
                False
            }
        elif kind == "ship":
            assert not world.orders(task.wanted, "open")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda w: world.move(w, "pears", 9, "barn", "shop"), "only 5 pears at barn, not 9"),
        (lambda w: world.move(w, "pears", 1, "barn", "barn"), "the same place"),
        (lambda w: world.move(w, "pears", 1, "barn", "moon"), "no place 'moon'; the places are barn, shop"),
        (lambda w: world.move(w, "pears", -1, "barn", "shop"), "must be 1 or more"),
        (lambda w: world.receive(w, "pears", 0, "barn"), "must be 1 or more"),
        (lambda w: world.ship(w, 1), "only 5 pears"),
        (lambda w: world.ship(w, 3), "no order 3"),
        (lambda w: world.cancel(w, 2), "order 2 is shipped already"),
    ],
)
def test_what_is_not_possible_changes_nothing(act, words):
    order = {"item": "pears", "count": 6, "place": "barn"}
    start = {
        "stock": {"barn": {"pears": 5}, "shop": {}},
        "orders": [{"number": 1, **order, "status": "open"}, {"number": 2, **order, "status": "shipped"}],
    }
    now = deepcopy(start)
    with pytest.raises(ValueError, match=words):
        act(now)
    assert now == start


@pytest.mark.parametrize(
    "entry", [{}, {"url": "http://x"}, {"command": "a", "type": "http"}, {"command": "a", "arg": []}, "python"]
)
def test_a_server_of_another_form_is_refused(entry):
    with pytest.raises((EnvError, TypeError), match="x"):
        read_specs({"x": entry})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        '[{"id": "a"}]',
        '[{"id": "a", "instruction": "b", "wanted": {}}]',
        '[{"id": "a", "instruction": 3}]',
    ],
)
def test_a_file_without_tasks_says_what_one_looks_like(tmp_path, content):
    (tmp_path / "tasks.json").write_text(content)
    with pytest.raises(EnvError, match=r"tasks\.json"):
        read_tasks(tmp_path / "tasks.json")


def test_options_that_do_not_go_together(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"id": "a", "instruction": "b", "wanted": {"/c": 1}}]))
    with pytest.raises(EnvError, match="no servers are named"):
        McpEnv(tasks=tmp_path / "t.json")
    env = McpEnv(servers={"x": {"command": "x"}}, tasks=tmp_path / "t.json")
    other: Split = "train" if split_of("a") == "held_out" else "held_out"
    with pytest.raises(EnvError, match=f"none of the 1 tasks is in split {other}"):
        env.make_task(0, other)
    with pytest.raises(EnvError, match="without a solution"):
        env.gold(env.make_task(0, split_of("a")))
    with pytest.raises(EnvError, match=r"nosuch-package is not installed here.*pip install"):
        McpEnv(packages=["nosuch-package"]).reset()


def server(name: str, *tools: str) -> SimpleNamespace:
    found = [mcp_types.Tool(name=tool, input_schema={"type": "object"}) for tool in tools]
    return SimpleNamespace(spec=SimpleNamespace(name=name), tools=found)


def test_tools_of_one_name_get_their_servers_in_front():
    assert list(offer([server("a", "x", "y.z"), server("b", "x")])) == ["a_x", "y_z", "b_x"]  # type: ignore[arg-type]
    with pytest.raises(EnvError, match="rename server 'b'"):
        offer([server("a", "x.y", "b_x_y"), server("b", "x_y")])  # type: ignore[arg-type]


def test_results_become_words():
    text = mcp_types.TextContent(type="text", text="a")
    assert told(mcp_types.CallToolResult(content=[text, text])) == "a\na"
    assert told(mcp_types.CallToolResult(content=[text], is_error=True)) == "error: a"
    assert told(mcp_types.CallToolResult(content=[], structured_content={"b": 1})) == '{"b": 1}'
    assert told(mcp_types.CallToolResult(content=[])) == "[no output]"
