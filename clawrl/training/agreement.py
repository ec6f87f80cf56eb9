"""Does a batch say of replies what held-out people said of replies like them? Pure numpy.

Knows replies' tokens, the scores of held-out ones and the advantages a batch would be trained with. Ignores models and
gradients: a batch whose signs are turned round shows itself here before its step is seen to do anything, since
AdamW's momentum carries on what earlier batches taught.

    held-out replies, scores ─► ridge on token counts ─► guesses of the batch's replies ─► correlation with advantages
                                        └► guesses of each held-out one from the others: can it guess at all?

Where it cannot (too few turns, or nothing in the words tells approved from refused replies) the check is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clawrl.training.bootstrap import interval, picks
from clawrl.types import GateCheck

RIDGE = 1.0
"""Of the mean squared length of a centred reply: strong, for there are more kinds of tokens than replies."""
TINY = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class ValuedReply:
    """A reply's tokens and what was thought of it: a score in -1, 0, 1, or an advantage."""

    token_ids: np.ndarray  # i32[S]
    value: float


def agreement(
    held_out: Sequence[ValuedReply], batch: Sequence[ValuedReply], *, min_turns: int, confidence: float
) -> GateCheck | None:
    """Correlation of the batch's advantages with what held-out scores let one expect of its replies.

    Fails where even the upper bound of its bootstrap over the batch is negative. None if fewer than `min_turns`
    held-out replies were approved or refused, or are in the batch, or if the guesses of held-out scores, each from the
    others alone, are not beyond their noise better than none.
    """
    values = np.array([reply.value for reply in held_out])
    if min((values > 0).sum(), (values < 0).sum(), len(batch)) < min_turns:
        return None
    features = _features([reply.token_ids for reply in (*held_out, *batch)])
    others, guesses = _guesses(features[: len(held_out)], values, features[len(held_out) :])
    if _correlation(others, values, confidence)[1] <= 0:
        return None
    value, low, high = _correlation(guesses, np.array([reply.value for reply in batch]), confidence)
    return GateCheck("agreement", value, low, high, "its upper bound not below 0", high >= 0)


def _features(replies: Sequence[np.ndarray]) -> np.ndarray:
    """f64[N, V]: log(1 + count) of each of the V tokens that occur, every row of length 1."""
    rows = np.repeat(np.arange(len(replies)), [len(ids) for ids in replies])
    tokens, columns = np.unique(np.concatenate(replies), return_inverse=True)
    counts = np.zeros((len(replies), len(tokens)))
    np.add.at(counts, (rows, columns), 1)
    scaled = np.log1p(counts)
    return scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), TINY)


def _guesses(known: np.ndarray, values: np.ndarray, unknown: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression: of each known row from the others, and of the unknown rows from all; up to a constant.

    Leaving one out has a closed form: with H = K (K + λ)⁻¹ the residual without it is the residual / (1 - H_ii).
    """
    centre = known.mean(0)
    known, unknown, residual = known - centre, unknown - centre, values - values.mean()
    kernel = known @ known.T
    penalty = max(RIDGE * float(np.trace(kernel)) / len(kernel), TINY)
    inverse = np.linalg.inv(kernel + penalty * np.eye(len(kernel)))
    left_out = values - (inverse @ residual) / np.diag(inverse)
    return left_out, unknown @ known.T @ inverse @ residual


def _correlation(first: np.ndarray, second: np.ndarray, confidence: float) -> tuple[float, float, float]:
    """Pearson's r and its bootstrap bounds; 0 where one of the two does not vary."""
    chosen = picks(len(first))
    low, high = interval(_pearson(first[chosen], second[chosen]), confidence)
    return float(_pearson(first[None], second[None])[0]), low, high


def _pearson(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """f64[R] of the rows of f64[R, N] arrays."""
    first, second = (each - each.mean(1, keepdims=True) for each in (first, second))
    spread = np.sqrt(np.square(first).mean(1) * np.square(second).mean(1))
    return np.where(spread > TINY, (first * second).mean(1) / np.maximum(spread, TINY), 0)
