"""The learner: one rank's share of model and optimizer, and what can be done with them.

Knows packed rows, the loss and FSDP2 shards. Ignores Ray, the buffer and versions' states. Every method is a
collective: all ranks call it with the same arguments, or all wait.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from clawrl.algorithms.losses import TALLIED, Targets, tallied_means, tally, total_loss
from clawrl.config import LearningSection, LoraSection, TrainerSection
from clawrl.errors import WeightSyncError
from clawrl.training.adapter import public_name
from clawrl.training.model import RESHARD_ABOVE_PARAMETERS, TokenScorer, shard
from clawrl.training.pack import PackedRow, assign, pack, row_to_score, scored_positions, trainable
from clawrl.types import EMA, Bucket, Canary, Sample

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ReplyScores:
    """A model's log-probabilities at the trained tokens of one sample."""

    logprobs: np.ndarray  # f64[S], of the tokens themselves
    stops: np.ndarray | None  # f64[S], of ending the reply there instead


_LOSSES = ("loss", "loss_rl", "loss_opd", "loss_kl")


class Learner:
    """Model and AdamW of one rank. `mesh` is one-dimensional; a mesh of one rank needs no other process.

    With `lora` the weights spoken of below are the adapter's; the model's own stay as they are.
    """

    def __init__(
        self,
        folder: str,
        settings: TrainerSection,
        learning: LearningSection,
        mesh: DeviceMesh,
        lora: LoraSection | None = None,
    ) -> None:
        self._settings, self._learning, self._mesh = settings, learning, mesh
        self._dtype = getattr(torch, settings.dtype)
        on_gpu = mesh.device_type == "cuda"
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        scorer = TokenScorer.load(
            folder,
            logit_chunk=settings.logit_chunk,
            activation_checkpointing=settings.activation_checkpointing,
            lora=lora,
            frozen_dtype=self._dtype,
        )
        self._scorer: Any = shard(scorer, mesh, self._dtype)
        named = {public_name(name): each for name, each in self._scorer.model.named_parameters()}
        self._sync_once = sum(each.numel() for each in named.values()) <= RESHARD_ABOVE_PARAMETERS
        self._parameters = {name: each for name, each in named.items() if each.requires_grad}
        adapter = {} if lora is None else self._parameters
        self._initial = {name: _local(each).detach().clone() for name, each in adapter.items()}
        averages = learning.teacher == "ema" and learning.method != "rl"
        self._average = {name: each.detach().clone() for name, each in adapter.items()} if averages else {}
        self._anchor: dict[str, Tensor] = {}  # this rank's rows of the weights that a step may be held near to
        self._pull = 0.0 if lora is None else settings.learning_rate * lora.anchor
        self.reset_optimizer()

    @property
    def world(self) -> int:
        return self._mesh.size()

    @property
    def rank(self) -> int:
        return self._mesh.get_rank()

    def reset_optimizer(self) -> None:
        """AdamW without memory of earlier steps; weight decay on matrices only, not on norms and biases."""
        matrices = [parameter for parameter in self._parameters.values() if parameter.ndim >= 2]
        others = [parameter for parameter in self._parameters.values() if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self._settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self._settings.learning_rate,
            betas=self._settings.betas,
            fused=True,
        )

    def state(self) -> dict[str, Tensor]:
        """What a version's tensors do not say: moments and step counts and, if they are narrower, the master weights.

        The tensors are the learner's own: whoever writes into them changes it.
        """
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            own = self._optimizer.state[parameter]
            if not own:  # as AdamW would make them at the first step
                own["step"] = torch.zeros((), device=self._device)
                own |= {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            found |= {f"{name}/{key}": value for key, value in own.items()}
            if self._dtype != torch.float32:
                found[f"{name}/weight"] = parameter.detach()
        if self._dtype != torch.float32:
            found |= {f"{name}/average": average for name, average in self._average.items()}
        return found

    def update(self, samples: Sequence[Sample], version: int, *, anchored: bool = False) -> dict[str, float]:
        """One optimizer step on a batch, starting from `version`; returns the step's metrics, equal on all ranks.

        `anchored`, the weights are then pulled towards `anchor`'s, w <- w - lr λ (w - anchor): a personal model near
        the global one (Ditto, arXiv:2012.04221, eq. 1), decoupled from the gradient as AdamW's weight decay is.

        Samples with a number that is not finite are left out and counted (`samples_unusable`). If the loss or the
        gradient still is not finite, nothing is changed and `skipped` is 1: the step is over all the same. A step
        is a function of weights and batch, so trying again would fail again; the batch must be consumed or it would
        come back for ever.
        """
        started = time.perf_counter()
        usable = [sample for sample in samples if trainable(sample)]
        for sample in samples:
            if not trainable(sample):
                logger.warning("event=sample_unusable sample=%s version=%d", sample.id, version)
        metrics = _batch_metrics(usable) | {"samples_unusable": float(len(samples) - len(usable))}
        metrics["skipped"] = 1.0
        if usable:
            rows = pack(
                usable,
                world=self.world,
                pack_tokens=self._settings.pack_tokens,
                normalise=self._learning.normalise,
                normalise_length=self._learning.normalise_length,
                version=version,
            )[self.rank]
            metrics |= self._step(rows, self._pull if anchored else 0.0)
        metrics["seconds"] = time.perf_counter() - started
        metrics["tokens_per_s"] = metrics["tokens"] / metrics["seconds"]
        return metrics

    def canary(self, sequences: Sequence[np.ndarray]) -> Canary:
        """Score every token after the first of each sequence with the weights as they are."""
        lengths = [len(ids) for ids in sequences]
        bounds = [0, *np.cumsum(lengths).tolist()]
        token_ids = np.concatenate(sequences).astype(np.int64)
        positions = np.concatenate([np.arange(a, b - 1) for a, b in pairwise(bounds)])
        self._scorer.eval()
        with torch.no_grad():
            scored = self._scorer(
                self._tensor(token_ids),
                self._tensor(np.concatenate([np.arange(length) for length in lengths])),
                bounds,
                self._tensor(positions),
                self._tensor(token_ids[positions + 1]),
                torch.empty(len(positions), 0, dtype=torch.int64, device=self._device),
            )
        self._scorer.train()
        self._reshard()
        logprobs = scored.logprobs.float().cpu().numpy()
        ends = np.cumsum([length - 1 for length in lengths])[:-1]
        return Canary(tuple(ids.astype(np.int32) for ids in sequences), tuple(np.split(logprobs, ends)))

    @torch.no_grad()
    def score(self, samples: Sequence[Sample], stop_id: int | None, max_seconds: float) -> list[ReplyScores]:
        """What the weights as they are say of each sample's reply; the ranks share the work.

        Beyond `max_seconds` (to the precision of one pass of all ranks) the samples left are not scored: the answer
        is as long as the first ones that were.
        """
        started = time.perf_counter()
        found: list[ReplyScores] = []
        self._scorer.eval()
        while len(found) < len(samples):
            chunk = _within(samples[len(found) :], self.world * self._settings.pack_tokens)
            scores, elapsed_s = self._score_chunk(chunk, stop_id, started)
            found += scores
            if elapsed_s > max_seconds:
                break
        self._scorer.train()
        self._reshard()
        return found

    def finite(self) -> bool:
        """Whether every weight is a finite number."""
        bad = [(~local.isfinite()).sum().double() for local in map(_local, self._parameters.values())]
        total = torch.stack(bad).sum()
        dist.all_reduce(total, group=self._mesh.get_group())
        return total.item() == 0

    def weight_norm(self) -> float:
        """The length of all weights taken as one vector."""
        total = _square_sum([_local(parameter) for parameter in self._parameters.values()])
        dist.all_reduce(total, group=self._mesh.get_group())
        return total.sqrt().item()

    @torch.no_grad()
    def buckets(self, bucket_bytes: int) -> Iterator[Bucket | None]:
        """The whole model in the compute type, bucket by bucket; bucket i only on rank i % world, None elsewhere.

        With its moving average, where it has one.
        """
        for index, names in enumerate(self._plan(bucket_bytes)):
            yield self._gather(names, owner=index % self.world)

    @torch.no_grad()
    def load(self, buckets: Iterable[Bucket]) -> None:
        """Replace the weights, each rank keeping its rows, and forget the optimizer's moments.

        No buckets at all are an adapter's version 0. A moving average that the version lacks begins with it. Raises
        WeightSyncError if a parameter is missing. Heads tied to the embeddings are passed over.
        """
        weights = {name: _local(parameter) for name, parameter in self._parameters.items()}
        averages = {EMA + name: _local(average) for name, average in self._average.items()}
        for name in self._read(buckets, weights | averages) & averages.keys():
            averages[name].copy_(weights[name.removeprefix(EMA)])
        self._reshard()
        self.reset_optimizer()

    @torch.no_grad()
    def anchor(self, buckets: Iterable[Bucket]) -> None:
        """Take these weights, as `load` would, for those that anchored steps are held near to."""
        if not self._anchor:
            self._anchor = {name: torch.empty_like(_local(each)) for name, each in self._parameters.items()}
        self._read(buckets, self._anchor)

    # --- inside ---

    def _read(self, buckets: Iterable[Bucket], into: dict[str, Tensor]) -> set[str]:
        """Copy this rank's rows of a version; returns what it lacks. Raises WeightSyncError if that is a parameter."""
        for name, local in into.items() if self._initial else ():
            local.copy_(self._initial[name.removeprefix(EMA)])
        missing, anything = set(into), not self._initial
        for bucket in buckets:
            anything = True
            for name, dtype, array in zip(bucket.names, bucket.dtypes, bucket.arrays, strict=True):
                if name in missing:
                    local, whole = into[name], _as_tensor(array, dtype)
                    rows = -(-whole.shape[0] // self.world)
                    local.copy_(whole[self.rank * rows : self.rank * rows + local.shape[0]])
                    missing.remove(name)
        lost = {name for name in missing if not name.startswith(EMA)}
        if lost and anything:
            raise WeightSyncError(f"the version lacks {len(lost)} parameters, {min(lost)} among them")
        return missing

    def _score_chunk(
        self, samples: Sequence[Sample], stop_id: int | None, started: float
    ) -> tuple[list[ReplyScores], float]:
        """Scores of a few samples, and the ranks' mean time since `started`: each fills in its rows, all add up."""
        lengths = [len(scored_positions(sample)) for sample in samples]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        table = torch.zeros(2 * int(starts[-1]) + 1, dtype=torch.float64, device=self._device)
        logprobs, stops = table[: starts[-1]], table[starts[-1] : -1]
        for chosen in assign(samples, world=self.world, pack_tokens=self._settings.pack_tokens)[self.rank]:
            row = row_to_score([samples[i] for i in chosen])
            stop = np.full((len(row.positions), int(stop_id is not None)), stop_id or 0)
            scored = self._scorer(
                self._tensor(row.token_ids), self._tensor(row.position_ids), row.bounds,
                self._tensor(row.positions), self._tensor(row.targets), self._tensor(stop),
            )  # fmt: skip
            if chosen:
                at = self._tensor(np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen]))
                logprobs[at] = scored.logprobs.double()
                if stop_id is not None:
                    stops[at] = scored.support[:, 0].double()
        table[-1] = (time.perf_counter() - started) / self.world
        dist.all_reduce(table, group=self._mesh.get_group())
        columns = table[:-1].view(2, -1).cpu().numpy()
        return [
            ReplyScores(logprobs, stops if stop_id is not None else None)
            for logprobs, stops in zip(*(np.split(column, starts[1:-1]) for column in columns), strict=True)
        ], table[-1].item()

    def _step(self, rows: Sequence[PackedRow], pull: float) -> dict[str, float]:
        sums = torch.zeros(len(_LOSSES), dtype=torch.float64, device=self._device)
        counts = torch.zeros(len(TALLIED), 2, dtype=torch.float64, device=self._device)
        self._optimizer.zero_grad(set_to_none=True)
        for index, row in enumerate(rows):
            if self._sync_once:
                self._scorer.set_requires_gradient_sync(index == len(rows) - 1)
            targets = self._targets(row)
            scored = self._scorer(
                self._tensor(row.token_ids),
                self._tensor(row.position_ids),
                row.bounds,
                self._tensor(row.positions),
                self._tensor(row.targets),
                self._tensor(row.support),
            )
            loss = total_loss(scored.logprobs, scored.support, targets, self._learning)
            # FSDP averages over ranks; the weights already divide by the whole batch.
            (loss.value * self.world).backward()
            parts = (loss.value, loss.policy.value, loss.distillation.value, loss.divergence)
            sums += torch.stack([part.detach().double() for part in parts])
            counts += tally(scored.logprobs.detach(), scored.entropy, loss, targets)
        return self._apply(sums, counts, pull)

    def _apply(self, sums: Tensor, counts: Tensor, pull: float) -> dict[str, float]:
        """Clip the gradient and step, unless something is not finite; agreed over ranks in one reduction."""
        locals_ = [_local(parameter) for parameter in self._parameters.values() if parameter.grad is not None]
        gradients = [_local(p.grad) for p in self._parameters.values() if p.grad is not None]
        totals = torch.cat([sums, counts.flatten(), _square_sum(gradients)])
        dist.all_reduce(totals, group=self._mesh.get_group())
        norm = totals[-1].sqrt().item()
        metrics = dict(zip(_LOSSES, totals[: len(_LOSSES)].tolist(), strict=True))
        metrics |= tallied_means(totals[len(_LOSSES) : -1].view(-1, 2)) | {"grad_norm": norm}
        if not all(np.isfinite([norm, metrics["loss"]])):
            logger.error("event=step_skipped loss=%s grad_norm=%s", metrics["loss"], norm)
            self._optimizer.zero_grad(set_to_none=True)
            return {name: value for name, value in metrics.items() if np.isfinite(value)} | {"skipped": 1.0}
        scale = min(1.0, self._settings.max_grad_norm / (norm + 1e-6))
        for gradient in gradients:
            gradient.mul_(scale)
        before = [local.detach().clone() for local in locals_]
        self._optimizer.step()
        if pull:
            for name, anchor in self._anchor.items():
                _local(self._parameters[name]).detach().lerp_(anchor, min(1.0, pull))
        for name, average in self._average.items():
            _local(average).lerp_(_local(self._parameters[name]).detach(), 1 - self._learning.ema_decay)
        self._optimizer.zero_grad(set_to_none=True)
        change = _square_sum([after.detach() - old for after, old in zip(locals_, before, strict=True)])
        dist.all_reduce(change, group=self._mesh.get_group())
        return metrics | {"update_norm": change.sqrt().item(), "skipped": 0.0}

    def _targets(self, row: PackedRow) -> Targets:
        return Targets(**{name: self._tensor(getattr(row, name)) for name in Targets.__slots__})

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device, non_blocking=True)

    def _plan(self, bucket_bytes: int) -> Iterator[list[str]]:
        """Names of parameters, in order, in groups of at most `bucket_bytes`; a larger one goes alone."""
        names: list[str] = []
        size = 0
        for name, (_, shape) in self._published().items():
            nbytes = shape.numel() * self._dtype.itemsize
            if names and size + nbytes > bucket_bytes:
                yield names
                names, size = [], 0
            names.append(name)
            size += nbytes
        yield names

    def _published(self) -> dict[str, tuple[Tensor, torch.Size]]:
        """This rank's rows of all tensors of a version, and their whole shapes."""
        averages = {EMA + name: average for name, average in self._average.items()}
        return {name: (_local(each), each.shape) for name, each in (self._parameters | averages).items()}

    def _gather(self, names: Sequence[str], owner: int) -> Bucket | None:
        """Collect parameters' shards on `owner` in one collective.

        FSDP2 gives rank r rows [r·c, (r+1)·c) with c = ceil(rows / world), so the last shards may be short or empty;
        padded to c they all have the same size.
        """
        published = self._published()
        tensors = [published[name] for name in names]
        flat = torch.cat([_padded(local, shape, self.world).to(self._dtype).flatten() for local, shape in tensors])
        parts = [flat]
        if self.world > 1:
            mine = [torch.empty_like(flat) for _ in range(self.world)] if self.rank == owner else None
            dist.gather(flat, mine, dst=owner, group=self._mesh.get_group())
            if mine is None:
                return None
            parts = mine
        arrays: list[np.ndarray] = []
        start = 0
        for _, shape in tensors:
            size = _padded_rows(shape, self.world) * shape[1:].numel()
            rows = torch.cat([part[start : start + size].view(-1, *shape[1:]) for part in parts])
            arrays.append(_as_array(rows[: shape[0]]))
            start += size
        name = str(self._dtype).removeprefix("torch.")
        shapes = tuple(tuple(shape) for _, shape in tensors)
        return Bucket(tuple(names), (name,) * len(names), shapes, tuple(arrays))

    def _reshard(self) -> None:
        """Drop gathered parameters, so that the next forward pass gathers the shards as they are now."""
        for module in self._scorer.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _within(samples: Sequence[Sample], tokens: int) -> Sequence[Sample]:
    """As many of the first samples as have at most `tokens` tokens together; one at least."""
    totals = np.cumsum([len(sample.token_ids) for sample in samples])
    return samples[: max(1, int(np.searchsorted(totals, tokens, side="right")))]


def _batch_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    metrics = {"samples": float(len(samples)), "tokens": float(sum(len(sample.token_ids) for sample in samples))}
    if samples:
        metrics["reply_tokens_mean"] = float(np.mean([sample.loss_mask.sum() for sample in samples]))
    return metrics


def _local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """f64[1]: the sum of squares of all elements."""
    return torch.stack([tensor.detach().square().sum().double() for tensor in tensors]).sum()[None]


def _padded_rows(shape: torch.Size, world: int) -> int:
    return -(-shape[0] // world)


def _padded(local: Tensor, shape: torch.Size, world: int) -> Tensor:
    short = _padded_rows(shape, world) - local.shape[0]
    return torch.cat([local, local.new_zeros(short, *shape[1:])]) if short else local


def _as_array(tensor: Tensor) -> np.ndarray:
    """numpy twin on the CPU; bfloat16 as its bits."""
    tensor = tensor.contiguous().cpu()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _as_tensor(array: np.ndarray, dtype: str) -> Tensor:
    """The tensor a bucket's array stands for; a copy, since arrays from the object store are read-only."""
    return torch.from_numpy(array.copy()).view(getattr(torch, dtype))
