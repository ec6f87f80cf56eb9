"""Own tasks on the shop: families by name, each a function of a random generator and a shop.

A family gives the instruction, the statements that lead to the state that is wanted, and the actions that do so on the
pages. The verdict is on the database alone (`world.verdict`): what else was changed is held against the agent.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from playwright.async_api import Page

from clawrl.rollout.env import message_of
from clawrl.types import Message
from envs.gui.shop.app import DAYS, Shop, money
from envs.gui.shop.world import (
    AGENTS,
    CATEGORIES,
    LOGIN,
    STATES,
    Change,
    Row,
    Rows,
    World,
    contents,
    make_rows,
    verdict,
)
from envs.gui.site import GuiTask, Site


@dataclass(frozen=True, slots=True)
class Made:
    """One instance."""

    instruction: str
    changes: tuple[Change, ...]
    actions: tuple[Message, ...]


Family = Callable[[random.Random, Rows], Made]
_WORDS = "parcel label carton courier depot refund voucher receipt shelf pallet sample ribbon".split()


def click(role: str, name: str) -> Message:
    return message_of("click", target=_named(role, name))


def fill(name: str, text: object) -> Message:
    return message_of("fill", target=_named("textbox", name), text=str(text))


def choose(name: str, option: str) -> Message:
    return message_of("select", target=_named("combobox", name), options=[option])


def goto(url: str) -> Message:
    return message_of("goto", url=url)


def _named(role: str, name: str) -> str:
    return f"{role} {json.dumps(name)}"


def _product(name: str) -> tuple[Message, ...]:
    """To a product's page."""
    return click("link", "Products"), fill("Search", name), click("button", "Find"), click("link", name)


def _customer(name: str) -> tuple[Message, ...]:
    return click("link", "Customers"), fill("Search", name), click("button", "Find"), click("link", name)


def _name_of(rows: Rows, customer: object) -> str:
    return next(str(row[1]) for row in rows["customers"] if row[0] == customer)


def _only(rows: Sequence[Row], *columns: int) -> list[Row]:
    """Those rows that no other is like in these columns."""
    keys = [tuple(row[column] for column in columns) for row in rows]
    return [row for row, key in zip(rows, keys, strict=True) if keys.count(key) == 1]


# -- families --------------------------------------------------------------------------------------------------------


def reply(rng: random.Random, rows: Rows) -> Made:
    number, customer, subject, *_ = rng.choice(_only(rows["tickets"], 1, 2))
    text = f"We sent a {rng.choice(_WORDS)} and a {rng.choice(_WORDS)} on day {rng.randint(1, 28)}."
    return Made(
        f'Reply to the ticket of {_name_of(rows, customer)} with the subject "{subject}". The reply is exactly: {text}',
        (("insert into replies(ticket, text) values (?, ?)", (number, text)),),
        (goto(f"/tickets/{number}"), fill("Reply", text), click("button", "Send reply")),
    )


def assign(rng: random.Random, rows: Rows) -> Made:
    number, *_, agent = rng.choice(rows["tickets"])
    other = rng.choice([each for each in AGENTS if each not in (agent, "nobody")])
    priority = rng.choice(("low", "high"))
    return Made(
        f"Give ticket {number} to {other} and set its priority to {priority}.",
        (("update tickets set agent = ?, priority = ? where id = ?", (other, priority, number)),),
        (goto(f"/tickets/{number}"), choose("Agent", other), click("radio", priority), click("button", "Save")),
    )


def close_tickets(rng: random.Random, rows: Rows) -> Made:
    waiting = [row for row in rows["tickets"] if row[3] != "closed"]
    most = max(waiting, key=lambda row: sum(each[1] == row[1] for each in waiting))[1]
    numbers = [int(row[0]) for row in waiting if row[1] == most]
    actions = ((goto(f"/tickets/{n}"), choose("State", "closed"), click("button", "Save")) for n in numbers)
    return Made(
        f"Close all tickets of {_name_of(rows, most)}.",
        tuple(("update tickets set state = 'closed' where id = ?", (number,)) for number in numbers),
        tuple(action for three in actions for action in three),
    )


def board(rng: random.Random, rows: Rows) -> Made:
    number, _, _, state, *_ = rng.choice(rows["tickets"])
    other = rng.choice([each for each in STATES if each != state])
    drag = message_of("drag", source=_named("listitem", f"Ticket {number}"), to=_named("list", other))
    return Made(
        f'On the board, drag ticket {number} to "{other}".',
        (("update tickets set state = ? where id = ?", (other, number)),),
        (click("link", "Board"), drag),
    )


def stock(rng: random.Random, rows: Rows) -> Made:
    number, name, *_ = rng.choice(rows["products"])
    count = rng.randint(60, 500)
    return Made(
        f"We counted {count} pieces of {name}. Correct its stock.",
        (("update products set stock = ? where id = ?", (count, number)),),
        (*_product(str(name)), fill("Stock", count), click("button", "Save")),
    )


def dearest(rng: random.Random, rows: Rows) -> Made:
    category = rng.choice([row[2] for row in rows["products"]])
    number, name, _, cents, _ = max((row for row in rows["products"] if row[2] == category), key=lambda row: row[3])
    new = int(cents) - rng.randint(1, 300)
    return Made(
        f"Set the price of the most expensive product in the category {category} to {money(new)}.",
        (("update products set cents = ? where id = ?", (new, number)),),
        (*_product(str(name)), fill("Price", money(new)), click("button", "Save")),
    )


def add_product(rng: random.Random, rows: Rows) -> Made:
    name = f"{rng.choice(_WORDS).capitalize()} {rng.choice(('holder', 'stand', 'cover', 'basket'))}"
    category, cents, count = rng.choice(CATEGORIES), rng.randint(100, 9999), rng.randint(1, 99)
    return Made(
        f'Add a new product named "{name}" in the category {category}, price {money(cents)}, stock {count}.',
        (("insert into products(name, category, cents, stock) values (?,?,?,?)", (name, category, cents, count)),),
        (
            click("link", "Products"), click("link", "New product"), fill("Name", name), choose("Category", category),
            fill("Price", money(cents)), fill("Stock", count), click("button", "Add"),
        ),
    )  # fmt: skip


def delete_product(rng: random.Random, rows: Rows) -> Made:
    number, name, *_ = rng.choice(rows["products"])
    sure = click("checkbox", "Yes, delete this product")
    return Made(
        f"We do not sell {name} any more. Delete it.",
        (("delete from products where id = ?", (number,)),),
        (*_product(str(name)), sure, click("button", "Delete")),
    )


def ship(rng: random.Random, rows: Rows) -> Made:
    number = rng.choice([row for row in rows["orders"] if row[2] != "shipped"])[0]
    note = f"tracking {rng.choice('ABCDEFGH')}{rng.randrange(10**5, 10**6)}"
    return Made(
        f'Order {number} has left: set its status to shipped, and its note to "{note}".',
        (("update orders set status = 'shipped', note = ? where id = ?", (note, number)),),
        (goto(f"/orders/{number}"), click("radio", "shipped"), fill("Note", note), click("button", "Save")),
    )


def cancel(rng: random.Random, rows: Rows) -> Made:
    owners = {row[0]: row[1] for row in rows["orders"]}
    held = [(owners[row[1]], row[2], row[1]) for row in rows["lines"]]
    customer, product, number = rng.choice(_only(held, 0, 1))
    name = next(str(row[1]) for row in rows["products"] if row[0] == product)
    return Made(
        f"{_name_of(rows, customer)} wants to cancel the order with the {name} in it. Set its status to cancelled.",
        (("update orders set status = 'cancelled' where id = ?", (number,)),),
        (
            *_customer(_name_of(rows, customer)), click("link", f"Order {number}"), click("radio", "cancelled"),
            click("button", "Save"),
        ),
    )  # fmt: skip


def email(rng: random.Random, rows: Rows) -> Made:
    number, name, *_ = rng.choice(rows["customers"])
    address = f"{rng.choice(_WORDS)}{rng.randrange(1000)}@post.test"
    return Made(
        f"{name} has a new email address: {address}",
        (("update customers set email = ? where id = ?", (address, number)),),
        (*_customer(str(name)), fill("Email", address), click("button", "Save")),
    )


def order(rng: random.Random, rows: Rows) -> Made:
    customer, name, *_ = rng.choice(rows["customers"])
    wanted = [(*rng.choice(rows["products"])[:2], rng.randint(2, 9))]
    wanted.append((*rng.choice([row for row in rows["products"] if row[0] != wanted[0][0]])[:2], rng.randint(2, 9)))
    number = int(rows["orders"][-1][0]) + 1
    lines = (('insert into lines("order", product, quantity) values (?,?,?)', (number, p, q)) for p, _, q in wanted)
    rows_filled = ((choose(f"Product {n}", str(p)), fill(f"Quantity {n}", q)) for n, (_, p, q) in enumerate(wanted, 1))
    (_, first, a), (_, second, b) = wanted
    return Made(
        f"Place an order for {name}: {a} pieces of {first} and then {b} of {second}.",
        (("insert into orders(id, customer, status, note) values (?, ?, 'new', '')", (number, customer)), *lines),
        (
            *_customer(str(name)), click("link", "New order"), *(action for two in rows_filled for action in two),
            click("button", "Place order"),
        ),
    )  # fmt: skip


def coupon(rng: random.Random, rows: Rows) -> Made:
    code, percent = f"{rng.choice(_WORDS).upper()}{rng.randint(10, 99)}", rng.randint(5, 60)
    category, once = rng.choice(CATEGORIES), rng.random() < 0.5
    box = (click("checkbox", "Only once per customer"),) if once else ()
    limit = ", which a customer can use only once" if once else ""
    values = code, percent, category, int(once)
    return Made(
        f"Create the coupon {code} for {percent} percent off in the category {category}{limit}.",
        (("insert into coupons(code, percent, category, once) values (?,?,?,?)", values),),
        (
            click("link", "Coupons"), fill("Code", code), fill("Percent", percent), choose("Category", category), *box,
            click("button", "Create"),
        ),
    )  # fmt: skip


def settings(rng: random.Random, rows: Rows) -> Made:
    user, password = LOGIN
    notice, day = f"New {rng.choice(_WORDS)} service from day {rng.randint(1, 28)}", rng.choice(DAYS[:2])
    return Made(
        f'Log in to the settings as {user} with the password {password}. Set the notice to "{notice}", and that the '
        f"shop is closed on {day}.",
        (
            ("update settings set value = ? where name = 'notice'", (notice,)),
            ("update settings set value = ? where name = 'closed_on'", (day,)),
        ),
        (
            click("link", "Settings"), fill("User name", user), fill("Password", password), click("button", "Log in"),
            fill("Notice", notice), choose("Closed on", day), click("button", "Save"),
        ),
    )  # fmt: skip


FAMILIES: tuple[Family, ...] = (
    stock, reply, email, assign, add_product, ship, board, delete_product, close_tickets, coupon, dearest, settings,
    cancel, order,
)  # fmt: skip


class ShopSite(Site):
    """A shop, and what is asked for in it."""

    host = "shop.test"

    def __init__(self, rows: Rows, made: Made) -> None:
        world = World(rows, made.changes)
        self._made, self._base = made, world.database()
        self._first, self._wanted = contents(self._base), contents(world.database(wanted=True))
        self.app = Shop(self._base)

    async def begin(self, page: Page) -> str:
        return self._made.instruction

    async def verdict(self, page: Page) -> float:
        return verdict(self._first, self._wanted, contents(self._base))

    async def gold(self, page: Page) -> Sequence[Message]:
        return (*self._made.actions, message_of("done"))


def _maker(family: Family, rng: random.Random) -> GuiTask:
    """The id tells what the task holds: two instances that are alike have one id, hence one split."""
    rows = make_rows(rng)
    made = family(rng, rows)
    digest = hashlib.sha256(repr((made.instruction, sorted(rows.items()))).encode()).hexdigest()
    return GuiTask(f"own/{family.__name__}/{digest[:16]}", partial(ShopSite, rows, made))


MAKERS = {f"own/{family.__name__}": partial(_maker, family) for family in FAMILIES}
