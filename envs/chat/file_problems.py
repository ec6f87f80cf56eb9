"""Problems from a file, as GSM8K has them: a JSON object a line with `question` and `answer`, which ends in `#### 72`.

Knows how to read a number and arithmetic out of what any model writes. Ignores users, styles and models.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from envs.chat.world import Solution, Split, body_of, bucket

NEAR = Fraction(1, 100)
"""A result that is rounded is no false one."""

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_SIGNS = (("×", "*"), ("·", "*"), ("\\times", "*"), ("\\cdot", "*"), ("÷", "/"), ("\\div", "/"), ("−", "-"), ("–", "-"))
_UNIT = re.compile(r"(?<=\d)\s*%?\s+[A-Za-z]{2,}(?:\s+[A-Za-z]{2,})?(?=\s*[-+*/=])")
_EQUATION = re.compile(r"([\d(][\d\s.+\-*/()]*[\d)])\s*=\s*(-?\d+(?:\.\d+)?)")
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass(frozen=True, slots=True)
class FileProblem:
    """A question with one number as its answer."""

    question: str
    number: Fraction
    answer: str  # the number as the file has it

    def read(self, reply: str) -> Solution:
        """Right if its boxed number, else its last one, is the answer; the working is shown if it holds arithmetic
        that is true, and none that is false."""
        boxed = _BOXED.findall(reply)
        stated = _NUMBER.findall(boxed[-1] if boxed else body_of(reply))
        truths = [*equations(body_of(reply))]
        return Solution(bool(stated) and _value(stated[-1]) == self.number, bool(truths) and all(truths))


def read_problems(file: Path, split: Split) -> list[FileProblem]:
    """The file's problems of a split: a fifth of all questions is held out, by a hash of the text.

    Raises ValueError, with the line, for a file that has another form or nothing for the split.
    """
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
                question, last = str(row["question"]), row["answer"].rpartition("####")[2].strip()
                problem = FileProblem(question, _value(last), last)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f'{file}:{number}: not {{"question": …, "answer": "… #### NUMBER"}}') from error
            if bucket(question) == split:
                found.append(problem)
    if not found:
        raise ValueError(f"{file}: no problem falls into the split {split}; it needs more lines")
    return found


def equations(text: str) -> list[bool]:
    """Whether each `3 + 4 = 7` in the text is true."""
    for written, sign in _SIGNS:
        text = text.replace(written, sign)
    text = re.sub(r"^\s*\d+[.)]\s+", "", text, flags=re.MULTILINE)  # numbers of lists
    text = re.sub(r"(?<=\d),(?=\d{3})|[$€£]", "", text)
    text = _UNIT.sub("", re.sub(r"(?<=[\d)])\s*x\s*(?=[\d(])", " * ", text))
    found = []
    for left, right in _EQUATION.findall(text):
        value = _evaluated(left)
        if value is not None:
            found.append(abs(value - Fraction(right)) <= NEAR)
    return found


def _evaluated(expression: str) -> Fraction | None:
    """The value of arithmetic with at least one operator; None for anything else."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        return _of(tree) if isinstance(tree, ast.BinOp) else None
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _of(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_of(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_of(node.left), _of(node.right))
    raise ValueError(f"{ast.dump(node)} is no arithmetic")


def _value(text: str) -> Fraction:
    return Fraction(text.replace(",", "").removeprefix("$"))
