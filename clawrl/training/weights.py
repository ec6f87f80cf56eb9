"""The weight store: takes versions from the trainer, keeps them, and tells replicas which one to serve.

Consumes buckets and offers from the trainer and reports from replicas; unblocks the replicas' long polls. An async
actor on the run directory's machine, alone in writing there; all it knows comes back from the journal and the disk.

    trainer ──hold(bucket)…──► store ──offer: disk ► journal ► desired──► wait() ──► replica ──bucket()…──► report()
                                 ▲                                                                            │
                                 ├──── candidate ► serving, or rejected: desired goes back to the parent ◄────┘
                                 └──── rollback (a person): desired and head go back, all newer ones are rejected

A replica follows everyone's version, and of users those that it was asked for (`meet`).

Tensors are put into the object store a second time, by this actor: an object lives as long as the process that put
it, and a version must outlive the trainer that made it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray

from clawrl.config import LoraSection, VersionsSection
from clawrl.errors import WeightSyncError, WithdrawnError
from clawrl.observe import metric
from clawrl.training.adapter import description
from clawrl.training.checkpoint import (
    export_checkpoint,
    model_folder,
    read_buckets,
    read_canary,
    remove_states,
    remove_unfinished,
    require_whole,
    states_of,
    write_adapter,
    write_canary,
    write_checkpoint,
)
from clawrl.training.forgetting import owner, plan
from clawrl.training.history import apart, difference, listing
from clawrl.training.versions import Registry, canary_distance, canary_verdict
from clawrl.types import (
    GROUP,
    Bucket,
    Canary,
    GateDecision,
    Pin,
    Publication,
    Swap,
    VersionEvent,
    VersionState,
    WeightVersion,
    Withdrawal,
)

logger = logging.getLogger(__name__)

REPLICA_FORGOTTEN_S = 120.0


@dataclass(frozen=True, slots=True)
class Head:
    """Where training goes on from, and the number its next version gets."""

    number: int
    next_number: int
    line: tuple[int, ...] = field(default=(), compare=False)  # of the registry: it and its ancestors, newest first
    own: tuple[int, ...] = field(default=(), compare=False)  # those of them that are of the policy itself


@dataclass(slots=True)
class _Replica:
    """What a serving replica last said of itself."""

    versions: dict[str, int | None]  # that it serves, by scope; None: of a user without one
    seen: float = 0.0  # monotonic seconds
    stall_ms: float | None = None
    canary_error: float | None = None


class WeightStore:
    """Versions in memory and on disk, and who serves which; `journal` is the journal actor's handle.

    With `lora` they are adapters of the model, and version 0, the model itself, has no tensors.
    """

    def __init__(
        self,
        settings: VersionsSection,
        journal: Any,
        run_directory: str,
        model: str,
        lora: LoraSection | None = None,
    ) -> None:
        self._adapter = None if lora is None else description(lora, model)
        self._settings, self._journal = settings, journal
        self._folder, self._base = Path(run_directory) / "versions", model_folder(model)
        self._registry: Registry | None = None
        self._behind = False  # an append failed that may have been committed: the journal knows more than the registry
        self._recovery, self._change = asyncio.Lock(), asyncio.Condition()
        self._offering, self._deciding, self._removing = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()
        self._pinned: set[int] = set()
        self._exporting: list[int] = []
        self._held: dict[int, dict[int, ray.ObjectRef]] = {}  # version -> bucket index -> ref owned by this actor
        self._canaries: dict[int, Canary] = {}
        self._replicas: dict[str, _Replica] = {}
        self._last_step: dict[str, float] = {}  # the newest version's metrics
        self._trainer_failed: str | None = None  # since then
        self._closed = False

    # --- the trainer's side ---

    async def latest(self, scope: str = GROUP) -> Head:
        """The version a (re)started trainer continues from; its tensors come from `bucket`."""
        registry = await self._known()
        metric("versions/latest_num").set(registry.head())  # Ray exports a gauge only after it was set
        number = registry.head(scope)
        return Head(number, registry.next_number, registry.line(number), registry.own_line(scope))

    async def heads(self) -> dict[str, int]:
        """The version that each policy's training goes on from; without users who have none of their own."""
        registry = await self._known()
        heads = {scope: registry.head(scope) for scope in registry.scopes()}
        return {scope: number for scope, number in heads.items() if registry.scope(number) == scope}

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

    async def offer(
        self, version: WeightVersion, num_buckets: int, canary: Canary, decision: GateDecision | None = None
    ) -> bool:
        """Take the held buckets as a version: on disk, then in the journal, then desired. Offered again, it is known.

        In this order a version in the journal always has its checkpoint, and no replica serves one that a crash
        could make number anew. False: the parent was rejected meanwhile, or samples of the batch were withdrawn;
        nothing is recorded, and what is left of the batch is to be trained again from the head. A version that did not
        pass the gate is recorded as rejected, with what it consumed, and its weights are not kept. Raises
        WeightSyncError if buckets are missing or the number is not the next.
        """
        registry = await self._known()
        async with self._offering:
            if version.number in registry:
                return True
            if decision is not None:
                await self._journal.append.remote(decision)
            if decision is not None and not decision.passed:
                return await self._refuse(registry, version, decision)
            held = self._held.get(version.number, {})
            if sorted(held) != list(range(num_buckets)):
                raise WeightSyncError(f"version {version.number} has buckets {sorted(held)} of {num_buckets}; hold all")
            folder = self._folder / str(version.number)
            buckets = [await held[index] for index in range(num_buckets)]
            if self._adapter is None:
                await asyncio.to_thread(write_checkpoint, folder, buckets, self._base, canary)
            else:
                await asyncio.to_thread(write_adapter, folder, buckets, self._adapter, canary)
            if not await self._enter(registry, replace(version, checkpoint=str(folder))):
                del self._held[version.number]
                await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
                return False
            self._canaries[version.number] = canary
            self._last_step, self._trainer_failed = version.metrics, None
            metric("versions/latest_num").set(registry.head())
            logger.info("event=version_offered version=%d parent=%s", version.number, version.parent)
            await self._forget_old(registry)  # while no other offer writes a folder that is not recorded yet
        await self._wake()
        return True

    async def _refuse(self, registry: Registry, version: WeightVersion, decision: GateDecision) -> bool:
        """Record a version that the gate stopped: never desired, its samples consumed, training back at its parent."""
        if not await self._enter(registry, version, refused=f"gate: {decision.reason}"):
            return False
        self._last_step, self._trainer_failed = version.metrics, None
        metric("versions/gate_rejections_num").inc()
        logger.warning("event=gate_rejects version=%d reason=%r", version.number, decision.reason)
        return True

    async def withdraw(self, decision: GateDecision) -> None:
        """Record what the watch found; a failed decision rejects its version and all that was trained from it.

        Back goes as far as weights are kept: if the version's parent is gone from the disk, to the oldest of its
        successors that is not. Then `versions.keep` was too small for this.
        """
        registry = await self._known()
        async with self._removing:
            on_disk = {0, *await asyncio.to_thread(_numbers, self._folder)}

            def change(changed: Registry) -> list[VersionEvent]:
                line = [each for each in changed.numbers(changed.scope(decision.version)) if each >= decision.version]
                served = [each for each in line if changed.state(each) != "rejected"]
                back = [each for each in served if _can_return(changed, each, on_disk)]
                if decision.passed or changed.state(decision.version) == "rejected" or not back:
                    return []
                return changed.reject(back[0], f"watch: {decision.reason}", decision.at)

            events = await self._decide(registry, change, decision)
        if events:
            metric("versions/rollbacks_num").inc()
        logger.warning(
            "event=watch version=%d passed=%s serves=%d reason=%r",
            decision.version, decision.passed, registry.desired(registry.scope(decision.version)), decision.reason,
        )  # fmt: skip

    # --- the replicas' side ---

    async def wait(
        self, replica: str, versions: dict[str, int | None], timeout_s: float
    ) -> Publication | Withdrawal | None:
        """What this replica should take over, as soon as it serves another one to someone; None at the timeout.

        `versions` says what it serves, by scope: to everyone, and to each user that it has met (None: everyone's).
        """
        registry = await self._known()
        known = self._replicas.setdefault(replica, _Replica(versions))
        known.versions, known.seen = dict(versions), time.monotonic()
        try:
            async with asyncio.timeout(timeout_s), self._change:
                await self._change.wait_for(lambda: self._closed or _due(registry, known.versions) is not None)
        except TimeoutError:
            return None
        finally:
            known.seen = time.monotonic()
        if self._closed:
            await asyncio.sleep(min(timeout_s, 1.0))  # a replica that asks in a loop must not spin
            return None
        registry = await self._known()
        if (scope := _due(registry, known.versions)) is None:
            return None
        try:
            return await self._publication(registry, scope)
        except WeightSyncError:
            await self._reject_damaged(registry)
            return await self._publication(registry, scope)

    async def meet(self, replica: str, user: str) -> Publication | None:
        """A replica was asked for by a user: their own version, if there is one, and from now on every newer one."""
        registry = await self._known()
        self._replicas.setdefault(replica, _Replica({})).versions.setdefault(user, None)
        found = await self._publication(registry, user)
        return found if isinstance(found, Publication) else None

    async def bucket(self, number: int, index: int) -> list[ray.ObjectRef]:
        """[reference to a Bucket]: in a list, so that it travels as a reference and is read in place."""
        refs = await self._loaded(number)
        if not 0 <= index < len(refs):
            raise WeightSyncError(f"version {number} has {len(refs)} buckets, no bucket {index}")
        return [refs[index]]

    async def report(self, swap: Swap) -> None:
        """A replica took a version over: record it, and let its canary promote or reject the version."""
        registry = await self._known()
        scope = registry.scope(swap.version)
        known = self._replicas.setdefault(swap.replica, _Replica({}))
        known.versions[scope], known.seen = swap.version, time.monotonic()
        known.stall_ms, known.canary_error = swap.stall_ms, swap.canary_error
        expected = await self._expected_move(registry, swap.version)
        verdict = canary_verdict(swap, tolerance=self._settings.canary_tolerance, expected_move=expected)

        def judge(changed: Registry) -> list[VersionEvent]:
            if changed.state(swap.version) == "candidate" and verdict.accepted:
                return changed.accept(swap.version, verdict.reason, time.time())
            if verdict.accepted is False and swap.version != 0:
                return changed.reject(swap.version, verdict.reason, time.time())
            return []

        await self._decide(registry, judge, swap)
        log = logger.info if verdict.accepted else logger.warning
        log(
            "event=swap version=%d replica=%s stall_ms=%.1f state=%s reason=%r",
            swap.version, swap.replica, swap.stall_ms, registry.state(swap.version), verdict.reason,
        )  # fmt: skip

    # --- the operator's side: keyword arguments in, JSON out ---

    async def rollback(
        self, number: int | None = None, reason: str | None = None, user: str | None = None
    ) -> dict[str, Any]:
        """Serve `number` again and go on training from it (None: the serving version's parent); nobody waits.

        All newer versions of its policy are rejected, for good, with what was trained from them; what they learnt from
        stays consumed, and a step that is in work is refused and its batch trained again. With `user` it is this user's
        policy that goes back, to everyone's if `number` is one of everyone's. Raises WeightSyncError if the version
        cannot serve.
        """
        _require("number", number, int | None)
        _require("reason", reason, str | None)
        _require("user", user, str | None)
        registry = await self._known()
        if user is not None and user not in registry.scopes():
            raise WeightSyncError(f"user {user!r} has no version of their own; they get everyone's")
        async with self._removing:  # its checkpoint stays while it is looked at
            target = registry.before(user or GROUP) if number is None else number
            scope = registry.scope(target) if user is None else user
            if registry.state(target) == "retired" and registry.scope(target) == scope:
                await self._require_checkpoint(target)
            events = await self._decide(registry, lambda changed: changed.rollback(target, reason, time.time(), user))
        rejected = [event.version for event in events if event.state == "rejected"]
        logger.warning("event=rollback version=%d rejected=%s", registry.desired(scope), rejected)
        return {"serving": registry.desired(scope), "rejected": rejected, "next": registry.next_number}

    async def pin(self, number: int, pinned: bool = True) -> dict[str, Any]:
        """Keep a version's checkpoint for good, or no longer. Raises WeightSyncError if it is gone or damaged."""
        _require("number", number, int)
        _require("pinned", pinned, bool)
        registry = await self._known()
        registry.state(number)
        async with self._removing:
            if pinned:
                await self._require_checkpoint(number)
            await self._journal.append.remote(Pin(number, pinned, time.time()))
            (self._pinned.add if pinned else self._pinned.discard)(number)
        return {"number": number, "pinned": pinned}

    async def versions(self, last: int | None = None) -> list[dict[str, Any]]:
        """What is known of each version, or of the `last` ones, oldest first."""
        _require("last", last, int | None)
        entries, _ = await self._told(await self._known())
        return entries if last is None else entries[max(0, len(entries) - last) :]

    async def diff(self, one: int, other: int) -> dict[str, Any]:
        """Two versions side by side, and which turns made the difference: ids, never what was said."""
        registry = await self._known()
        for number in (one, other):
            _require("number", number, int)
            registry.state(number)
        entries, records = await self._told(registry)
        between = apart(registry, one, other)
        turns = [turn for record in records if record.number in between for turn in record.samples]
        authors = await self._journal.authors.remote(turns)
        chosen = {entry["number"]: entry for entry in entries}
        return difference([chosen[one], chosen[other]], between, records, authors)

    async def export(self, number: int, folder: str) -> dict[str, Any]:
        """Copy a version as a plain Hugging Face folder on this actor's machine; nothing is overwritten."""
        _require("number", number, int)
        _require("folder", folder, str)
        registry = await self._known()
        registry.state(number)
        async with self._removing:
            await self._require_checkpoint(number)
            self._exporting.append(number)
        try:
            await asyncio.to_thread(export_checkpoint, self._checkpoint(number), Path(folder))
        finally:
            self._exporting.remove(number)
        return {"number": number, "folder": folder}

    async def trainer_failed(self, why: str) -> None:
        """The trainer tells what ended its workers; `status` tells it on until there is a version."""
        self._trainer_failed = why

    async def status(self) -> dict[str, Any]:
        """Everyone's desired, serving and head versions, the state of each, and what replicas seen lately said last.

        `unproven` counts candidates that replicas should serve to whom they serve; `users` those who have their own.
        """
        registry = await self._known()
        now = time.monotonic()
        alive = {name: each for name, each in self._replicas.items() if now - each.seen < REPLICA_FORGOTTEN_S}
        followed = {GROUP, *(scope for each in alive.values() for scope in each.versions)}
        return {
            "desired": registry.desired(),
            "serving": registry.serving(),
            "head": registry.head(),
            "states": registry.states(),
            "users": len(registry.scopes()) - 1,
            "unproven": sum(registry.state(registry.desired(each)) == "candidate" for each in followed),
            "replicas": {name: each.versions.get(GROUP) for name, each in alive.items()},
            "stall_ms": {name: each.stall_ms for name, each in alive.items()},
            "canary_error": {name: each.canary_error for name, each in alive.items()},
            "in_memory": sorted(self._held),
            "last_step": self._last_step,
            **({} if self._trainer_failed is None else {"trainer_failed": self._trainer_failed}),
        }

    async def standing(self) -> dict[int, tuple[VersionState, str]]:
        """The state and scope of every version."""
        registry = await self._known()
        return {number: (state, registry.scope(number)) for number, state in registry.states().items()}

    async def close(self) -> None:
        """Let every waiting replica go."""
        self._closed = True
        await self._wake()

    async def forget(
        self, user: str | None = None, session: str | None = None, retrain: bool = False, yes: bool = False
    ) -> dict[str, Any]:
        """Erase what a user, or one session, said; see `training/forgetting` for what it means for the versions.

        Without `yes` only what would be done is told. Raises ClawrlError if it is not clear whose content is meant.
        """
        for name, flag in (("retrain", retrain), ("yes", yes)):
            _require(name, flag, bool)
        registry = await self._known()
        async with self._offering, self._removing, self._deciding:
            await self._catch_up(registry)
            whose = owner(user, session, [] if user or not session else await self._journal.owners.remote(session))
            found, versions, events = await asyncio.gather(
                self._journal.content.remote(whose, session),
                self._journal.versions.remote(), self._journal.version_events.remote(),
            )  # fmt: skip
            on_disk = await asyncio.to_thread(_numbers, self._folder)
            planned = plan(whose, session, found, versions, events, retrain=retrain, on_disk=on_disk, at=time.time())
            if not yes:
                return planned.told(done=False)
            with self._recording():
                await self._journal.erase.remote(planned.erasure, planned.records())
            registry.apply(planned.events)
            self._pinned -= set(planned.pinned)
            for number in planned.checkpoints:
                self._held.pop(number, None)
                self._canaries.pop(number, None)
                await asyncio.to_thread(shutil.rmtree, self._folder / str(number))
            whole = whose if session is None else None
            await asyncio.to_thread(self._remove_traces, registry, planned.checkpoints, whole)
        logger.warning("event=forgotten turns=%d restored=%s", planned.erasure.turns, planned.erasure.restored)
        await self._wake()
        return planned.told(done=True, unwiped=await self._scrub())

    async def _scrub(self) -> str | None:
        """Overwrite what was erased, last and without locks: it takes long, and can be repeated. Why it failed."""
        try:
            await self._journal.scrub.remote()
        except Exception as error:
            reason = str(getattr(error, "cause", None) or error)  # Ray's own message is a traceback
            logger.error("event=scrub_failed reason=%r remedy='forget again'", reason)
            return reason
        return None

    # --- inside ---

    async def _known(self) -> Registry:
        """The registry, rebuilt from the journal on the first call of this actor's life."""
        async with self._recovery:
            if self._registry is None:
                versions, events, pins = await asyncio.gather(
                    self._journal.versions.remote(), self._journal.version_events.remote(), self._journal.pins.remote()
                )
                registry = Registry(versions, events)
                if versions and not self._folder.is_dir():
                    raise WeightSyncError(f"{self._folder} is missing, and {len(versions)} versions in it; restore it")
                await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
                await self._reject_damaged(registry)
                latest = {pin.version: pin.pinned for pin in pins}
                self._pinned = {number for number, pinned in latest.items() if pinned}
                self._last_step = versions[-1].metrics if versions else {}
                metric("versions/latest_num").set(registry.head())
                self._registry = registry
            registry = self._registry
        if self._behind:
            async with self._deciding:
                await self._catch_up(registry)
            await self._wake()
        return registry

    async def _catch_up(self, registry: Registry) -> None:
        """Read the journal again if it may know more. Who calls holds `_deciding`, so nothing is recorded meanwhile."""
        if self._behind:
            events = await self._journal.version_events.remote()
            registry.read(await self._journal.versions.remote(), events)  # read later: each event's is among them
            self._behind = False

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Around every append that changes versions: if it fails, it may still have been committed."""
        try:
            yield
        except BaseException:
            self._behind = True
            raise

    async def _reject_damaged(self, registry: Registry) -> None:
        """A version whose checkpoint cannot be read cannot serve or be trained from: its parent does, if that one can.

        Nothing is removed or overwritten.
        """
        while damage := await asyncio.to_thread(self._damage, registry):
            number, reason = damage
            logger.error("event=checkpoint_damaged version=%d reason=%s", number, reason)
            await self._decide(
                registry,
                lambda changed, number=number, reason=reason: changed.reject(
                    number, f"checkpoint damaged: {reason}", time.time()
                ),
            )

    def _damage(self, registry: Registry) -> tuple[int, str] | None:
        """The newest version in use whose checkpoint cannot be read, and why."""
        used = {each for scope in registry.scopes() for each in (registry.head(scope), registry.desired(scope))}
        for number in sorted(used - {0}, reverse=True):
            try:
                require_whole(self._folder / str(number))
            except WeightSyncError as error:
                return number, str(error)
        return None

    async def _enter(self, registry: Registry, version: WeightVersion, refused: str | None = None) -> bool:
        """Record a version as a candidate, or at once as rejected.

        False if its parent was rejected meanwhile, or some samples withdrawn.
        """
        async with self._deciding:
            await self._catch_up(registry)
            if version.parent is not None and registry.state(version.parent) == "rejected":
                return False
            event = registry.candidate(version.number, version.parent, time.time(), version.scope)
            if refused is not None:
                event = replace(event, state="rejected", reason=refused)
            try:
                with self._recording():
                    await self._journal.record_version.remote(version, event)
            except WithdrawnError as error:
                logger.warning("event=version_withdrawn version=%d reason=%r", version.number, str(error))
                return False
            registry.add(event, version.parent, version.scope)
        return True

    async def _decide(
        self, registry: Registry, change: Callable[[Registry], list[VersionEvent]], *records: Any
    ) -> list[VersionEvent]:
        """Change the registry once the journal has the events, and `records` with them: both or neither."""
        async with self._deciding:
            await self._catch_up(registry)
            events = change(registry.copy())
            if events or records:
                with self._recording():
                    await self._journal.append.remote(*records, *events)
            registry.apply(events)
        await self._wake()
        return events

    async def _told(self, registry: Registry) -> tuple[list[dict[str, Any]], list[WeightVersion]]:
        """All versions as `history.listing` tells them, and their records."""
        versions, events, decisions = await asyncio.gather(
            self._journal.versions.remote(), self._journal.version_events.remote(),
            self._journal.gate_decisions.remote(),
        )  # fmt: skip
        on_disk = {0, *await asyncio.to_thread(_numbers, self._folder)}
        return listing(registry, versions, events, decisions, pinned=self._pinned, on_disk=on_disk), versions

    def _checkpoint(self, number: int) -> Path:
        return self._base if number == 0 else self._folder / str(number)

    async def _require_checkpoint(self, number: int) -> None:
        """Raises WeightSyncError if a version's checkpoint is gone or damaged, naming those that can be had."""
        if number == 0:
            return
        folder = self._folder / str(number)
        if not folder.is_dir():
            kept = ", ".join(map(str, sorted({0, *await asyncio.to_thread(_numbers, self._folder)})))
            raise WeightSyncError(
                f"the checkpoint of version {number} is no longer in {self._folder}, those of {kept} are; "
                "raise versions.keep or pin versions to keep more"
            )
        await asyncio.to_thread(require_whole, folder)

    async def _wake(self) -> None:
        async with self._change:
            self._change.notify_all()

    async def _loaded(self, number: int) -> list[ray.ObjectRef]:
        """References to a version's buckets, from memory or else read from its checkpoint."""
        (await self._known()).state(number)
        if number == 0 and self._adapter is not None:
            return []  # the base itself, which everyone has
        if number not in self._held:
            folder = self._checkpoint(number)
            logger.info("event=version_read version=%d folder=%s", number, folder)
            refs = await asyncio.to_thread(_put_all, folder, self._settings.bucket_mib << 20)
            self._held.setdefault(number, dict(enumerate(refs)))
        held = self._held[number]
        return [held[index] for index in sorted(held)]

    async def _publication(self, registry: Registry, scope: str) -> Publication | Withdrawal:
        """What a scope's requests should be served by."""
        number = registry.own(scope)
        if number is None:
            return Withdrawal(scope)
        canary = await self._canary(number)
        if canary is None:
            raise WeightSyncError(f"version {number} has no canary; its folder {self._folder / str(number)} is damaged")
        adapter = self._adapter if number else None
        return Publication(number, len(await self._loaded(number)), canary, adapter, scope)

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
        """Drop what is beyond `keep_in_memory` and, of each policy, `keep`; desired, serving, head and pinned stay on
        disk.
        """
        numbers = sorted(number for number in self._held if number in registry)
        for number in set(numbers[: -self._settings.keep_in_memory]) - _in_use(registry, GROUP):
            del self._held[number]
        async with self._removing:
            newest = registry.newest(self._settings.keep)
            needed = (number for scope in registry.scopes() for number in _in_use(registry, scope))
            stay = {*newest, *needed, *self._pinned, *self._exporting, 0}
            for number in set(self._canaries) - stay:
                del self._canaries[number]
            await asyncio.to_thread(_remove_others, self._folder, stay)

    def _remove_traces(self, registry: Registry, numbers: Collection[int], user: str | None = None) -> None:
        """Remove from disk what the trainer kept with these versions, and with one that it did not get recorded.

        Of a user's own policy all that there is.

        For who holds `_offering`: also what is half written.
        """
        states = self._folder.parent / "trainer"
        remove_states(states, {*numbers, registry.next_number})
        if user is not None:
            shutil.rmtree(states / states_of(user), ignore_errors=True)
        remove_unfinished(self._folder)


def _can_return(registry: Registry, number: int, on_disk: Collection[int]) -> bool:
    """Whether what serves once a version is rejected can be had: its parent, or everyone's if it is a user's first."""
    parent = registry.parent(number)
    return parent is not None and (parent in on_disk or registry.scope(parent) != registry.scope(number))


def _due(registry: Registry, versions: Mapping[str, int | None]) -> str | None:
    """The first scope that a replica serves another version to than it should."""
    return next((scope for scope, number in versions.items() if registry.own(scope) != number), None)


def _in_use(registry: Registry, scope: str) -> set[int | None]:
    return {registry.desired(scope), registry.serving(scope), registry.head(scope)}


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


def _require(name: str, value: Any, kind: Any) -> None:
    """Acts come from outside, where JSON holds anything. Raises WeightSyncError for a value of another type."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise WeightSyncError(f"{name}={value!r} is not of type {getattr(kind, '__name__', kind)}")
