"""The replay buffer: the samples that wait for the trainer, handed out in batches, one lease per optimizer step.

Knows batch size, lag and leases. Ignores how samples were made and what training does with them. It is a view: the
journal holds the samples and which of them a version consumed, so a buffer that starts, or no longer knows what became
of a lease, or hears that turns were withdrawn (opt-out, erasure), reads the unconsumed ones again, in their order.

    journal ──(long poll)──► waiting ───────────────take(step)──► leased ──release(step)──► forgotten
                                │ advance(line)       ▲
                                ▼                     │ at most replay_fraction of a batch
              more than max_lag steps old ──► offline, newest replay_size ──► dropped and counted

Everyone's policy and each user's have a queue of their own, and a batch is of one queue: no policy learns from what is
another's. Of the queues that have a batch, the one that was served longest ago goes first.

Of the offline samples the newest go first: the policy has moved least since, so their importance weights say most. They
are trained on once, as all others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from clawrl.config import BufferSection
from clawrl.observe import metric
from clawrl.training.versions import Registry, lag
from clawrl.types import GROUP, Batch, PolicyScope, Sample

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


@dataclass(slots=True)
class _Queue:
    """What one policy is to learn from."""

    waiting: list[Sample] = field(default_factory=list)  # oldest first
    offline: list[Sample] = field(default_factory=list)  # beyond max_lag, oldest first
    since: float = field(default_factory=time.monotonic)  # that there is something to wait for
    line: tuple[int, ...] = ()  # the policy's version and those of its own that it came from, newest first


def chosen(waiting: Sequence[Sample], size: int, user_quota: int | None) -> list[Sample]:
    """The first of `waiting`, at most `size`, and at most `user_quota` of each user."""
    if user_quota is None:
        return list(waiting[:size])
    taken, found = Counter(), []
    for sample in waiting:
        if len(found) < size and taken[sample.user] < user_quota:
            taken[sample.user] += 1
            found.append(sample)
    return found


class ReplayBuffer:
    """Async actor over the journal, for one trainer that takes its steps in order, each after the one before is done.

    `journal` is the Journal's handle. While the journal is away (its restart), takes wait; nothing is raised. What is
    in the journal for policies that `policy_scope` leaves out stays there.
    """

    def __init__(self, settings: BufferSection, journal: Any, policy_scope: PolicyScope = "group") -> None:
        self._settings, self._journal, self._policy_scope = settings, journal, policy_scope
        self._queues: dict[str, _Queue] = {GROUP: _Queue()}  # by scope, the one served longest ago first
        self._leases: dict[int, Batch] = {}
        self._next: int | None = None  # the step that may lease of what waits: the one before it is settled
        self._dropped: set[tuple[str, str]] = set()  # scope and sample
        self._replayed = 0
        self._made: dict[int, float] = {}  # when versions were made, or were first heard of; seconds since the epoch
        self._personal: set[int] = set()  # versions of users
        self._released: frozenset[str] = frozenset()  # samples of rejected versions: in time when first trained on
        self._closed = False
        self._changed = asyncio.Condition()
        self._sort(GROUP, [])  # an empty buffer is a measurement too
        self._filling = asyncio.create_task(self._fill())
        self._heeding = asyncio.create_task(self._heed())

    async def take(self, step: int, timeout_s: float) -> Batch | None:
        """The batch of an optimizer step, the same one each time it is asked for; None if too few samples come in time.

        Asking for a step says that no other is in work: what an unreleased lease holds is either consumed by now, which
        the journal knows, or waits again. After `close` the batch is empty and its step is CLOSED.
        """
        self._measure()  # Ray exports a gauge only after it was set
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

    async def advance(self, line: Sequence[int], scope: str = GROUP) -> None:
        """A policy is at line[0], which came from line[1] and so on, all of its own: drop what is too old for it."""
        self._queues.setdefault(scope, _Queue()).line = tuple(line)
        for number in line:
            self._made.setdefault(number, time.time())
        if scope != GROUP:
            self._personal.update(line)
        self._sort(scope)

    async def stats(self) -> dict[str, int | None]:
        """Samples waiting (`size`), kept `offline`, leased, and dropped or `replayed` since the start; the oldest
        version among the waiting; how many wait for the policy that has most of them, and for everyone's.
        """
        queues = self._queues.values()
        oldest = min((sample.oldest_version for queue in queues for sample in queue.waiting), default=None)
        leased = sum(len(batch.samples) for batch in self._leases.values())
        return {
            "size": sum(len(queue.waiting) for queue in queues),
            "offline": sum(len(queue.offline) for queue in queues),
            "longest": max(len(queue.waiting) for queue in queues),
            "everyones": len(self._queues[GROUP].waiting),
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
        return self._closed or step in self._leases or time.monotonic() >= self._due()

    def _due(self) -> float:
        """When the first policy has enough to learn from."""
        return min(map(self._enough, self._queues.values()))

    def _enough(self, queue: _Queue) -> float:
        """When what waits is enough, however little it is; never, where it must be a whole batch."""
        number, least = self._num_next(queue), self._settings.min_batch
        if number >= self._settings.batch_size:
            return -math.inf
        return math.inf if least is None or number < least else queue.since + self._settings.max_wait_s

    def _num_next(self, queue: _Queue) -> int:
        """Samples of the next batch, were it taken now."""
        return sum(self._shares(queue))

    def _shares(self, queue: _Queue) -> tuple[int, int]:
        quota = self._settings.user_quota if queue is self._queues[GROUP] else None
        waiting = len(chosen(queue.waiting, self._settings.batch_size, quota))
        return shares(waiting, len(queue.offline), self._settings)

    def _lease(self, step: int) -> Batch:
        if self._closed:
            return Batch(CLOSED)
        if step not in self._leases:
            now = time.monotonic()
            scope = next(name for name, queue in self._queues.items() if self._enough(queue) <= now)
            queue = self._queues[scope] = self._queues.pop(scope)  # the last to be served again
            fresh, offline = self._shares(queue)
            first = chosen(queue.waiting, fresh, self._settings.user_quota if scope == GROUP else None)
            kept, taken = len(queue.offline) - offline, {sample.id for sample in first}
            self._leases[step] = Batch(step, self._weighted((*first, *queue.offline[kept:][::-1]), scope), scope)
            if offline:
                self._replayed += offline
                metric("buffer/replayed_num").inc(offline)
            queue.offline = queue.offline[:kept]
            queue.waiting = [sample for sample in queue.waiting if sample.id not in taken]
            self._sort(scope)
            queue.since = now
        return self._leases[step]

    def _weighted(self, samples: tuple[Sample, ...], scope: str) -> tuple[Sample, ...]:
        """What users count in everyone's policy; in their own all counts alike."""
        weights = self._settings.user_weights if scope == GROUP else {}
        return tuple(
            replace(each, weight=each.weight * weights[each.user]) if each.user in weights else each for each in samples
        )

    def _sort(self, scope: str, new: Sequence[Sample] = ()) -> None:
        """Of what waits, is offline or new, what is young enough, or trained on again, waits; of the others the newest
        stay offline, and what is left is dropped and counted.
        """
        queue, most = self._queues[scope], self._settings.max_lag
        samples = [*queue.offline, *queue.waiting, *new]
        young = [each for each in samples if self._age(each, scope) <= most or each.id in self._released]
        if not queue.waiting:
            queue.since = time.monotonic()
        queue.waiting, kept = young, {sample.id for sample in young}
        old = [sample for sample in samples if sample.id not in kept]
        room = self._settings.replay_size if self._settings.replay_fraction else 0
        queue.offline = sorted(old, key=_recency)[max(0, len(old) - room) :]
        kept |= {sample.id for sample in queue.offline}
        self._measure()
        dropped = {(scope, sample.id) for sample in old if sample.id not in kept} - self._dropped
        if dropped:
            self._dropped |= dropped
            metric("buffer/dropped_num").inc(len(dropped))
            log.info("event=samples_dropped number=%d version=%d", len(dropped), queue.line[0])

    def _age(self, sample: Sample, scope: str) -> int:
        """How many steps a policy has gone on since a sample was taken.

        Everyone's learns from what users' own policies said too: their numbers are no place in its line, the time is.
        """
        line = self._queues[scope].line
        if scope == GROUP and sample.newest_version in self._personal:
            return next((at for at, number in enumerate(line) if self._made[number] <= sample.at), len(line))
        return lag(line, sample.newest_version)

    def _measure(self) -> None:
        queues = self._queues.values()
        metric("buffer/size_num").set(sum(len(queue.waiting) for queue in queues))
        metric("buffer/offline_num").set(sum(len(queue.offline) for queue in queues))

    def _rebuild(self) -> None:
        """Forget leases and samples, and read the journal again from its beginning."""
        if self._leases:
            log.warning("event=leases_abandoned steps=%s", sorted(self._leases))
        self._filling.cancel()
        self._leases.clear()
        for scope, queue in self._queues.items():
            queue.waiting, queue.offline = [], []
            self._sort(scope)
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
                self._take_in(found)
                async with self._changed:
                    self._changed.notify_all()

    def _take_in(self, found: Sequence[tuple[int, Sample, tuple[str, ...]]]) -> None:
        """Each sample into the queues of those who are to learn from it."""
        new: defaultdict[str, list[Sample]] = defaultdict(list)
        for _, sample, scopes in found:
            for scope in scopes:
                if scope == GROUP or self._policy_scope != "group":
                    new[scope].append(sample)
        for scope, samples in new.items():
            self._queues.setdefault(scope, _Queue())
            self._sort(scope, samples)

    async def _read_versions(self) -> None:
        """Where each policy stands, before the trainer says so itself, and what rejected versions learnt from."""
        versions, events = await asyncio.gather(self._journal.versions.remote(), self._journal.version_events.remote())
        registry = Registry(versions, events)
        states = registry.states()
        self._made |= {0: 0.0, **{each.number: each.at for each in versions}}
        self._personal |= {each.number for each in versions if each.scope != GROUP}
        for scope in registry.scopes():
            queue = self._queues.setdefault(scope, _Queue())
            queue.line = queue.line or registry.own_line(scope)
        self._released = frozenset(
            sample for each in versions if states[each.number] == "rejected" for sample in each.samples
        )


def _recency(sample: Sample) -> tuple[int, float]:
    return sample.newest_version, sample.at
