"""What a benchmark found: figures with goals, as a table and as JSON, and the arithmetic behind them. Pure.

Ignores what is measured and how. Times are seconds since the epoch, so that processes of one machine agree on them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True, slots=True)
class Stream:
    """One reply as its reader saw it arrive."""

    started: float
    arrivals: tuple[float, ...]  # of each chunk
    first: float  # arrival of the first token
    ended: float
    num_tokens: int
    error: str | None = None  # why the reply is not whole


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value. A goal is a lower or an upper bound, or there is none."""

    name: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.at_least is not None:
            return self.value >= self.at_least
        return None if self.at_most is None else self.value <= self.at_most

    @property
    def goal(self) -> str:
        if self.at_least is not None:
            return f">= {_number(self.at_least)}"
        return "" if self.at_most is None else f"<= {_number(self.at_most)}"


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of pairs measured next to each other, so that a drift of the machine cancels out."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def spread(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile of the ratios of pairs."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    if len(ratios) < 2:
        return ratios[0], ratios[0]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, high


def throughput(streams: Sequence[Stream]) -> float:
    """Tokens/s of streams that ran together, from the first request to the last byte."""
    seconds = max(stream.ended for stream in streams) - min(stream.started for stream in streams)
    return sum(stream.num_tokens for stream in streams) / seconds


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def longest_gap(streams: Iterable[Stream], start: float, end: float) -> float:
    """Longest time between two chunks of one stream that touches [start, end]; 0 if no stream was running."""
    gaps = (
        after - before
        for stream in streams
        for before, after in pairwise(stream.arrivals)
        if after >= start and before <= end
    )
    return max(gaps, default=0.0)


def table(figures: Sequence[Figure]) -> str:
    """Columns name, value, unit, goal and whether it is met."""
    words = {None: "", True: "met", False: "MISSED"}
    rows = [(each.name, _number(each.value), each.unit, each.goal, words[each.met]) for each in figures]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = (
        [row[0].ljust(widths[0]), row[1].rjust(widths[1]), *(row[c].ljust(widths[c]) for c in (2, 3, 4))]
        for row in rows
    )
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def as_json(figures: Sequence[Figure]) -> dict[str, Any]:
    return {figure.name: {**asdict(figure), "met": figure.met} for figure in figures}


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return str(int(value))
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
