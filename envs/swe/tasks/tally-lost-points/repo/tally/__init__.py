"""Small sums over time: spans, intervals, tables."""

from tally.intervals import gaps, merge, total
from tally.spans import format_span, parse_span
from tally.tables import render

__all__ = ["format_span", "gaps", "merge", "parse_span", "render", "total"]
