"""What stands in the shop's database at first, and how a database is judged.

Pure but for SQLite. Ignores pages (`app`) and what is asked of an agent (`tasks`).
"""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

SCHEMA = """
create table products(id integer primary key, name text unique, category text, cents integer, stock integer);
create table customers(id integer primary key, name text unique, email text, city text);
create table orders(id integer primary key, customer integer, status text, note text);
create table lines(id integer primary key, "order" integer, product integer, quantity integer);
create table tickets(id integer primary key, customer integer, subject text, state text, priority text, agent text);
create table replies(id integer primary key, ticket integer, text text);
create table coupons(id integer primary key, code text unique, percent integer, category text, once integer);
create table settings(name text primary key, value text);
"""
TABLES = ("products", "customers", "orders", "lines", "tickets", "replies", "coupons", "settings")

CATEGORIES = ("garden", "kitchen", "office", "sport", "toys")
STATUSES = ("new", "packed", "shipped", "cancelled")
STATES = ("open", "waiting", "closed")
PRIORITIES = ("low", "normal", "high")
AGENTS = ("nobody", "Aoife", "Bruno", "Chiara", "Dmitri")
LOGIN = ("keeper", "lantern-42")

_KINDS = {
    "garden": ("rake", "trowel", "lantern", "planter", "hose"),
    "kitchen": ("kettle", "teapot", "whisk", "pan", "mill"),
    "office": ("stapler", "lamp", "folder", "notebook", "tray"),
    "sport": ("racket", "helmet", "rope", "ball", "mat"),
    "toys": ("kite", "puzzle", "drum", "top", "train"),
}
_LOOKS = "amber birch cobalt coral ivory maple mint olive slate velvet walnut willow".split()
_FIRST = "Ada Bela Chen Dora Emil Fatou Goran Hana Ines Jonas Kira Luca Mina Noor Olga Pia".split()
_LAST = "Abel Brandt Castro Dahl Egger Fontaine Greco Horvat Ito Jansen Kovac Lindqvist".split()
_CITIES = "Accra Basel Cusco Delhi Essen Ghent Hanoi Izmir Kyoto Lima Oslo Porto".split()
_SUBJECTS = (
    "The parcel is late", "Wrong colour", "A part is missing", "Question about washing", "The invoice has an error",
    "It came broken", "How do I return this?", "The lid does not fit", "Paid twice", "Change of address",
)  # fmt: skip
_NOTES = ("", "", "", "leave at the door", "gift wrap", "ring twice")

Row = tuple[str | int, ...]
Rows = dict[str, list[Row]]
Change = tuple[str, Sequence[str | int]]
"""An SQL statement and its parameters."""


@dataclass(frozen=True, slots=True)
class World:
    """The first state, table by table, and the statements that lead to the state that is wanted."""

    rows: Rows
    changes: tuple[Change, ...] = ()

    def database(self, *, wanted: bool = False) -> sqlite3.Connection:
        """A database in memory, in its first or in its wanted state."""
        base = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        base.executescript(SCHEMA)
        for table, rows in self.rows.items():
            for row in rows:
                base.execute(f"insert into {table} values ({','.join('?' * len(row))})", row)
        for statement, parameters in self.changes if wanted else ():
            if base.execute(statement, parameters).rowcount < 1:
                raise ValueError(f"{statement} {parameters} changes nothing")
        return base


def make_rows(rng: random.Random) -> Rows:
    """A shop of some twenty products, ten customers, a dozen orders and tickets."""
    names = rng.sample([f"{look} {kind}" for look in _LOOKS for kind in sum(_KINDS.values(), ())], 22)
    category = {kind: group for group, kinds in _KINDS.items() for kind in kinds}
    prices = rng.sample(range(4, 120), len(names))
    products: list[Row] = [
        (number, name.capitalize(), category[name.split()[1]], price * 100 + rng.choice((0, 50, 95)), rng.randrange(60))
        for number, (name, price) in enumerate(zip(names, prices, strict=True), 1)
    ]
    people = rng.sample([f"{first} {last}" for first in _FIRST for last in _LAST], 10)
    customers: list[Row] = [
        (number, name, f"{name.split()[0].lower()}{rng.randrange(10, 99)}@mail.test", rng.choice(_CITIES))
        for number, name in enumerate(people, 1)
    ]
    orders: list[Row] = []
    lines: list[Row] = []
    for number in range(101, 113):
        status = rng.choice(("new", "new", "packed", "shipped"))
        orders.append((number, rng.randint(1, len(people)), status, rng.choice(_NOTES)))
        for product in rng.sample(range(1, len(names) + 1), rng.randint(1, 3)):
            lines.append((len(lines) + 1, number, product, rng.randint(1, 5)))
    tickets: list[Row] = [
        (number, rng.randint(1, len(people)), rng.choice(_SUBJECTS), rng.choice(STATES), "normal", rng.choice(AGENTS))
        for number in range(501, 515)
    ]
    coupons: list[Row] = [(1, "WELCOME", 10, "garden", 1)]
    settings: list[Row] = [("notice", ""), ("closed_on", "Sunday")]
    return {
        "products": products, "customers": customers, "orders": orders, "lines": lines, "tickets": tickets,
        "replies": [], "coupons": coupons, "settings": settings,
    }  # fmt: skip


def contents(base: sqlite3.Connection) -> Counter[tuple[str, Row]]:
    """All rows of all tables."""
    return Counter((table, row) for table in TABLES for row in base.execute(f"select * from {table}"))


def _keys(rows: Counter) -> set[tuple[str, object]]:
    """Which rows there are; a table's first column is its key."""
    return {(table, row[0]) for table, row in rows}


def verdict(first: Counter, wanted: Counter, now: Counter) -> float:
    """1 for the wanted state; -1 if anything is otherwise than at first or as wanted; between them the share done.

    A row that is to be changed and is gone is neither.
    """
    asked_in, asked_out = wanted - first, first - wanted
    if now - (first | wanted) or (first & wanted) - now or (_keys(first) & _keys(wanted)) - _keys(now):
        return -1.0
    done = (asked_in & now).total() + (asked_out - now).total()
    return 2.0 * done / (asked_in.total() + asked_out.total()) - 1.0
