"""Pieces of HTML. Strings are escaped unless they are Html."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Markup that stands as it is."""


def text(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. class_ is class and data_x is data-x; what is True stands alone, what is None or False not at all."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>{''.join(map(text, children))}</{name}>")


def join(parts: Iterable[object]) -> Html:
    return Html("".join(map(text, parts)))


def void(name: str, /, **attributes: object) -> Html:
    """An element without an end."""
    return Html(tag(name, **attributes).removesuffix(f"</{name}>"))


def field(label: str, name: str, value: object = "", kind: str = "text", **attributes: object) -> Html:
    return tag("label", label, " ", void("input", type=kind, name=name, value=value, autocomplete="off", **attributes))


def area(label: str, name: str, value: object = "") -> Html:
    return tag("label", label, " ", tag("textarea", value, name=name, rows=3))


def choice(label: str, name: str, options: Sequence[str], chosen: str) -> Html:
    """A combobox."""
    return tag("label", label, " ", tag("select", *(option(each, chosen) for each in options), name=name))


def option(value: str, chosen: str) -> Html:
    return tag("option", value, selected=value == chosen)


def radios(legend: str, name: str, options: Sequence[str], chosen: str) -> Html:
    buttons = (
        tag("label", void("input", type="radio", name=name, value=each, checked=each == chosen), " ", each)
        for each in options
    )
    return tag("fieldset", tag("legend", legend), *buttons)


def box(label: str, name: str) -> Html:
    return tag("label", void("input", type="checkbox", name=name, value="1"), " ", label)


def form(action: str, button: str, *fields: object, method: str = "post") -> Html:
    return tag("form", *(tag("div", each) for each in fields), tag("button", button), method=method, action=action)


def link(to: str, label: object) -> Html:
    return tag("a", label, href=to)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("table", tag("thead", tag("tr", *(tag("th", head) for head in heads))), tag("tbody", *body))
