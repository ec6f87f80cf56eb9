"""The inventory: what lies where, which orders are open, and the acts that change it. A world is plain JSON.

    {"stock": {"barn": {"pears": 12}}, "orders": [{"number": 1, "item": "pears", "count": 3, "place": "barn",
     "status": "open" | "shipped" | "cancelled"}]}

Pure, standard library only: it is imported by the server inside the sandbox and by the tasks outside. An act changes
the world in place and says what it did; one that is not possible raises ValueError with the reason and changes nothing.
"""

from __future__ import annotations

from typing import Any

World = dict[str, Any]


def places(world: World) -> list[str]:
    return sorted(world["stock"])


def stock(world: World, place: str) -> dict[str, int]:
    """Item → count; what there is none of is not listed."""
    if place not in world["stock"]:
        raise ValueError(f"there is no place {place!r}; the places are {', '.join(places(world))}")
    return dict(sorted(world["stock"][place].items()))


def orders(world: World, status: str) -> list[dict[str, Any]]:
    return [order for order in world["orders"] if status in ("all", order["status"])]


def move(world: World, item: str, count: int, source: str, target: str) -> str:
    if source == target:
        raise ValueError("source and target are the same place")
    stock(world, target)
    _take(world, item, count, source)
    _put(world, item, count, target)
    return f"moved {count} {item} from {source} to {target}"


def receive(world: World, item: str, count: int, place: str) -> str:
    stock(world, place)
    _positive(count)
    _put(world, item, count, place)
    return f"received {count} {item} at {place}"


def ship(world: World, number: int) -> str:
    order = _open_order(world, number)
    _take(world, order["item"], order["count"], order["place"])
    order["status"] = "shipped"
    return f"shipped order {number}: {order['count']} {order['item']} from {order['place']}"


def cancel(world: World, number: int) -> str:
    _open_order(world, number)["status"] = "cancelled"
    return f"cancelled order {number}"


def _open_order(world: World, number: int) -> dict[str, Any]:
    for order in world["orders"]:
        if order["number"] == number:
            if order["status"] != "open":
                raise ValueError(f"order {number} is {order['status']} already")
            return order
    raise ValueError(f"there is no order {number}")


def _positive(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be 1 or more, not {count}")


def _take(world: World, item: str, count: int, place: str) -> None:
    _positive(count)
    there = stock(world, place).get(item, 0)
    if there < count:
        raise ValueError(f"there are only {there} {item} at {place}, not {count}")
    world["stock"][place][item] = there - count
    if there == count:
        del world["stock"][place][item]


def _put(world: World, item: str, count: int, place: str) -> None:
    items = world["stock"][place]
    items[item] = items.get(item, 0) + count
