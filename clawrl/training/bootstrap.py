"""The gate's bootstrap: the same resamples each time, so that a decision can be made again. Pure numpy."""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
SEED = 0


def picks(number: int, group: int = 0) -> np.ndarray:
    """i64[RESAMPLES, number]: indexes of `number` things, drawn anew. Groups are drawn independently of one another."""
    return np.random.default_rng((SEED, number, group)).integers(0, number, (RESAMPLES, number))


def interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Bounds that each hold with `confidence`."""
    low, high = np.quantile(values, (1 - confidence, confidence))
    return float(low), float(high)
