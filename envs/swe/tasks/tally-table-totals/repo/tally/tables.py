"""Rows of names and numbers as text."""


def render(rows):
    """One line a row, names to the left, values to the right."""
    shown = [(name, str(value)) for name, value in rows]
    if not shown:
        return ""
    left = max(len(name) for name, _ in shown)
    right = max(len(value) for _, value in shown)
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in shown)
