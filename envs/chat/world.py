"""The problems that simulated users bring, and whether a reply solves them.

Knows small word problems with one number as their answer. Ignores styles, users and models. Names, number
combinations and wordings are split by hash: a held-out problem has names and numbers that no training problem has.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "heldout"]

NAMES = """Mia Tom Ana Ben Eva Leo Nia Sam Zoe Max Ida Kai Lea Jon Amy Raj Uma Finn Nora Omar Ruth Paul Lina Hugo Vera
Carl Dana Erik Gina Hana Ivan Jade Kira Luca Mara Nils Olga Pia Rosa Sven Tara Yuki Zara Alan Bella Cora Dino Elsa
Felix Greta Henry Irene Jonas Karla Lotte Marco Nadia Oscar Petra Robin Sofia Theo Wanda Anton Boris Clara Doris Emil
Frida Gustav Holly Isaac Julia Klaus Laura Milan Naomi Otto Paula Quinn Rufus Silke Tilda Viktor Wilma""".split()
ITEMS = """apples pears plums books cards coins shells pens stamps eggs beads nuts rocks toys cups hats keys lamps
maps bells kites roses tulips cakes pies rolls figs limes melons lemons peaches buttons marbles ribbons stickers
crayons candles cookies tickets pencils""".split()
PLACES = """shop store barn garden school market kitchen office library cellar harbour station""".split()
BOXES = "boxes bags jars trays baskets packs rows shelves drawers".split()

GAINS = ("buys {b} more", "gets {b} more", "finds {b} more", "picks {b} more", "is given {b} more")
LOSSES = ("gives away {b}", "loses {b}", "sells {b}", "uses {b}", "eats {b}")
LOSSES_AFTER = ("gives away {c}", "loses {c}", "sells {c}", "uses {c}")
GAINS_AFTER = ("buys {c} more", "gets {c} more", "finds {c} more")
HAS = ("{n} has {a} {item}", "{n} owns {a} {item}", "{n} brings {a} {item}", "{n} starts with {a} {item}")
HOW_MANY = (
    "How many {item} does {n} have now?",
    "How many {item} are there in the end?",
    "What is the number of {item} now?",
    "How many {item} is that?",
    "Tell me how many {item} {n} has then.",
)
GROUPS = ("{n} has {a} {box} with {b} {item} each", "{n} fills {a} {box} with {b} {item} each")
COMPARE = ("{n} has {a} {item} and {m} has {b}", "{n} owns {a} {item}, {m} owns {b}")
WHO_MORE = (
    "Who has more, and by how many?",
    "Who has more {item}, and how many more?",
    "Who is ahead and by how much?",
)
LOOKUP = ("In the {place} there are {list}", "The {place} list says: {list}", "{n} counted {list}")
WHICH = ("How many {item} are there?", "What is the number of {item}?", "How many {item} is that?")


def bucket(text: str) -> Literal["train", "heldout"]:
    """A fifth of all strings is held out, whatever the seed."""
    return "heldout" if zlib.crc32(text.encode()) % 5 == 0 else "train"


TRAIN_NAMES = [name for name in NAMES if bucket(name) == "train"]
HELDOUT_NAMES = [name for name in NAMES if bucket(name) == "heldout"]


@dataclass(frozen=True, slots=True)
class Problem:
    """A question and all that a reply may say about it."""

    kind: str
    wording: str  # the question before names, things and numbers were filled in
    question: str
    equations: tuple[str, ...]  # the working, "12 + 7 = 19"; of a look-up, the line looked up
    labels: tuple[str, ...]  # one word per equation
    answer: str  # a short noun phrase with the number, "19 apples"; of a comparison with the winner
    sentence: str  # the answer as a clause, "Mia has 19 apples"
    number: int
    winner: str | None
    check: str  # the last step taken backwards, "19 - 7 = 12"
    numbers: tuple[int, ...]  # the given ones

    @property
    def key(self) -> str:
        """What the split looks at beside the names."""
        return f"{self.kind} {self.numbers}"

    def read(self, reply: str) -> Solution:
        """What a reply got right."""
        return check(self, reply)


@dataclass(frozen=True, slots=True)
class Solution:
    """What a reply got right."""

    correct: bool  # the answer stated last is the right one (and, in a comparison, the right winner is named)
    shows_work: bool  # the reply holds the last step of the working, and no false equation


class Question(Protocol):
    """What a user needs of a problem, wherever it is from."""

    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...
    def read(self, reply: str) -> Solution: ...


def make_problem(rng: random.Random, split: Split = "train", kind: str | None = None) -> Problem:
    """A problem of the split, drawn from `rng`; `kind` restricts it to one of KINDS."""
    names = TRAIN_NAMES if split == "train" else HELDOUT_NAMES
    maker = _MAKERS[kind or rng.choice(KINDS)]
    while True:
        problem = maker(rng, rng.sample(names, 2))
        if bucket(problem.key) == split and (split == "heldout" or bucket(problem.wording) == "train"):
            return problem


def make_problems(count: int, split: Split, seed: int) -> list[Problem]:
    """`count` different problems of the split, the same for the same seed."""
    rng = random.Random(f"{split} {seed}")
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = make_problem(rng, split)
        found.setdefault(problem.question, problem)
    return list(found.values())


def check(problem: Problem, reply: str) -> Solution:
    """Read a reply of any style: the last number before a closing check line is the stated answer."""
    body = body_of(reply)
    numbers = re.findall(r"\d+", body)
    correct = bool(numbers) and int(numbers[-1]) == problem.number
    if problem.winner and correct:
        named = re.findall(r"[A-Z][a-z]+", _last_statement(body))
        correct = problem.winner in named
    shown = _squeeze(problem.equations[-1]) in _squeeze(body)
    return Solution(correct, shown and all(_holds(found) for found in _EQUATION.finditer(body)))


def body_of(reply: str) -> str:
    """The reply without markup and without a closing check line."""
    plain = re.sub(r"\*\*|\\boxed|[{}#`]", "", reply)
    return re.split(r"\bCheck\b", plain)[0].strip()


def _gain(rng: random.Random, names: list[str]) -> Problem:
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    story = f"{rng.choice(HAS)} and {rng.choice(GAINS)}. {rng.choice(HOW_MANY)}"
    return _count("gain", rng, names, story, (a, b), [("Add", a, "+", b, a + b)])


def _loss(rng: random.Random, names: list[str]) -> Problem:
    a = rng.randint(5, 60)
    b = rng.randint(2, a - 2)
    story = f"{rng.choice(HAS)} and {rng.choice(LOSSES)}. {rng.choice(HOW_MANY)}"
    return _count("loss", rng, names, story, (a, b), [("Subtract", a, "-", b, a - b)])


def _groups(rng: random.Random, names: list[str]) -> Problem:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    story = f"{rng.choice(GROUPS)}. {rng.choice(HOW_MANY)}"
    return _count("groups", rng, names, story, (a, b), [("Multiply", a, "x", b, a * b)])


def _gain_loss(rng: random.Random, names: list[str]) -> Problem:
    a, b = rng.randint(2, 40), rng.randint(2, 30)
    c = rng.randint(2, min(30, a + b - 1))
    story = f"{rng.choice(HAS)}, {rng.choice(GAINS)} and then {rng.choice(LOSSES_AFTER)}. {rng.choice(HOW_MANY)}"
    steps = [("Add", a, "+", b, a + b), ("Subtract", a + b, "-", c, a + b - c)]
    return _count("gain_loss", rng, names, story, (a, b, c), steps)


def _groups_gain(rng: random.Random, names: list[str]) -> Problem:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 18)
    story = f"{rng.choice(GROUPS)} and {rng.choice(GAINS_AFTER)}. {rng.choice(HOW_MANY)}"
    steps = [("Multiply", a, "x", b, a * b), ("Add", a * b, "+", c, a * b + c)]
    return _count("groups_gain", rng, names, story, (a, b, c), steps)


def _compare(rng: random.Random, names: list[str]) -> Problem:
    a, b = rng.sample(range(2, 60), 2)
    n, m = names
    item = rng.choice(ITEMS)
    story = f"{rng.choice(COMPARE)}. {rng.choice(WHO_MORE)}"
    high, low, winner = (a, b, n) if a > b else (b, a, m)
    gap = high - low
    return Problem(
        kind="compare",
        wording=story,
        question=story.format(n=n, m=m, a=a, b=b, item=item),
        equations=(f"{high} - {low} = {gap}",),
        labels=("Compare",),
        answer=f"{winner}, {gap} more",
        sentence=f"{winner} has {gap} more",
        number=gap,
        winner=winner,
        check=f"{gap} + {low} = {high}",
        numbers=(a, b),
    )


def _lookup(rng: random.Random, names: list[str]) -> Problem:
    items = rng.sample(ITEMS, 3)
    counts = rng.sample(range(2, 60), 3)
    listing = ", ".join(f"{count} {item}" for count, item in zip(counts, items, strict=True))
    at = rng.randrange(3)
    item, count = items[at], counts[at]
    story = f"{rng.choice(LOOKUP)}. {rng.choice(WHICH)}"
    return Problem(
        kind="lookup",
        wording=story,
        question=story.format(place=rng.choice(PLACES), n=names[0], list=listing, item=item),
        equations=(f"{item} = {count}",),
        labels=("Look up",),
        answer=f"{count} {item}",
        sentence=f"there are {count} {item}",
        number=count,
        winner=None,
        check=f"{count} is next to {item}",
        numbers=tuple(counts),
    )


_MAKERS = {
    "gain": _gain,
    "loss": _loss,
    "groups": _groups,
    "gain_loss": _gain_loss,
    "groups_gain": _groups_gain,
    "compare": _compare,
    "lookup": _lookup,
}
KINDS = tuple(_MAKERS)

_INVERSE = {"+": "-", "-": "+", "x": "/"}
_EQUATION = re.compile(r"(\d+) ([+x-]) (\d+) = (\d+)")


def _count(
    kind: str,
    rng: random.Random,
    names: list[str],
    story: str,
    numbers: tuple[int, ...],
    steps: list[tuple[str, int, str, int, int]],
) -> Problem:
    """A problem about one person's things; each step is (label, left, operator, right, result)."""
    n, item = names[0], rng.choice(ITEMS)
    values = dict(zip("abc", numbers, strict=False))
    _, left, sign, right, result = steps[-1]
    return Problem(
        kind=kind,
        wording=story,
        question=story.format(n=n, item=item, box=rng.choice(BOXES), **values),
        equations=tuple(f"{x} {op} {y} = {z}" for _, x, op, y, z in steps),
        labels=tuple(step[0] for step in steps),
        answer=f"{result} {item}",
        sentence=f"{n} has {result} {item}",
        number=result,
        winner=None,
        check=f"{result} {_INVERSE[sign]} {right} = {left}",
        numbers=numbers,
    )


def _holds(equation: re.Match[str]) -> bool:
    left, sign, right, result = equation.groups()
    x, y = int(left), int(right)
    return {"+": x + y, "-": x - y, "x": x * y}[sign] == int(result)


def _last_statement(body: str) -> str:
    """What follows the last equation in the last line with a number: where a comparison names its winner."""
    lines = [line for line in body.splitlines() if re.search(r"\d", line)]
    return lines[-1].split("=")[-1] if lines else ""


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)
