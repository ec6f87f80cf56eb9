"""Bugs made by small changes of a syntax tree: what swesmith's procedural modifiers do to Python, with `ast` alone.

swesmith itself (0.0.9) is not used: importing its modifiers loads libcst and the tree-sitter grammars of ten languages.

    sources of a file ─► candidates: one change each, the rest of the text as it was

Pure: knows text. Whether a change is a bug that tests notice is for `building` to find out.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not",
    ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip
OPERATORS: dict[type[ast.operator], str] = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "//"}


@dataclass(frozen=True, slots=True)
class Bug:
    """kind: what was done; line: where; text: the whole file with it."""

    kind: str
    line: int
    text: str


def bugs(text: str) -> Iterator[Bug]:
    """Every change within a function of the file, in order. Raises SyntaxError for what is not Python."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def replaced(node: ast.AST, new: str) -> str:
        low = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        high = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return (text.encode()[:low] + new.encode() + text.encode()[high:]).decode()

    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            for kind, node, new in _changes(function):
                changed = replaced(node, new)
                if _is_python(changed):
                    yield Bug(kind, node.lineno, changed)


def chosen(files: dict[str, str], number: int, seed: int) -> list[tuple[str, Bug]]:
    """So many of all changes of all files (name → text), drawn by the seed, no two of one line."""
    found = {(name, bug.line): bug for name, text in sorted(files.items()) for bug in bugs(text)}
    drawn = random.Random(seed).sample(sorted(found), min(number, len(found)))
    return [(name, found[name, line]) for name, line in drawn]


def _changes(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """(kind, what is replaced, by what); functions within have their own turn."""
    for node in _within(function):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and (sign := COMPARISONS.get(type(node.ops[0]))):
            yield "comparison", node, f"({ast.unparse(node.left)} {sign} {ast.unparse(node.comparators[0])})"
        elif isinstance(node, ast.BinOp) and (sign := OPERATORS.get(type(node.op))):
            yield "operator", node, f"({ast.unparse(node.left)} {sign} {ast.unparse(node.right)})"
        elif isinstance(node, ast.BoolOp):
            swapped = ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
            yield "and-or", node, f"({ast.unparse(swapped)})"
        elif isinstance(node, ast.If | ast.While) and not isinstance(node.test, ast.Compare):
            yield "condition", node.test, f"not ({ast.unparse(node.test)})"
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield "constant", node, str(node.value + 1)
        elif isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            yield "dropped", node, "pass"


def _within(function: ast.FunctionDef) -> Iterator[ast.AST]:
    left: list[ast.AST] = list(function.body)
    while left:
        node = left.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.JoinedStr):
            left.extend(ast.iter_child_nodes(node))


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
