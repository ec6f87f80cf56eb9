"""Rows of names and numbers as text."""

from tally.spans import format_span


def render(rows, totals=False, unit=None):
    """One line a row, names to the left, values to the right; `totals` adds a last line, unit="span" writes spans."""
    rows = list(rows)
    if totals and rows:
        rows.append(("total", sum(value for _, value in rows)))
    shown = [(name, format_span(value) if unit == "span" else str(value)) for name, value in rows]
    if not shown:
        return ""
    left = max(len(name) for name, _ in shown)
    right = max(len(value) for _, value in shown)
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in shown)
