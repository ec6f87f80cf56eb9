"""The shop's back office: a WSGI application over one SQLite database.

    /products  /orders  /customers  /tickets  /board  /coupons  /settings (behind a login)

Knows its tables and its pages. Ignores agents and tasks.
"""

from __future__ import annotations

import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlencode

from envs.gui.shop import html
from envs.gui.shop.asking import Asked, Goto, Refused
from envs.gui.shop.html import Html, link, tag
from envs.gui.shop.world import AGENTS, CATEGORIES, LOGIN, PRIORITIES, STATES, STATUSES

PAGE_ROWS = 8
NAV = ("products", "orders", "customers", "tickets", "board", "coupons", "settings")
DAYS = ("Monday", "Saturday", "Sunday")
STYLE = (
    "body{font:15px sans-serif;margin:12px}nav a{margin-right:12px}td,th{padding:3px 8px;text-align:left}"
    ".column{display:inline-block;vertical-align:top;width:230px;min-height:300px;background:#eee;margin:4px;padding:6px}"
    ".card{background:#fff;margin:4px 0;padding:6px;cursor:grab}"
)
_DRAG = """
document.querySelectorAll('.card').forEach(card => card.ondragstart = event =>
    event.dataTransfer.setData('text', card.dataset.ticket));
document.querySelectorAll('.column').forEach(column => {
    column.ondragover = event => event.preventDefault();
    column.ondrop = event => {
        event.preventDefault();
        const form = document.forms.move;
        form.ticket.value = event.dataTransfer.getData('text');
        form.state.value = column.dataset.state;
        form.submit();
    };
});"""


class Shop:
    """One shop; its state is its database, and who is logged in."""

    def __init__(self, base: sqlite3.Connection) -> None:
        self.base = base
        self._session = secrets.token_hex(8)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"].rstrip("/") or "/"
        sent = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0)).decode("utf-8", "replace")
        form = {key: values[-1] for key, values in parse_qs(sent or environ["QUERY_STRING"], True).items()}
        name = f"{method.lower()} {re.sub(r'/[0-9]+', '/N', path)}"
        number = re.search(r"/([0-9]{1,9})", path)
        cookie = SimpleCookie(environ.get("HTTP_COOKIE", "")).get("session")
        asked = Asked(form, int(number[1]) if number else 0, cookie.value if cookie else "")
        status, fields, shown = "200 OK", [("Content-Type", "text/html; charset=utf-8")], Html("")
        try:
            shown = ROUTES[name](self, asked) if name in ROUTES else self._missing()
        except Refused as error:
            status, shown = "422 Unprocessable Content", self._page("Not saved", tag("p", error, role="alert"))
        except Goto as error:
            status, fields = "303 See Other", [*fields, ("Location", error.where)]
            fields += [("Set-Cookie", error.cookie)] if error.cookie else []
        start_response(status, fields)
        return [shown.encode()]

    # -- pages ---------------------------------------------------------------------------------------------------------

    def home(self, asked: Asked) -> Html:
        (notice,) = self._one("select value from settings where name = 'notice'")
        (waiting,) = self._one("select count(*) from tickets where state = 'open'")
        return self._page("Shop", tag("p", notice), tag("p", f"{waiting} open tickets"))

    def products(self, asked: Asked) -> Html:
        words, category = asked.form.get("search", ""), asked.form.get("category", "all")
        rows = self._all(
            "select id, name, category, cents, stock from products "
            "where instr(lower(name), lower(?)) and (? = 'all' or category = ?) order by name",
            words, category, category,
        )  # fmt: skip
        search = html.form(
            "/products", "Find", html.field("Search", "search", words),
            html.choice("Category", "category", ("all", *CATEGORIES), category), method="get",
        )  # fmt: skip
        shown = ((link(f"/products/{i}", name), group, money(cents), stock) for i, name, group, cents, stock in rows)
        listed = self._listed("/products", asked, ("Product", "Category", "Price", "Stock"), list(shown))
        return self._page("Products", link("/products/new", "New product"), search, listed)

    def new_product(self, asked: Asked) -> Html:
        return self._page("New product", html.form("/products", "Add", *_product_fields("", CATEGORIES[0], 0, 0)))

    def add_product(self, asked: Asked) -> Html:
        self._unused("products", "name", asked.words("name"), 0)
        self._write("insert into products(name, category, cents, stock) values (?,?,?,?)", *_product_of(asked))
        raise Goto("/products")

    def product(self, asked: Asked) -> Html:
        name, *rest = self._one("select name, category, cents, stock from products where id = ?", asked.id)
        delete = html.form(f"/products/{asked.id}/delete", "Delete", html.box("Yes, delete this product", "sure"))
        return self._page(name, html.form(f"/products/{asked.id}", "Save", *_product_fields(name, *rest)), delete)

    def save_product(self, asked: Asked) -> Html:
        self._unused("products", "name", asked.words("name"), asked.id)
        statement = "update products set name = ?, category = ?, cents = ?, stock = ? where id = ?"
        self._write(statement, *_product_of(asked), asked.id)
        raise Goto(f"/products/{asked.id}")

    def delete_product(self, asked: Asked) -> Html:
        if not asked.form.get("sure"):
            raise Refused("Tick the box to delete a product.")
        self._write("delete from products where id = ?", asked.id)
        raise Goto("/products")

    def orders(self, asked: Asked) -> Html:
        status = asked.form.get("status", "all")
        rows = self._all(
            "select o.id, c.name, o.status from orders o join customers c on c.id = o.customer "
            "where ? = 'all' or o.status = ? order by o.id", status, status,
        )  # fmt: skip
        narrow = html.form("/orders", "Show", html.choice("Status", "status", ("all", *STATUSES), status), method="get")
        shown = [(link(f"/orders/{number}", f"Order {number}"), name, status) for number, name, status in rows]
        return self._page("Orders", narrow, self._listed("/orders", asked, ("Order", "Customer", "Status"), shown))

    def order(self, asked: Asked) -> Html:
        customer, name, status, note = self._one(
            "select c.id, c.name, o.status, o.note from orders o join customers c on c.id = o.customer where o.id = ?",
            asked.id,
        )
        rows = self._all(
            "select coalesce(p.name, 'gone'), l.quantity from lines l left join products p on p.id = l.product "
            'where l."order" = ? order by l.id', asked.id,
        )  # fmt: skip
        fields = html.radios("Status", "status", STATUSES, status), html.area("Note", "note", note)
        edit = html.form(f"/orders/{asked.id}", "Save", *fields)
        owner = tag("p", "Customer: ", link(f"/customers/{customer}", name))
        return self._page(f"Order {asked.id}", owner, html.table(("Product", "Quantity"), rows), edit)

    def save_order(self, asked: Asked) -> Html:
        note = asked.form.get("note", "").strip().replace("\r\n", "\n")
        status = asked.one_of("status", STATUSES)
        self._write("update orders set status = ?, note = ? where id = ?", status, note, asked.id)
        raise Goto(f"/orders/{asked.id}")

    def customers(self, asked: Asked) -> Html:
        words = asked.form.get("search", "")
        rows = self._all(
            "select id, name, city from customers where instr(lower(name), lower(?)) order by name", words
        )  # fmt: skip
        search = html.form("/customers", "Find", html.field("Search", "search", words), method="get")
        shown = [(link(f"/customers/{number}", name), city) for number, name, city in rows]
        return self._page("Customers", search, self._listed("/customers", asked, ("Customer", "City"), shown))

    def customer(self, asked: Asked) -> Html:
        name, email, city = self._one("select name, email, city from customers where id = ?", asked.id)
        edit = html.form(
            f"/customers/{asked.id}", "Save",
            html.field("Name", "name", name), html.field("Email", "email", email), html.field("City", "city", city),
        )  # fmt: skip
        orders = self._all("select id from orders where customer = ? order by id", asked.id)
        listed = tag("ul", *(tag("li", link(f"/orders/{number}", f"Order {number}")) for (number,) in orders))
        return self._page(name, edit, listed, link(f"/customers/{asked.id}/order", "New order"))

    def save_customer(self, asked: Asked) -> Html:
        self._unused("customers", "name", asked.words("name"), asked.id)
        fields = asked.words("name"), asked.words("email"), asked.words("city")
        self._write("update customers set name = ?, email = ?, city = ? where id = ?", *fields, asked.id)
        raise Goto(f"/customers/{asked.id}")

    def new_order(self, asked: Asked) -> Html:
        (name,) = self._one("select name from customers where id = ?", asked.id)
        products = ["-", *(each for (each,) in self._all("select name from products order by name"))]
        rows = (
            (html.choice(f"Product {n}", f"product{n}", products, "-"), html.field(f"Quantity {n}", f"quantity{n}", 1))
            for n in (1, 2, 3)
        )
        fields = (html.join(row) for row in rows)
        return self._page(f"New order for {name}", html.form(f"/customers/{asked.id}/order", "Place order", *fields))

    def place_order(self, asked: Asked) -> Html:
        known = {name: number for number, name in self._all("select id, name from products")}
        chosen = [n for n in (1, 2, 3) if asked.form.get(f"product{n}", "-") != "-"]
        lines = [(known[asked.one_of(f"product{n}", [*known])], asked.number(f"quantity{n}", 1, 99)) for n in chosen]
        if not lines:
            raise Refused("Choose at least one product.")
        self._one("select name from customers where id = ?", asked.id)
        self._write("insert into orders(customer, status, note) values (?, 'new', '')", asked.id)
        (number,) = self._one("select max(id) from orders")
        for line in lines:
            self._write('insert into lines("order", product, quantity) values (?,?,?)', number, *line)
        raise Goto(f"/orders/{number}")

    def tickets(self, asked: Asked) -> Html:
        rows = self._all(
            "select t.id, c.name, t.subject, t.state, t.agent from tickets t join customers c on c.id = t.customer "
            "order by t.id"
        )
        shown = [(link(f"/tickets/{number}", f"Ticket {number}"), *rest) for number, *rest in rows]
        heads = ("Ticket", "Customer", "Subject", "State", "Agent")
        return self._page("Tickets", self._listed("/tickets", asked, heads, shown))

    def ticket(self, asked: Asked) -> Html:
        name, subject, state, priority, agent = self._one(
            "select c.name, t.subject, t.state, t.priority, t.agent from tickets t "
            "join customers c on c.id = t.customer where t.id = ?", asked.id,
        )  # fmt: skip
        edit = html.form(
            f"/tickets/{asked.id}", "Save", html.choice("State", "state", STATES, state),
            html.radios("Priority", "priority", PRIORITIES, priority), html.choice("Agent", "agent", AGENTS, agent),
        )  # fmt: skip
        said = self._all("select text from replies where ticket = ? order by id", asked.id)
        replies = tag("ul", *(tag("li", each) for (each,) in said))
        answer = html.form(f"/tickets/{asked.id}/reply", "Send reply", html.area("Reply", "text"))
        return self._page(f"Ticket {asked.id}: {subject}", tag("p", f"From {name}"), edit, replies, answer)

    def save_ticket(self, asked: Asked) -> Html:
        fields = asked.one_of("state", STATES), asked.one_of("priority", PRIORITIES), asked.one_of("agent", AGENTS)
        self._write("update tickets set state = ?, priority = ?, agent = ? where id = ?", *fields, asked.id)
        raise Goto(f"/tickets/{asked.id}")

    def reply(self, asked: Asked) -> Html:
        self._one("select id from tickets where id = ?", asked.id)
        self._write("insert into replies(ticket, text) values (?, ?)", asked.id, asked.words("text"))
        raise Goto(f"/tickets/{asked.id}")

    def board(self, asked: Asked) -> Html:
        columns = []
        for state in STATES:
            rows = self._all("select id, subject from tickets where state = ? order by id", state)
            cards = (
                tag("div", f"{number} {subject}", class_="card", draggable="true", role="listitem",
                    aria_label=f"Ticket {number}", data_ticket=number)
                for number, subject in rows
            )  # fmt: skip
            columns.append(tag("div", tag("h2", state), *cards, class_="column", role="list", aria_label=state,
                               data_state=state))  # fmt: skip
        hidden = (html.void("input", type="hidden", name=name) for name in ("ticket", "state"))
        move = tag("form", *hidden, name="move", method="post", action="/board")
        return self._page(
            "Board", tag("p", "Drag a ticket to where it belongs."), *columns, move, tag("script", Html(_DRAG))
        )

    def move(self, asked: Asked) -> Html:
        state, number = asked.one_of("state", STATES), asked.number("ticket", 1, 10**6)
        self._write("update tickets set state = ? where id = ?", state, number)
        raise Goto("/board")

    def coupons(self, asked: Asked) -> Html:
        rows = self._all("select code, percent, category, once from coupons order by id")
        shown = [(code, f"{percent} %", group, "yes" if once else "no") for code, percent, group, once in rows]
        create = html.form(
            "/coupons", "Create", html.field("Code", "code"), html.field("Percent", "percent"),
            html.choice("Category", "category", CATEGORIES, CATEGORIES[0]), html.box("Only once per customer", "once"),
        )  # fmt: skip
        return self._page("Coupons", html.table(("Code", "Percent", "Category", "Once"), shown), create)

    def add_coupon(self, asked: Asked) -> Html:
        code, percent = asked.words("code"), asked.number("percent", 1, 90)
        self._unused("coupons", "code", code, 0)
        once = int(bool(asked.form.get("once")))
        statement = "insert into coupons(code, percent, category, once) values (?,?,?,?)"
        self._write(statement, code, percent, asked.one_of("category", CATEGORIES), once)
        raise Goto("/coupons")

    def settings(self, asked: Asked) -> Html:
        if asked.cookie != self._session:
            fields = html.field("User name", "user"), html.field("Password", "password", kind="password")
            return self._page("Log in", html.form("/login", "Log in", *fields))
        held = dict(self._all("select name, value from settings"))
        fields = (
            html.field("Notice", "notice", held["notice"]),
            html.choice("Closed on", "day", DAYS, held["closed_on"]),
        )
        return self._page("Settings", html.form("/settings", "Save", *fields))

    def log_in(self, asked: Asked) -> Html:
        if (asked.form.get("user"), asked.form.get("password")) != LOGIN:
            raise Refused("User name or password is wrong.")
        raise Goto("/settings", f"session={self._session}; Path=/; HttpOnly")

    def save_settings(self, asked: Asked) -> Html:
        if asked.cookie != self._session:
            raise Refused("Log in first.")
        day, notice = asked.one_of("day", DAYS), asked.form.get("notice", "").strip()
        self._write("update settings set value = ? where name = 'notice'", notice)
        self._write("update settings set value = ? where name = 'closed_on'", day)
        raise Goto("/settings")

    # -- what pages are made with --------------------------------------------------------------------------------------

    def _page(self, title: str, *parts: object) -> Html:
        nav = tag("nav", *(link(f"/{name}", name.capitalize()) for name in NAV))
        head = tag("head", html.void("meta", charset="utf-8"), tag("title", title), tag("style", Html(STYLE)))
        body = tag("body", nav, tag("h1", title), *parts)
        return html.join([Html("<!doctype html>"), tag("html", head, body, lang="en")])

    def _missing(self) -> Html:
        raise Refused("There is no such page.")

    def _listed(self, path: str, asked: Asked, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
        """A table, a page of it at a time."""
        at = int(asked.form["page"]) if re.fullmatch(r"\d{1,4}", asked.form.get("page", "")) else 1
        shown = rows[(at - 1) * PAGE_ROWS : at * PAGE_ROWS]
        others = [(at - 1, "Previous page")] if at > 1 else []
        others += [(at + 1, "Next page")] if at * PAGE_ROWS < len(rows) else []
        turns = (link(f"{path}?{urlencode({**asked.form, 'page': page})}", label) for page, label in others)
        return html.join([html.table(heads, shown), tag("p", f"{len(rows)} in all "), *turns])

    def _all(self, query: str, *parameters: object) -> list[Any]:
        return self.base.execute(query, parameters).fetchall()

    def _one(self, query: str, *parameters: object) -> Any:
        """The row. Raises Refused if there is none."""
        row = self.base.execute(query, parameters).fetchone()
        if row is None:
            raise Refused("There is no such page.")
        return row

    def _write(self, statement: str, *parameters: object) -> None:
        if self.base.execute(statement, parameters).rowcount < 1:
            raise Refused("There is nothing like that any more.")

    def _unused(self, table: str, column: str, value: str, except_id: int) -> None:
        if self._all(f"select 1 from {table} where {column} = ? and id <> ?", value, except_id):
            raise Refused(f"{value} is there already.")


def money(cents: int) -> str:
    return f"{cents // 100}.{cents % 100:02d}"


def _product_fields(name: str, category: str, cents: int, stock: int) -> tuple[Html, ...]:
    return (
        html.field("Name", "name", name), html.choice("Category", "category", CATEGORIES, category),
        html.field("Price", "price", money(cents)), html.field("Stock", "stock", stock),
    )  # fmt: skip


def _product_of(asked: Asked) -> tuple[str, str, int, int]:
    price = re.fullmatch(r"(\d{1,6})(?:\.(\d{1,2}))?", asked.form.get("price", "").strip())
    if price is None:
        raise Refused("Price must be a number such as 12.50.")
    cents = int(price[1]) * 100 + int((price[2] or "0").ljust(2, "0"))
    return asked.words("name"), asked.one_of("category", CATEGORIES), cents, asked.number("stock", 0, 9999)


ROUTES: Mapping[str, Callable[[Shop, Asked], Html]] = {
    "get /": Shop.home,
    "get /products": Shop.products,
    "post /products": Shop.add_product,
    "get /products/new": Shop.new_product,
    "get /products/N": Shop.product,
    "post /products/N": Shop.save_product,
    "post /products/N/delete": Shop.delete_product,
    "get /orders": Shop.orders,
    "get /orders/N": Shop.order,
    "post /orders/N": Shop.save_order,
    "get /customers": Shop.customers,
    "get /customers/N": Shop.customer,
    "post /customers/N": Shop.save_customer,
    "get /customers/N/order": Shop.new_order,
    "post /customers/N/order": Shop.place_order,
    "get /tickets": Shop.tickets,
    "get /tickets/N": Shop.ticket,
    "post /tickets/N": Shop.save_ticket,
    "post /tickets/N/reply": Shop.reply,
    "get /board": Shop.board,
    "post /board": Shop.move,
    "get /coupons": Shop.coupons,
    "post /coupons": Shop.add_coupon,
    "get /settings": Shop.settings,
    "post /settings": Shop.save_settings,
    "post /login": Shop.log_in,
}
