"""How far a judge can be believed: its verdicts against what people said themselves. Pure.

Knows votes and labels of +1 and -1. Ignores who judged and where labels come from.

    covered    share of the labelled turns on which it takes a side (neither neutral nor an abstention)
    accuracy   share of those on which it takes the people's side
    ece        expected calibration error (arXiv:1706.04599, eq. 3): |accuracy - mean confidence| of each tenth of
               confidence, weighted by its turns; confidence is the share of its votes that the verdict has
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's view of a turn whose worth is known."""

    score: int | None
    confidence: float  # in [0, 1]
    label: int  # -1 or +1


@dataclass(frozen=True, slots=True)
class Calibration:
    """None where there is nothing to measure it on."""

    approved: int  # labels of +1
    refused: int  # labels of -1
    coverage: float | None
    accuracy: float | None
    ece: float | None


def calibrate(verdicts: Sequence[Verdict]) -> Calibration:
    approved = sum(verdict.label > 0 for verdict in verdicts)
    counts = approved, len(verdicts) - approved
    sided = [verdict for verdict in verdicts if verdict.score]
    if not sided:
        return Calibration(*counts, coverage=0.0 if verdicts else None, accuracy=None, ece=None)
    right = np.array([verdict.score == verdict.label for verdict in sided], float)
    confidence = np.array([verdict.confidence for verdict in sided])
    return Calibration(*counts, len(sided) / len(verdicts), float(right.mean()), _error(confidence, right))


def _error(confidence: np.ndarray, right: np.ndarray) -> float:
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((right[bins == each] - confidence[bins == each]).sum()) for each in np.unique(bins)]
    return float(sum(gaps) / len(right))
