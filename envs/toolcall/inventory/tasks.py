"""Tasks about the inventory, made from a number: a world, what is asked, the acts that do it, the world they leave.

    move      so many from one place to another            gather   all of an item to one place
    level     the same count of an item at two places      ship     open orders: ship what can be, cancel the rest

Pure. Ignores servers and sandboxes: what is wanted comes from playing the solution on the world itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from clawrl.rollout.env import Split, draw, split_of
from envs.chat.world import ITEMS, PLACES
from envs.toolcall.inventory import world
from envs.toolcall.inventory.world import World

Act = tuple[str, dict[str, Any]]
"""A tool and its arguments."""
Made = tuple[str, list[Act]]
NUM_PLACES, NUM_ITEMS, NUM_ORDERS = 4, 4, 4


@dataclass(frozen=True, slots=True)
class Asked:
    """`kind` and hash name it; `solution` are acts by tool and arguments that bring `world` to `wanted`."""

    id: str
    world: World
    instruction: str
    solution: tuple[Act, ...]
    wanted: World


def make_asked(number: int, split: Split) -> Asked:
    """The task of that number; the same world and instruction are in the same split for ever."""
    attempt = 0
    while True:
        made = _make(draw(number, attempt), number)
        if made is not None and split_of(made.id) == split:
            return made
        attempt += 1


def _make(rng: np.random.Generator, number: int) -> Asked | None:
    """None where the world happens to ask for nothing."""
    start = _world(rng)
    kind, make = list(KINDS.items())[number % len(KINDS)]
    instruction, solution = make(rng, start)
    wanted = deepcopy(start)
    for name, arguments in solution:
        given = {"number" if key == "order" else key: value for key, value in arguments.items()}
        getattr(world, name)(wanted, **given)
    if wanted == start:
        return None
    digest = hashlib.sha256(json.dumps([start, instruction], sort_keys=True).encode()).hexdigest()[:16]
    return Asked(f"inventory/{kind}/{digest}", start, instruction, tuple(solution), wanted)


def _world(rng: np.random.Generator) -> World:
    names = [str(each) for each in rng.choice(PLACES, NUM_PLACES, replace=False)]
    items = [str(each) for each in rng.choice(ITEMS, NUM_ITEMS, replace=False)]
    stock: dict[str, dict[str, int]] = {}
    for place in names:
        kept = rng.choice(items, int(rng.integers(2, NUM_ITEMS)), replace=False)
        stock[place] = {str(item): int(rng.integers(1, 40)) for item in kept}
    numbers = rng.choice(np.arange(100, 1000), NUM_ORDERS, replace=False)
    orders = []
    for each in sorted(map(int, numbers)):
        place = str(rng.choice(names))
        item = str(rng.choice(sorted(stock[place]) if rng.random() < 0.7 else items))
        count = int(rng.integers(1, 30))
        orders.append({"number": each, "item": item, "count": count, "place": place, "status": "open"})
    return {"stock": stock, "orders": orders}


def _one(rng: np.random.Generator, choices: list[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _held(start: World) -> list[tuple[str, str, int]]:
    """(place, item, count) of all that lies somewhere."""
    return [(place, item, count) for place, items in start["stock"].items() for item, count in items.items()]


def _move(rng: np.random.Generator, start: World) -> Made:
    source, item, there = _one(rng, _held(start))
    target = _one(rng, [place for place in start["stock"] if place != source])
    count = int(rng.integers(1, there + 1))
    asked = f"Move {count} {item} from the {source} to the {target}."
    return asked, [("move", {"item": item, "count": count, "source": source, "target": target})]


def _level(rng: np.random.Generator, start: World) -> Made:
    first, item, many = _one(rng, _held(start))
    second = _one(rng, [place for place in start["stock"] if place != first])
    few = start["stock"][second].get(item, 0)
    asked = f"See to it that {first} and {second} have equally many {item}: move some from one of them to the other."
    if (many + few) % 2:
        asked += f" If their sum is odd, the one more belongs at the {first}."
    source, target = (first, second) if many > few else (second, first)
    count = (many - few) // 2 if many > few else (few - many + 1) // 2
    return asked, [("move", {"item": item, "count": count, "source": source, "target": target})] if count else []


def _gather(rng: np.random.Generator, start: World) -> Made:
    target = _one(rng, list(start["stock"]))
    item = _one(rng, sorted({item for _, item, _ in _held(start)}))
    found = [(place, count) for place, held, count in _held(start) if held == item and place != target]
    acts: list[Act] = [
        ("move", {"item": item, "count": count, "source": place, "target": target}) for place, count in found
    ]
    return f"Bring all {item} there are, wherever they lie, to the {target}.", acts


def _ship(rng: np.random.Generator, start: World) -> Made:
    del rng
    asked = (
        "Work off the open orders by their numbers, the lowest first: ship an order if its place has enough of its "
        "item left at that time, and cancel it if not. Move nothing."
    )
    now, acts = deepcopy(start), list[Act]()
    for order in start["orders"]:
        try:
            world.ship(now, order["number"])
            acts.append(("ship", {"order": order["number"]}))
        except ValueError:
            acts.append(("cancel", {"order": order["number"]}))
    return asked, acts


KINDS: dict[str, Callable[[np.random.Generator, World], Made]] = {
    "move": _move,
    "level": _level,
    "gather": _gather,
    "ship": _ship,
}
