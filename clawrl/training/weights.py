"""The weight store: takes versions from the trainer, keeps them, and tells replicas which one to serve.

Consumes buckets and offers from the trainer and reports from replicas; unblocks the replicas' long polls. An async
actor on the run directory's machine, alone in writing there; all it knows comes back from the journal and the disk.

    trainer ──hold(bucket)…──► store ──offer: disk ► journal ► desired──► wait() ──► replica ──bucket()…──► report()
                                 ▲                                                                            │
                                 └──── candidate ► serving, or rejected: desired goes back to the parent ◄────┘

Tensors are put into the object store a second time, by this actor: an object lives as long as the process that put
it, and a version must outlive the trainer that made it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from clawrl.config import VersionsSection
from clawrl.errors import WeightSyncError, WithdrawnError
from clawrl.observe import metric
from clawrl.training.checkpoint import model_folder, read_buckets, read_canary, write_canary, write_checkpoint
from clawrl.training.forgetting import owner, plan
from clawrl.training.versions import Registry, canary_distance, canary_verdict
from clawrl.types import Bucket, Canary, Publication, Swap, VersionEvent, WeightVersion

logger = logging.getLogger(__name__)

REPLICA_FORGOTTEN_S = 120.0


@dataclass(frozen=True, slots=True)
class Head:
    """Where training goes on from, and the number its next version gets."""

    number: int
    next_number: int


@dataclass(slots=True)
class _Replica:
    """What a serving replica last said of itself."""

    version: int
    seen: float  # monotonic seconds
    stall_ms: float | None = None
    canary_error: float | None = None


class WeightStore:
    """Versions in memory and on disk, and who serves which; `journal` is the journal actor's handle."""

    def __init__(self, settings: VersionsSection, journal: Any, run_directory: str, model: str) -> None:
        self._settings, self._journal = settings, journal
        self._folder, self._base = Path(run_directory) / "versions", model_folder(model)
        self._registry: Registry | None = None
        self._recovery, self._change = asyncio.Lock(), asyncio.Condition()
        self._offering = asyncio.Lock()
        self._held: dict[int, dict[int, ray.ObjectRef]] = {}  # version -> bucket index -> ref owned by this actor
        self._canaries: dict[int, Canary] = {}
        self._replicas: dict[str, _Replica] = {}
        self._last_step: dict[str, float] = {}  # the newest version's metrics
        self._closed = False

    # --- the trainer's side ---

    async def latest(self) -> Head:
        """The version a (re)started trainer continues from; its tensors come from `bucket`."""
        registry = await self._known()
        return Head(registry.head, registry.next_number)

    async def num_buckets(self, number: int) -> int:
        """How many buckets make up a version, which is read from disk if it is no longer in memory."""
        return len(await self._loaded(number))

    async def hold(self, number: int, index: int, bucket: Bucket) -> None:
        """Keep bucket `index` of a version that will be offered; a later bucket of that place replaces it."""
        ref = await asyncio.to_thread(ray.put, bucket)
        self._held.setdefault(number, {})[index] = ref

    async def anchor(self, number: int, canary: Canary) -> None:
        """Keep the trainer's canary of a version that was never offered (version 0)."""
        self._canaries[number] = canary
        await asyncio.to_thread(write_canary, self._folder / str(number), canary)

    async def offer(self, version: WeightVersion, num_buckets: int, canary: Canary) -> bool:
        """Take the held buckets as a version: on disk, then in the journal, then desired. Offered again, it is known.

        In this order a version in the journal always has its checkpoint, and no replica serves one that a crash
        could make number anew. False: the parent was rejected meanwhile, or samples of the batch were withdrawn;
        nothing is recorded, and what is left of the batch is to be trained again from the head. Raises WeightSyncError
        if buckets are missing or the number is not the next.
        """
        registry = await self._known()
        async with self._offering:
            if version.number in registry:
                return True
            if version.parent is not None and registry.state(version.parent) == "rejected":
                self._held.pop(version.number, None)
                return False
            held = self._held.get(version.number, {})
            if sorted(held) != list(range(num_buckets)):
                raise WeightSyncError(f"version {version.number} has buckets {sorted(held)} of {num_buckets}; hold all")
            folder = self._folder / str(version.number)
            buckets = [await held[index] for index in range(num_buckets)]
            await asyncio.to_thread(write_checkpoint, folder, buckets, self._base, canary)
            event = registry.candidate(version.number, version.parent, time.time())
            try:
                await self._journal.record_version.remote(replace(version, checkpoint=str(folder)), event)
            except WithdrawnError as error:
                logger.warning("event=version_withdrawn version=%d reason=%r", version.number, str(error))
                del self._held[version.number]
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                return False
            registry.add(event, version.parent)
            self._canaries[version.number] = canary
            self._last_step = version.metrics
        metric("versions/latest_num").set(version.number)
        logger.info("event=version_offered version=%d parent=%s", version.number, version.parent)
        await self._forget_old(registry)
        await self._wake()
        return True

    # --- the replicas' side ---

    async def wait(self, replica: str, current: int, timeout_s: float) -> Publication | None:
        """The version this replica should take over, as soon as it is not `current`; None at the timeout."""
        registry = await self._known()
        known = self._replicas.setdefault(replica, _Replica(current, 0.0))
        known.version, known.seen = current, time.monotonic()
        try:
            async with asyncio.timeout(timeout_s), self._change:
                await self._change.wait_for(lambda: self._closed or registry.desired != current)
        except TimeoutError:
            return None
        finally:
            known.seen = time.monotonic()
        if self._closed:
            await asyncio.sleep(min(timeout_s, 1.0))  # a replica that asks in a loop must not spin
            return None
        number = registry.desired
        canary = await self._canary(number)
        if canary is None:
            raise WeightSyncError(f"version {number} has no canary; its folder {self._folder / str(number)} is damaged")
        return Publication(number, len(await self._loaded(number)), canary)

    async def bucket(self, number: int, index: int) -> list[ray.ObjectRef]:
        """[reference to a Bucket]: in a list, so that it travels as a reference and is read in place."""
        refs = await self._loaded(number)
        if not 0 <= index < len(refs):
            raise WeightSyncError(f"version {number} has {len(refs)} buckets, no bucket {index}")
        return [refs[index]]

    async def report(self, swap: Swap) -> None:
        """A replica took a version over: record it, and let its canary promote or reject the version."""
        registry = await self._known()
        registry.state(swap.version)
        known = self._replicas.setdefault(swap.replica, _Replica(swap.version, 0.0))
        known.version, known.seen = swap.version, time.monotonic()
        known.stall_ms, known.canary_error = swap.stall_ms, swap.canary_error
        expected = await self._expected_move(registry, swap.version)
        verdict = canary_verdict(swap, tolerance=self._settings.canary_tolerance, expected_move=expected)
        events: list[VersionEvent] = []
        if registry.state(swap.version) == "candidate" and verdict.accepted:
            events = registry.accept(swap.version, verdict.reason, time.time())
        elif verdict.accepted is False and swap.version != 0:
            events = registry.reject(swap.version, verdict.reason, time.time())
        log = logger.info if verdict.accepted else logger.warning
        log(
            "event=swap version=%d replica=%s stall_ms=%.1f state=%s reason=%r",
            swap.version, swap.replica, swap.stall_ms, registry.state(swap.version), verdict.reason,
        )  # fmt: skip
        await self._journal.append.remote(swap, *events)
        await self._wake()

    async def status(self) -> dict[str, Any]:
        """desired, serving and head versions, the state of each, and what the replicas seen lately said last."""
        registry = await self._known()
        now = time.monotonic()
        alive = {name: each for name, each in self._replicas.items() if now - each.seen < REPLICA_FORGOTTEN_S}
        return {
            "desired": registry.desired,
            "serving": registry.serving,
            "head": registry.head,
            "states": registry.states(),
            "replicas": {name: each.version for name, each in alive.items()},
            "stall_ms": {name: each.stall_ms for name, each in alive.items()},
            "canary_error": {name: each.canary_error for name, each in alive.items()},
            "in_memory": sorted(self._held),
            "last_step": self._last_step,
        }

    async def close(self) -> None:
        """Let every waiting replica go."""
        self._closed = True
        await self._wake()

    # --- the operator's side: keyword arguments in, JSON out ---

    async def forget(
        self, user: str | None = None, session: str | None = None, retrain: bool = False, yes: bool = False
    ) -> dict[str, Any]:
        """Erase what a user, or one session, said; see `training/forgetting` for what it means for the versions.

        Without `yes` only what would be done is told. Raises ClawrlError if it is not clear whose content is meant.
        """
        owner = await self._owner(user, session)
        registry = await self._known()
        async with self._offering:
            found, versions, events = await asyncio.gather(
                self._journal.content.remote(owner, session),
                self._journal.versions.remote(), self._journal.version_events.remote(),
            )  # fmt: skip
            on_disk = await asyncio.to_thread(_numbers, self._folder)
            planned = plan(owner, session, found, versions, events, retrain=retrain, on_disk=on_disk, at=time.time())
            if not yes:
                return planned.told(done=False)
            await self._journal.erase.remote(planned.erasure, planned.records())
            registry.apply(planned.events)
            for number in planned.checkpoints:
                self._held.pop(number, None)
                self._canaries.pop(number, None)
                await asyncio.to_thread(shutil.rmtree, self._folder / str(number))
        logger.warning("event=forgotten turns=%d restored=%s", planned.erasure.turns, planned.erasure.restored)
        await self._wake()
        return planned.told(done=True)

    async def _owner(self, user: str | None, session: str | None) -> str:
        return owner(user, session, [] if user or not session else await self._journal.owners.remote(session))

    # --- inside ---

    async def _known(self) -> Registry:
        """The registry, rebuilt from the journal on the first call of this actor's life."""
        async with self._recovery:
            if self._registry is None:
                versions, events = await asyncio.gather(
                    self._journal.versions.remote(), self._journal.version_events.remote()
                )
                self._registry = Registry(versions, events)
                self._last_step = versions[-1].metrics if versions else {}
                metric("versions/latest_num").set(self._registry.head)
                await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        return self._registry

    async def _wake(self) -> None:
        async with self._change:
            self._change.notify_all()

    async def _loaded(self, number: int) -> list[ray.ObjectRef]:
        """References to a version's buckets, from memory or else read from its checkpoint."""
        (await self._known()).state(number)
        if number not in self._held:
            folder = self._base if number == 0 else self._folder / str(number)
            logger.info("event=version_read version=%d folder=%s", number, folder)
            refs = await asyncio.to_thread(_put_all, folder, self._settings.bucket_mib << 20)
            self._held.setdefault(number, dict(enumerate(refs)))
        held = self._held[number]
        return [held[index] for index in sorted(held)]

    async def _canary(self, number: int) -> Canary | None:
        if number not in self._canaries:
            kept = await asyncio.to_thread(read_canary, self._folder / str(number))
            if kept is None:
                return None
            self._canaries[number] = kept
        return self._canaries[number]

    async def _expected_move(self, registry: Registry, number: int) -> float | None:
        """How far the trainer's own canary moved from the version's parent, in nats."""
        parent = registry.parent(number)
        if parent is None:
            return None
        now, before = await self._canary(number), await self._canary(parent)
        return canary_distance(now, before) if now and before else None

    async def _forget_old(self, registry: Registry) -> None:
        """Drop what is beyond `keep_in_memory` and `keep`; desired, serving and head versions always stay."""
        needed = {registry.desired, registry.serving, registry.head}
        numbers = sorted(number for number in self._held if number in registry)
        for number in set(numbers[: -self._settings.keep_in_memory]) - needed:
            del self._held[number]
        stay = set(registry.newest(self._settings.keep)) | needed | {0}
        for number in set(self._canaries) - stay:
            del self._canaries[number]
        await asyncio.to_thread(_remove_others, self._folder, stay)


def _put_all(folder: Path, bucket_bytes: int) -> list[ray.ObjectRef]:
    return [ray.put(bucket) for bucket in read_buckets(folder, bucket_bytes)]


def _numbers(folder: Path) -> list[int]:
    """The versions that have a checkpoint here."""
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def _remove_others(folder: Path, stay: set[int | None]) -> None:
    """Remove checkpoints of versions that are not in `stay`."""
    for number in _numbers(folder):
        if number not in stay:
            shutil.rmtree(folder / str(number), ignore_errors=True)
