"""Packing: samples into rows without padding, spread evenly over ranks. Pure numpy.

Knows samples and token budgets. Ignores models and losses. Every rank makes the same plan from the same batch, so
nothing needs to be agreed on.

    samples ──► bins (world × n rows, each at most `pack_tokens` long where samples allow) ──► rank r's n rows

A row is several sequences laid end to end; `bounds` says where each begins, `position_ids` restart there. Only the
positions that predict a trained token are scored: the row lists them, so that no logits are made for prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from clawrl.types import Sample

Normalisation = Literal["sample", "token", "constant"]


@dataclass(frozen=True, slots=True, eq=False)
class PackedRow:
    """One forward pass of one rank: T tokens of several sequences, S of whose successors are trained."""

    token_ids: np.ndarray  # i64[T]
    position_ids: np.ndarray  # i64[T]
    bounds: tuple[int, ...]  # 0, ..., T: sequence i is tokens [bounds[i], bounds[i+1])
    segments: np.ndarray  # i64[S]: the sequence that each scored position belongs to
    positions: np.ndarray  # i64[S]: the position whose output predicts the target
    targets: np.ndarray  # i64[S]: token_ids[positions + 1]
    behaviour_logprobs: np.ndarray  # f32[S]
    advantages: np.ndarray  # f32[S]; 0 where there is no policy-gradient term
    reference_logprobs: np.ndarray  # f32[S]; 0 where has_reference is false
    has_reference: np.ndarray  # bool[S]
    fresh: np.ndarray  # bool[S]: sampled under the weights the step starts from
    weights: np.ndarray  # f32[S]; sums to 1 over the rows of all ranks, unless normalised by a constant
    support: np.ndarray  # i64[S, k + K]: tokens of the distillation target, then those that the teacher named
    support_behaviour_logprobs: np.ndarray  # f32[S, k]
    support_advantages: np.ndarray  # f32[S, k]
    support_valid: np.ndarray  # bool[S, k]
    teacher_logprobs: np.ndarray  # f32[S, K], -inf where no token was named
    teacher_weights: np.ndarray  # f32[S]; 0 where there is no divergence from a teacher


def pack(
    samples: Sequence[Sample],
    *,
    world: int,
    pack_tokens: int,
    normalise: Normalisation = "sample",
    normalise_length: int = 1,
    version: int | None = None,
) -> list[list[PackedRow]]:
    """Rows of each rank, [world][n]: every rank gets the same number n, so that collectives meet.

    `version` is the one the step starts from: tokens sampled under it alone are `fresh`. A rank without samples gets
    rows of weight zero. Raises ValueError if a sample is not `trainable`.
    """
    if not samples:
        raise ValueError("pack got no sample; an empty batch has nothing to train on")
    weights = _token_weights(samples, normalise, normalise_length)
    widths = (
        max((sample.distillation.support.shape[1] for sample in samples if sample.distillation), default=0),
        max((sample.teacher_top.ids.shape[1] for sample in samples if sample.teacher_top), default=0),
    )
    return [
        [_row([samples[i] for i in chosen], [weights[i] for i in chosen], widths, version) for chosen in rows]
        for rows in assign(samples, world=world, pack_tokens=pack_tokens)
    ]


def assign(samples: Sequence[Sample], *, world: int, pack_tokens: int) -> list[list[list[int]]]:
    """Indexes of the samples in every row of each rank, [world][n]; a rank may have rows without any."""
    bins = balance([len(sample.token_ids) for sample in samples], world=world, capacity=pack_tokens)
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    for start in range(0, len(bins), world):
        # Rows come heaviest first; turning round at every pass keeps the ranks' totals close.
        order = range(world) if (start // world) % 2 == 0 else reversed(range(world))
        for offset, rank in enumerate(order):
            ranks[rank].append(bins[start + offset])
    return ranks


def row_to_score(samples: Sequence[Sample]) -> PackedRow:
    """A row whose scored positions are those of `samples`, in their order, for a forward pass without a loss."""
    bare = [replace(sample, distillation=None, teacher_top=None) for sample in samples]
    return _row(bare, [1.0] * len(bare), (0, 0), None)


def balance(lengths: Sequence[int], *, world: int, capacity: int) -> list[list[int]]:
    """Indexes of sequences in each of `world`·n bins, heaviest bin first, for the smallest n that fits.

    Longest sequence first, each into the emptiest bin. One longer than `capacity` gets a bin to itself.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    num_rows = max(1, -(-sum(lengths) // (world * capacity)))
    while True:
        loads = [0] * (world * num_rows)
        bins: list[list[int]] = [[] for _ in loads]
        for i in order:
            emptiest = min(range(len(loads)), key=loads.__getitem__)
            bins[emptiest].append(i)
            loads[emptiest] += lengths[i]
        if all(load <= capacity or len(chosen) == 1 for load, chosen in zip(loads, bins, strict=True)):
            by_load = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
            return [sorted(bins[b]) for b in by_load]
        num_rows += 1


def trainable(sample: Sample) -> bool:
    """Whether every number the loss would read is finite, some token has a predecessor, and the weight is positive.

    One bad number would spoil the gradient of the whole batch; the trainer leaves such a sample out and counts it.
    """
    scored = scored_positions(sample)
    arrays = [sample.logprobs, sample.advantages, sample.reference_logprobs]
    numbers = [array[scored + 1] for array in arrays if array is not None]
    if target := sample.distillation:
        valid = target.valid[scored + 1]
        numbers += [array[scored + 1][valid] for array in (target.behaviour_logprobs, target.advantages)]
    if top := sample.teacher_top:
        weights = top.weights[scored + 1]
        numbers += [weights, np.exp(top.logprobs[scored + 1][weights > 0])]  # -inf is as good as a number here
    finite = all(bool(np.isfinite(array).all()) for array in numbers)
    return len(scored) > 0 and finite and bool(np.isfinite(sample.weight)) and sample.weight > 0


def scored_positions(sample: Sample) -> np.ndarray:
    """i64[S]: positions whose successor is trained. The first token of a sequence has no predecessor to predict it."""
    return np.flatnonzero(sample.loss_mask[1:])


def _token_weights(samples: Sequence[Sample], normalise: Normalisation, constant: int) -> list[float]:
    """Weight of each token of each sample, so that the weighted sum over the whole batch is a mean.

    `sample`: mean over a sample's tokens, then weighted mean over samples (GRPO, arXiv:2402.03300, eq. 3). `token`:
    weighted mean over all tokens (DAPO, arXiv:2503.14476, eq. 8). `constant`: sum over a sample's tokens divided by
    the same length for all, then weighted mean over samples (Dr. GRPO, arXiv:2503.20783): no reply is favoured for
    being short or long.
    """
    lengths = [len(scored_positions(sample)) for sample in samples]
    if normalise == "constant":
        lengths = [constant if length else 0 for length in lengths]
    if normalise == "token":
        total = sum(sample.weight * length for sample, length in zip(samples, lengths, strict=True))
        weights = [sample.weight / total for sample in samples] if total > 0 else []
    else:
        total = sum(sample.weight for sample in samples)
        weights = (
            [sample.weight / (total * length) for sample, length in zip(samples, lengths, strict=True) if length]
            if total > 0
            else []
        )
    if len(weights) != len(samples):
        raise ValueError("a sample has no weight or no trained token; leave out those that are not trainable()")
    return weights


def _row(
    samples: Sequence[Sample], weights: Sequence[float], widths: tuple[int, int], version: int | None
) -> PackedRow:
    """Lay `samples` end to end; none at all gives the row of weight zero that keeps a rank in step.

    `widths` are k and K, those of the widest sample of the batch.
    """
    if not samples:
        return _idle_row(widths)
    bounds = np.concatenate([[0], np.cumsum([len(sample.token_ids) for sample in samples])])
    scored = [scored_positions(sample) for sample in samples]

    def gather(arrays: Sequence[np.ndarray | None], dtype: type = np.float32) -> np.ndarray:
        columns = [
            np.zeros(len(at), dtype) if array is None else array[at + 1]
            for array, at in zip(arrays, scored, strict=True)
        ]
        return np.concatenate(columns).astype(dtype)

    def each(values: Sequence[object], dtype: type) -> np.ndarray:
        return np.repeat(np.array(values, dtype), [len(at) for at in scored])

    token_ids = np.concatenate([sample.token_ids for sample in samples]).astype(np.int64)
    positions = np.concatenate([at + start for at, start in zip(scored, bounds[:-1], strict=True)]).astype(np.int64)
    support = [_support(sample, at, widths[0]) for sample, at in zip(samples, scored, strict=True)]
    named = [_named(sample, at, widths[1]) for sample, at in zip(samples, scored, strict=True)]
    return PackedRow(
        token_ids=token_ids,
        position_ids=np.concatenate([np.arange(len(sample.token_ids)) for sample in samples]),
        bounds=tuple(int(bound) for bound in bounds),
        segments=each(list(range(len(samples))), np.int64),
        positions=positions,
        targets=token_ids[positions + 1],
        behaviour_logprobs=gather([sample.logprobs for sample in samples]),
        advantages=gather([sample.advantages for sample in samples]),
        reference_logprobs=gather([sample.reference_logprobs for sample in samples]),
        has_reference=each([sample.reference_logprobs is not None for sample in samples], np.bool_),
        fresh=each([sample.oldest_version == sample.newest_version == version for sample in samples], np.bool_),
        weights=each(weights, np.float32),
        support=np.concatenate(
            [np.concatenate([own[0], named[0]], axis=1) for own, named in zip(support, named, strict=True)]
        ),
        support_behaviour_logprobs=np.concatenate([part[1] for part in support]),
        support_advantages=np.concatenate([part[2] for part in support]),
        support_valid=np.concatenate([part[3] for part in support]),
        teacher_logprobs=np.concatenate([part[1] for part in named]),
        teacher_weights=np.concatenate([part[2] for part in named]),
    )


def _support(sample: Sample, scored: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A sample's distillation target at its scored positions, widened to [S, width] with invalid entries."""
    shape = (len(scored), width)
    ids, logprobs, advantages = np.zeros(shape, np.int64), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    valid = np.zeros(shape, np.bool_)
    if target := sample.distillation:
        own = target.support.shape[1]
        valid[:, :own] = target.valid[scored + 1]
        ids[:, :own] = target.support[scored + 1]
        logprobs[:, :own] = np.where(valid[:, :own], target.behaviour_logprobs[scored + 1], 0)
        advantages[:, :own] = np.where(valid[:, :own], target.advantages[scored + 1], 0)
    return ids, logprobs, advantages, valid


def _named(sample: Sample, scored: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sample's teacher at its scored positions: tokens and log-probabilities, widened to [S, width], and weights."""
    shape = (len(scored), width)
    ids, logprobs = np.zeros(shape, np.int64), np.full(shape, -np.inf, np.float32)
    weights = np.zeros(len(scored), np.float32)
    if top := sample.teacher_top:
        own = top.ids.shape[1]
        ids[:, :own], logprobs[:, :own] = top.ids[scored + 1], top.logprobs[scored + 1]
        weights[:] = top.weights[scored + 1]
    return ids, logprobs, weights


def _idle_row(widths: tuple[int, int]) -> PackedRow:
    """Two tokens, one of them scored with weight zero: enough for every collective of a step to happen."""
    one, none = np.zeros(1, np.float32), np.zeros(1, np.bool_)
    (k, named), none_named = widths, np.full((1, widths[1]), -np.inf, np.float32)
    flat, invalid = np.zeros((1, k), np.float32), np.zeros((1, k), np.bool_)
    return PackedRow(
        token_ids=np.zeros(2, np.int64), position_ids=np.arange(2), bounds=(0, 2), segments=np.zeros(1, np.int64),
        positions=np.zeros(1, np.int64), targets=np.zeros(1, np.int64),
        behaviour_logprobs=one, advantages=one, reference_logprobs=one, has_reference=none, fresh=none, weights=one,
        support=np.zeros((1, k + named), np.int64), support_behaviour_logprobs=flat, support_advantages=flat,
        support_valid=invalid, teacher_logprobs=none_named, teacher_weights=one,
    )  # fmt: skip
