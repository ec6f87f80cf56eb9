"""Questions with answers that can be verified: reasoning-gym, integer problems of our own, a file of yours.

    source and seed ─► question, answer          source, seed, what was said ─► score in [0, 1] (`verifying`, elsewhere)

Pure but for the file. A question is the same for the same source and seed; its text decides its split.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from clawrl.errors import EnvError
from clawrl.rollout.env import Split, Task, draw, split_of

INTEGERS = "integers"
GYM = (
    "base_conversion bitwise_arithmetic calendar_arithmetic count_primes cryptarithm gsm_symbolic jugs knights_knaves "
    "largest_island letter_counting mini_sudoku number_filtering prime_factorization rotten_oranges shortest_path "
    "simple_equations time_intervals"
).split()
DATASETS = (INTEGERS, *GYM)
EVALUATED = frozenset(
    "binary_matrix countdown intermediate_integration n_queens polynomial_multiplication puzzle24 simple_integration "
    "spiral_matrix string_insertion".split()
)
"""Data sets whose score_answer runs the answer as Python: whoever answers would write his own score."""
NEEDS_PYCOSAT = frozenset(["zebra_puzzles"])
MAX_ATTEMPTS = 500


@dataclass(frozen=True, slots=True)
class Problem(Task):
    """`seed` is a line's number where `source` is a file. `answer` is None where a data set gives none."""

    source: str
    seed: int
    question: str
    answer: str | None


@cache
def gym() -> Any:
    """reasoning_gym. pycosat, C without wheels, is imported by it for one data set: that one alone needs it.

    Raises EnvError where it is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise EnvError("reasoning-gym is not installed, and its tasks are asked for; pip install 'clawrl[tools]'")
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = ModuleType("pycosat")
        try:
            return importlib.import_module("reasoning_gym")
        finally:
            del sys.modules["pycosat"]
    return importlib.import_module("reasoning_gym")


def check_sources(sources: Sequence[str]) -> None:
    """Raises EnvError for a data set that there is not, or whose verdict the answer itself could write."""
    if not sources:
        raise EnvError(f"python: no datasets are named; use some of {', '.join(DATASETS)}, or problems=FILE")
    for name in sources:
        if name in EVALUATED:
            raise EnvError(
                f"python: dataset {name!r} is refused: reasoning-gym scores it by running the answer as Python"
            )
        if name in NEEDS_PYCOSAT and importlib.util.find_spec("pycosat") is None:
            raise EnvError(f"python: dataset {name!r} needs pycosat; pip install pycosat")
        if name != INTEGERS and name not in gym().factory.DATASETS:
            known = sorted({INTEGERS, *gym().factory.DATASETS} - EVALUATED)
            raise EnvError(f"python: there is no dataset {name!r}; use some of {', '.join(known)}")


def entry_of(source: str, seed: int) -> tuple[Any, dict[str, Any]]:
    """(the data set, its one entry) of reasoning-gym."""
    dataset = gym().create_dataset(source, seed=seed, size=1)
    return dataset, dataset[0]


def make_problem(sources: Sequence[str], number: int, split: Split) -> Problem:
    """Problem `number`, of the sources in turn. Raises EnvError for a source with too few questions for two splits."""
    source = sources[number % len(sources)]
    for attempt in range(MAX_ATTEMPTS):
        seed = int(draw(number, attempt).integers(2**31))
        if source == INTEGERS:
            question, answer = _integers(seed)
        else:
            entry = entry_of(source, seed)[1]
            question, answer = entry["question"], entry["answer"]
        found = Problem(_id(source, question), source, seed, question, None if answer is None else str(answer))
        if split_of(found.id) == split:
            return found
    raise EnvError(f"python: dataset {source!r} has no question in split {split}; leave it out")


def _id(source: str, question: str) -> str:
    return f"python/{source}/{hashlib.sha256(question.encode()).hexdigest()[:16]}"


def read_problems(file: Path) -> list[Problem]:
    """Lines of {"question": "…", "answer": "42"}; math-verify compares answers. Raises EnvError with the line."""
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EnvError(f"python: problems={str(file)!r} cannot be read: {error}") from None
    for number, line in enumerate(lines):
        try:
            given = json.loads(line)
            question, answer = str(given["question"]), str(given["answer"])
        except (ValueError, KeyError, TypeError):
            raise EnvError(f'python: {file}, line {number + 1} is not {{"question": "…", "answer": "…"}}') from None
        found.append(Problem(_id("problems", question), "problems", number, question, answer))
    return found


# -- integer problems of our own --------------------------------------------------------------------------------------


def _integers(seed: int) -> tuple[str, str]:
    rng = np.random.default_rng(seed)
    kind = KINDS[int(rng.integers(len(KINDS)))]
    return kind(lambda low, high: int(rng.integers(low, high + 1)))


Pick = Callable[[int, int], int]
"""A whole number from low to high, both included."""


def _digits(pick: Pick) -> tuple[str, str]:
    base, power = pick(2, 99), pick(20, 200)
    return f"What is the sum of the decimal digits of {base}^{power}?", str(sum(map(int, str(base**power))))


def _remainder(pick: Pick) -> tuple[str, str]:
    base, power, modulus = pick(2, 999), pick(100, 10_000), pick(11, 9999)
    return f"What is the remainder when {base}^{power} is divided by {modulus}?", str(pow(base, power, modulus))


def _multiples(pick: Pick) -> tuple[str, str]:
    top, a, b, c = pick(200, 20_000), pick(3, 12), pick(13, 25), pick(2, 9)
    count = sum((n % a == 0 or n % b == 0) and n % c != 0 for n in range(1, top + 1))
    return f"How many whole numbers from 1 to {top} are divisible by {a} or by {b}, but not by {c}?", str(count)


def _congruence(pick: Pick) -> tuple[str, str]:
    a, b, above = pick(11, 60), pick(61, 130), pick(100, 50_000)
    n = above + pick(1, a * b // gcd(a, b))
    first = next(m for m in range(above + 1, n + 1) if m % a == n % a and m % b == n % b)
    asked = f"leaves remainder {n % a} when divided by {a}, and remainder {n % b} when divided by {b}"
    return f"Which is the smallest whole number above {above} that {asked}?", str(first)


def _coins(pick: Pick) -> tuple[str, str]:
    coins, total = sorted({pick(2, 9), pick(10, 19), pick(20, 60)}), pick(60, 400)
    ways = [1] + [0] * total
    for coin in coins:
        for amount in range(coin, total + 1):
            ways[amount] += ways[amount - coin]
    named = ", ".join(map(str, coins[:-1])) + f" and {coins[-1]}"
    return f"In how many ways can {total} cents be paid with coins of {named} cents, in any numbers?", str(ways[total])


def _pipes(pick: Pick) -> tuple[str, str]:
    a, b, c = pick(2, 12), pick(2, 12), pick(30, 60)
    above, below = a * b * c, b * c + a * c - a * b
    common = gcd(above, below)
    return (
        f"One pipe fills a tank in {a} hours, another in {b} hours, and a leak empties the full tank in {c} hours. "
        "How many hours does it take to fill the empty tank with all three open? Answer with an exact fraction.",
        f"{above // common}/{below // common}",
    )


def _savings(pick: Pick) -> tuple[str, str]:
    first, more, target = pick(1, 20), pick(1, 9), pick(500, 50_000)
    day, total = 0, 0
    while total <= target:
        total += first + more * day
        day += 1
    return (
        f"Somebody saves {first} euros on the first day, and every day {more} euros more than on the day before. "
        f"On which day do the savings first exceed {target} euros?",
        str(day),
    )


KINDS = (_digits, _remainder, _multiples, _congruence, _coins, _pipes, _savings)
