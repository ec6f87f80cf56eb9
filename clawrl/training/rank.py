"""One rank of the trainer: leased batches in, weight versions out, one per optimizer step.

Consumes the buffer's batches; waits for them in short turns; unblocks replicas through the weight store's offer.

    rank 0: store.heads ─► buffer.take(step) ─► broadcast ─┐
    all:                             train │ wait │ close ◄─┘
                                       └► load ► update ► gate ► hold buckets ► canary ► checkpoint ► barrier
    rank 0:                               │           store.offer ► buffer.release ► buffer.advance
                                          └ weights and moments of the batch's policy, where others are held here

A batch is one policy's, everyone's or a user's, and its step goes on from that policy's head. A step's number is the
version it makes; random numbers are seeded by it. Nothing is kept here that a restart would miss: a new group, of any
size, asks the store for heads and the buffer for the same step, and gets the same batch unless that step's version was
recorded. The head is asked for before every step, so a rejected version is left the same way. AdamW's moments are
those of the head (`resume`), or start anew where there are none. A batch whose step could not be taken (see
`Learner.update`) makes a version equal to its parent, with `skipped` = 1 among its metrics: its samples are consumed
once, as always, and can be found by that version.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from clawrl.config import model_path
from clawrl.observe import metric
from clawrl.training.gate import decide
from clawrl.training.inspection import Inspection
from clawrl.training.learner import Learner
from clawrl.training.resume import TrainerCheckpoints
from clawrl.training.trainer import TrainLoop
from clawrl.training.versions import LINE, lag
from clawrl.training.weights import Head
from clawrl.types import GROUP, Batch, Bucket, GateDecision, Sample, WeightVersion

logger = logging.getLogger(__name__)

TAKE_TIMEOUT_S = 2.0
"""How long rank 0 may wait for a batch at a stretch, while the other ranks wait for its broadcast."""

CANARY_TOKENS = 32
CANARY_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Two plus three is five, and five plus four is nine. So the answer is 9.",
    "Dear all, thank you for your help with the report. I will send the rest on Monday.",
    '{"name": "lookup", "arguments": {"item": "apples", "place": "market"}}',
)
"""Fixed and innocent; what they say does not matter, only that every version scores them a little differently."""


class _Order(NamedTuple):
    """What rank 0 tells all ranks to do next."""

    kind: Literal["train", "wait", "close"]
    head: Head  # of the batch's policy
    batch: Batch | None = None
    held_out: Sequence[tuple[Sample, int | None]] = ()  # what the version will be measured on
    anchor: int | None = None  # everyone's version that a user's is held near to


def train_rank(loop: TrainLoop, checkpoint_folder: Path) -> None:
    """One rank, from its start to the buffer's end, inside Ray Train's worker group."""
    settings = loop.trainer
    os.nice(settings.nice)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    device = ray.train.torch.get_device()
    mesh = init_device_mesh(device.type, (ray.train.get_context().get_world_size(),))
    model = model_path(loop.model)
    learner = Learner(model, settings, loop.learning, mesh, loop.lora)
    checkpoints = TrainerCheckpoints(checkpoint_folder, settings.checkpoint_every)
    inspection = Inspection(learner, loop.gate, stop_token(model))
    _Rank(loop, learner, checkpoints, inspection, canary_sequences(model)).run()


def stop_token(model: str) -> int | None:
    """The token that ends a reply, if the model's folder names a single one."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).eos_token_id


def canary_sequences(model: str) -> tuple[np.ndarray, ...]:
    """The fixed texts in the model's own tokens, i32[Lᵢ] with 2 <= Lᵢ <= CANARY_TOKENS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tuple(np.array(tokenizer.encode(text)[:CANARY_TOKENS], np.int32) for text in CANARY_TEXTS)


class _Rank:
    """One rank's loop. Every method but those of rank 0 alone is called by all ranks together."""

    def __init__(
        self,
        loop: TrainLoop,
        learner: Learner,
        checkpoints: TrainerCheckpoints,
        inspection: Inspection,
        canary: tuple[np.ndarray, ...],
    ) -> None:
        self._loop, self._learner, self._checkpoints, self._canary = loop, learner, checkpoints, canary
        self._inspection = inspection
        self._store, self._buffer = loop.store, loop.buffer
        self._holds = (0, GROUP)  # the version of this group's weights, and whose moments; the model's folder at first
        self._anchor: int | None = None  # the version that the learner's anchor is
        self._told: dict[str, int] = {}  # rank 0: the heads that the buffer knows of

    def run(self) -> None:
        anchor = self._learner.canary(self._canary)
        if self._learner.rank == 0:
            ray.get(self._store.anchor.remote(0, anchor))
        while True:
            order = self._agree()
            if order.kind == "close":
                return
            if order.kind == "train" and order.batch is not None:
                self._train(order)

    def _agree(self) -> _Order:
        """Rank 0 decides, all hear it. At most about TAKE_TIMEOUT_S apart, so no collective times out."""
        box = [self._decide() if self._learner.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        order = box[0]
        assert order is not None
        return order

    def _decide(self) -> _Order:
        """Rank 0: tell the buffer of heads that are not those it knows of, then ask it for a batch."""
        heads: dict[str, int] = ray.get(self._store.heads.remote())
        for scope, number in sorted(heads.items(), key=lambda item: item[1]):
            if self._told.get(scope) != number:
                head: Head = ray.get(self._store.latest.remote(scope))
                self._settled(head.number, head.own, scope)
        for scope in self._told.keys() - heads.keys():  # they have everyone's again
            ray.get(self._buffer.advance.remote((), scope))
            del self._told[scope]
        head = ray.get(self._store.latest.remote())
        anchor = head.number
        batch: Batch | None = ray.get(self._buffer.take.remote(head.next_number, TAKE_TIMEOUT_S))
        if batch is None:
            return _Order("wait", head)
        if batch.step < 0:
            return _Order("close", head)
        head = ray.get(self._store.latest.remote(batch.scope))
        if head.next_number != batch.step:  # another has been recorded meanwhile
            return _Order("wait", head)
        gate = self._loop.gate
        held_out = ray.get(self._loop.journal.held_out.remote(gate.size, batch.scope)) if gate.share > 0 else []
        return _Order("train", head, batch, held_out, anchor if self._anchored(batch.scope) else None)

    def _anchored(self, scope: str) -> bool:
        """Whether a policy is held near to everyone's."""
        lora = self._loop.lora
        return lora is not None and lora.policy_scope == "hierarchy" and scope != GROUP and lora.anchor > 0

    def _settled(self, number: int, own: Sequence[int], scope: str) -> None:
        """Rank 0: this is a policy's head; the buffer lets go of the batch that made it, and of what is too old."""
        ray.get([self._buffer.release.remote(number), self._buffer.advance.remote(own, scope)])
        self._told[scope] = number

    def _load(self, head: Head, scope: str) -> None:
        """Take over a head: weights from the store, each rank its rows, and the moments that go with them."""
        logger.info("event=load version=%d rank=%d", head.number, self._learner.rank)
        self._learner.load(_fetched(self._store, head.number))
        if not self._checkpoints.has(head.line, scope):
            return
        if not self._checkpoints.load(head.line, self._learner.state(), scope):
            self._learner.load(_fetched(self._store, head.number))

    def _train(self, order: _Order) -> None:
        """Update, examine, publish, and settle the batch; a version may still be refused, then the head says so."""
        head, batch = order.head, order.batch
        assert batch is not None
        if self._holds != (head.number, batch.scope):
            self._load(head, batch.scope)
        if order.anchor not in (None, self._anchor):
            self._learner.anchor(_fetched(self._store, order.anchor))
            self._anchor = order.anchor
        line = (head.next_number, *head.line)[:LINE]
        _seed(self._loop.trainer.seed, step=head.next_number, rank=self._learner.rank)
        self._inspection.begin(head.number, order.held_out)
        metrics = self._learner.update(batch.samples, head.number, anchored=order.anchor is not None)
        metrics["lag_mean"] = float(np.mean([lag(head.line, sample.newest_version) for sample in batch.samples]))
        self._holds = head.next_number, batch.scope
        decision = self._examined(line, metrics, batch)
        serves = decision is None or decision.passed
        started = time.perf_counter()
        num_buckets = self._hold(head.next_number) if serves else 0
        canary = self._learner.canary(self._canary)
        publish_s, started = time.perf_counter() - started, time.perf_counter()
        if serves:
            self._checkpoints.save(line, self._learner.state(), batch.scope)
        metrics |= {"publish_s": publish_s, "checkpoint_s": time.perf_counter() - started}
        dist.barrier()
        if self._learner.rank == 0:
            version = WeightVersion(
                number=head.next_number,
                parent=head.number,
                kind="full" if self._loop.lora is None else "lora",
                checkpoint=None,
                samples=tuple(sample.id for sample in batch.samples),
                metrics=metrics,
                at=time.time(),
                scope=batch.scope,
            )
            own = (head.next_number, *head.own)[:LINE]
            self._settle(version, num_buckets, canary, own, decision)

    def _examined(self, line: tuple[int, ...], metrics: dict[str, float], batch: Batch) -> GateDecision | None:
        """The gate's decision on the weights as they are, taken by rank 0 for all; None where there is no gate."""
        if not self._loop.gate.enabled:
            return None
        evidence = self._inspection.end(line, metrics.get("update_norm", 0.0), batch.samples)
        box: list[GateDecision | None] = [None]
        if self._learner.rank == 0:
            box[0] = decide(evidence, self._loop.gate, line[0], seconds=self._inspection.seconds, at=time.time())
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def _hold(self, number: int) -> int:
        """Every rank sends the buckets it gathered; returns how many there are in all."""
        sent: list[Any] = []
        num_buckets = 0
        for index, bucket in enumerate(self._learner.buckets(self._loop.versions.bucket_mib << 20)):
            num_buckets = index + 1
            if bucket is not None:
                sent.append(self._store.hold.remote(number, index, bucket))
        ray.get(sent)
        return num_buckets

    def _settle(
        self,
        version: WeightVersion,
        num_buckets: int,
        canary: Any,
        own: tuple[int, ...],
        decision: GateDecision | None,
    ) -> None:
        """Rank 0: offer the version and, once it is recorded, let go of its batch."""
        started = time.perf_counter()
        if not ray.get(self._store.offer.remote(version, num_buckets, canary, decision)):
            logger.warning("event=version_refused version=%d parent=%s", version.number, version.parent)
            return
        if decision is not None and not decision.passed:  # nothing is older for a version that nobody gets
            ray.get(self._buffer.release.remote(version.number))
            return
        self._settled(version.number, own, version.scope)
        metrics = version.metrics
        metric("trainer/step_num").set(version.number)
        for name, key in (("trainer/loss_value", "loss"), ("trainer/lag_num", "lag_mean")):
            if key in metrics:
                metric(name).set(metrics[key])
        logger.info(
            "event=step version=%d loss=%.4f grad_norm=%.3f tokens=%d seconds=%.2f publish_s=%.3f checkpoint_s=%.3f "
            "offer_s=%.3f skipped=%d",
            version.number, metrics.get("loss", float("nan")), metrics.get("grad_norm", float("nan")),
            metrics["tokens"], metrics["seconds"], metrics["publish_s"], metrics["checkpoint_s"],
            time.perf_counter() - started, metrics["skipped"],
        )  # fmt: skip


def _seed(seed: int, *, step: int, rank: int) -> None:
    """Random numbers of a step depend on nothing that came before it."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def _fetched(store: Any, number: int) -> Iterator[Bucket]:
    """A version's buckets, one at a time."""
    for index in range(ray.get(store.num_buckets.remote(number))):
        (ref,) = ray.get(store.bucket.remote(number, index))
        yield ray.get(ref)
