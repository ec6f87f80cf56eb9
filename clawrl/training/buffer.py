"""The replay buffer: the samples that wait for the trainer, handed out in batches, one lease per optimizer step.

Knows batch size, lag and leases. Ignores how samples were made and what training does with them. It is a view: the
journal holds the samples and which of them a version consumed, so a buffer that starts, or no longer knows what became
of a lease, or hears that turns were withdrawn (opt-out, erasure), reads the unconsumed ones again, in their order.

    journal ──(long poll)──► waiting ───────────────take(step)──► leased ──release(step)──► forgotten
                                │ advance(line)       ▲
                                ▼                     │ at most replay_fraction of a batch
              more than max_lag steps old ──► offline, newest replay_size ──► dropped and counted

Of the offline samples the newest go first: the policy has moved least since, so their importance weights say most. They
are trained on once, as all others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from clawrl.config import BufferSection
from clawrl.observe import metric
from clawrl.training.versions import Registry, lag
from clawrl.types import Batch, Sample

log = logging.getLogger(__name__)

CLOSED = -1
"""Step of the empty batch that tells the trainer to end."""

_POLL_S = 30.0
_POLL_SAMPLES = 64
_RETRY_S = 1.0
_TICK_S = 0.01
_ROUNDING = 1e-9


def shares(waiting: int, offline: int, settings: BufferSection) -> tuple[int, int]:
    """How many of the waiting and of the offline samples the next batch takes, the latter at most their fraction of it.

    Where fewer wait than fill their part of a batch, it is the smaller batch's fraction that counts.
    """
    size, fraction = settings.batch_size, settings.replay_fraction
    fresh = min(waiting, size - min(offline, math.floor(fraction * size + _ROUNDING)))
    return fresh, min(offline, math.floor(fraction / (1 - fraction) * fresh + _ROUNDING), size - fresh)


class ReplayBuffer:
    """Async actor over the journal, for one trainer that takes its steps in order, each after the one before is done.

    `journal` is the Journal's handle. While the journal is away (its restart), takes wait; nothing is raised.
    """

    def __init__(self, settings: BufferSection, journal: Any) -> None:
        self._settings, self._journal = settings, journal
        self._waiting: list[Sample] = []  # oldest first
        self._offline: list[Sample] = []  # beyond max_lag, oldest first
        self._since = time.monotonic()  # that there is something to wait for
        self._leases: dict[int, Batch] = {}
        self._next: int | None = None  # the step that may lease of what waits: the one before it is settled
        self._dropped: set[str] = set()
        self._replayed = 0
        self._released: frozenset[str] = frozenset()  # samples of rejected versions: in time when first trained on
        self._line: tuple[int, ...] = ()  # the trainer's version and its ancestors, newest first; empty: unknown yet
        self._closed = False
        self._changed = asyncio.Condition()
        self._sort([])  # an empty buffer is a measurement too
        self._filling = asyncio.create_task(self._fill())
        self._heeding = asyncio.create_task(self._heed())

    async def take(self, step: int, timeout_s: float) -> Batch | None:
        """The batch of an optimizer step, the same one each time it is asked for; None if too few samples come in time.

        Asking for a step says that no other is in work: what an unreleased lease holds is either consumed by now, which
        the journal knows, or waits again. After `close` the batch is empty and its step is CLOSED.
        """
        metric("buffer/size_num").set(len(self._waiting))  # Ray exports a gauge only after it was set
        if step not in self._leases and step != self._next:
            self._rebuild()
            self._next = step
        deadline = time.monotonic() + timeout_s
        while not self._ready(step):
            left = min(deadline, max(self._due(), time.monotonic() + _TICK_S)) - time.monotonic()
            if left <= 0:
                return None
            with suppress(TimeoutError):
                async with asyncio.timeout(left), self._changed:
                    await self._changed.wait()
        return self._lease(step)

    async def release(self, step: int) -> None:
        """The journal has recorded the version that consumed this step's batch."""
        if self._leases.pop(step, None) is not None:
            self._next = step + 1

    async def advance(self, line: Sequence[int]) -> None:
        """The trainer is at line[0], which came from line[1] and so on: drop what is too old for it."""
        self._line = tuple(line)
        self._sort(self._offline + self._waiting)

    async def stats(self) -> dict[str, int | None]:
        """Samples waiting (`size`), kept `offline`, leased, and dropped or `replayed` since the start; and the oldest
        version among the waiting.
        """
        oldest = min((sample.oldest_version for sample in self._waiting), default=None)
        leased = sum(len(batch.samples) for batch in self._leases.values())
        return {
            "size": len(self._waiting),
            "offline": len(self._offline),
            "leased": leased,
            "dropped": len(self._dropped),
            "replayed": self._replayed,
            "oldest_version": oldest,
        }

    async def close(self) -> None:
        """Every take, waiting ones too, answers CLOSED from now on."""
        self._closed = True
        self._filling.cancel()
        self._heeding.cancel()
        async with self._changed:
            self._changed.notify_all()

    def _ready(self, step: int) -> bool:
        if self._closed or step in self._leases or self._num_next() >= self._settings.batch_size:
            return True
        return time.monotonic() >= self._due()

    def _due(self) -> float:
        """When what waits is enough, however little it is; never, where it must be a whole batch."""
        least = self._settings.min_batch
        return math.inf if least is None or self._num_next() < least else self._since + self._settings.max_wait_s

    def _num_next(self) -> int:
        """Samples of the next batch, were it taken now."""
        return sum(shares(len(self._waiting), len(self._offline), self._settings))

    def _lease(self, step: int) -> Batch:
        if self._closed:
            return Batch(CLOSED)
        if step not in self._leases:
            fresh, offline = shares(len(self._waiting), len(self._offline), self._settings)
            kept = len(self._offline) - offline
            self._leases[step] = Batch(step, tuple(self._waiting[:fresh] + self._offline[kept:][::-1]))
            if offline:
                self._replayed += offline
                metric("buffer/replayed_num").inc(offline)
            self._sort(self._offline[:kept] + self._waiting[fresh:])
            self._since = time.monotonic()
        return self._leases[step]

    def _sort(self, samples: list[Sample]) -> None:
        """Those of `samples` that are young enough, or trained on again, wait; of the others the newest stay offline,
        and what is left is dropped and counted.
        """
        most = self._settings.max_lag
        young = [each for each in samples if lag(self._line, each.newest_version) <= most or each.id in self._released]
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting, kept = young, {sample.id for sample in young}
        old = [sample for sample in samples if sample.id not in kept]
        room = self._settings.replay_size if self._settings.replay_fraction else 0
        self._offline = sorted(old, key=_recency)[max(0, len(old) - room) :]
        kept |= {sample.id for sample in self._offline}
        metric("buffer/size_num").set(len(self._waiting))
        metric("buffer/offline_num").set(len(self._offline))
        dropped = {sample.id for sample in old if sample.id not in kept} - self._dropped
        if dropped:
            self._dropped |= dropped
            metric("buffer/dropped_num").inc(len(dropped))
            log.info("event=samples_dropped number=%d version=%d", len(dropped), self._line[0])

    def _rebuild(self) -> None:
        """Forget leases and samples, and read the journal again from its beginning."""
        if self._leases:
            log.warning("event=leases_abandoned steps=%s", sorted(self._leases))
        self._filling.cancel()
        self._leases.clear()
        self._sort([])
        self._filling = asyncio.create_task(self._fill())

    async def _heed(self) -> None:
        """Read the journal again whenever turns were withdrawn, so that none of theirs is waiting or leased here."""
        known: int | None = None
        while True:
            try:
                number = await self._journal.withdrawals.remote(-1 if known is None else known, _POLL_S)
            except Exception as error:
                log.warning("event=journal_unreachable error=%s retry_s=%g", type(error).__name__, _RETRY_S)
                await asyncio.sleep(_RETRY_S)
                continue
            if number != known:
                if known is not None:
                    self._rebuild()
                    self._next = None  # of the step in work the journal will know
                known = number

    async def _fill(self) -> None:
        """Follow the journal's unconsumed samples; a journal that fails is asked again, for ever."""
        after: int | None = None
        while True:
            try:
                if after is None:
                    await self._read_versions()
                    after = 0
                found = await self._journal.samples_to_train.remote(after, _POLL_SAMPLES, _POLL_S)
            except Exception as error:
                log.warning("event=journal_unreachable error=%s retry_s=%g", type(error).__name__, _RETRY_S)
                await asyncio.sleep(_RETRY_S)
                continue
            if found:
                after = found[-1][0]
                self._sort(self._offline + self._waiting + [sample for _, sample in found])
                async with self._changed:
                    self._changed.notify_all()

    async def _read_versions(self) -> None:
        """Where the trainer stands, before it says so itself, and what rejected versions learnt from."""
        versions, events = await asyncio.gather(self._journal.versions.remote(), self._journal.version_events.remote())
        registry = Registry(versions, events)
        states = registry.states()
        self._line = self._line or registry.line(registry.head)
        self._released = frozenset(
            sample for each in versions if states[each.number] == "rejected" for sample in each.samples
        )


def _recency(sample: Sample) -> tuple[int, float]:
    return sample.newest_version, sample.at
