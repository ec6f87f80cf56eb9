"""What running streams feel when versions are swapped in under them.

A publisher holds the model as the trainer does and offers perturbed versions through the real weight store, with the
canary that the perturbed model gives; the policy replica takes each over while streams run. A swap's window goes from
the offer to the replica's report; its gap is the longest time between two chunks of one stream that touches it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from clawrl.config import Config, model_path
from clawrl.types import Bucket, Swap, WeightVersion
from jobs.bench import client
from jobs.bench.figures import Figure, Stream, longest_gap, percentile
from jobs.bench.stage import Stage, stage

GOAL_MS = 200.0
REST_S = 0.5  # between two swaps, where the streams' own gaps are measured
PATIENCE_S = 60.0
NOISE = 0.02  # of each tensor's own spread


@dataclass(frozen=True, slots=True)
class Window:
    """When a version was offered, and how its swap went."""

    offered: float
    swap: Swap


class Publisher:
    """An actor that publishes as the trainer's rank 0 of 1 does, without training."""

    def __init__(self, config: Config, store: Any) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        from clawrl.training.learner import Learner
        from clawrl.training.rank import canary_sequences

        os.nice(config.trainer.nice)
        torch.set_num_threads(config.trainer.threads)
        with tempfile.TemporaryDirectory() as meeting:
            dist.init_process_group("gloo", init_method=f"file://{meeting}/rank", rank=0, world_size=1)
        folder = model_path(config.policy.model)
        self._learner = Learner(folder, config.trainer, config.learning, init_device_mesh("cpu", (1,)))
        self._bucket_bytes = config.versions.bucket_mib << 20
        self._base = [bucket for bucket in self._learner.buckets(self._bucket_bytes) if bucket is not None]
        self._canary, self._store = canary_sequences(folder), store
        ray.get(store.anchor.remote(0, self._learner.canary(self._canary)))

    def publish(self, number: int) -> float:
        """Offer version `number`, a perturbation of version 0; returns the time of the offer."""
        self._learner.load(self._perturbed(number))
        buckets = [bucket for bucket in self._learner.buckets(self._bucket_bytes) if bucket is not None]
        ray.get([self._store.hold.remote(number, index, bucket) for index, bucket in enumerate(buckets)])
        canary = self._learner.canary(self._canary)
        version = WeightVersion(number, number - 1, "full", None, (), {}, time.time())
        offered = time.time()
        if not ray.get(self._store.offer.remote(version, len(buckets), canary)):
            raise RuntimeError(f"version {number} was refused: its parent failed its canary")
        return offered

    def _perturbed(self, seed: int) -> Iterator[Bucket]:
        rng = np.random.default_rng(seed)
        for bucket in self._base:
            arrays = tuple(_noisy(array, dtype, rng) for array, dtype in zip(bucket.arrays, bucket.dtypes, strict=True))
            yield Bucket(bucket.names, ("float32",) * len(arrays), bucket.shapes, arrays)


def _noisy(array: np.ndarray, dtype: str, rng: np.random.Generator) -> np.ndarray:
    import torch

    plain = torch.from_numpy(array.copy()).view(getattr(torch, dtype)).float().numpy()
    return plain + NOISE * plain.std() * rng.standard_normal(plain.shape, np.float32)


def measure(config: Config, *, swaps: int, streams: int, num_tokens: int) -> tuple[list[Figure], dict[str, Any]]:
    with stage(config, with_store=True) as running:
        publisher: Any = ray.remote(Publisher).options(num_cpus=0.2).remote(config, running.store)
        windows, seen = asyncio.run(_measure(running, publisher, swaps, streams, num_tokens))
    return _figures(windows, seen, streams)


async def _measure(
    running: Stage, publisher: Any, swaps: int, streams: int, num_tokens: int
) -> tuple[list[Window], list[Stream]]:
    seen: list[Stream] = []
    ending = asyncio.Event()

    async def talk(http: Any, user: int) -> None:
        """One stream after the other until the last swap is over; the last one ends by itself."""
        while not ending.is_set():
            asked = [{"role": "user", "content": f"{user}.{len(seen)}: tell me a long story, please."}]
            seen.append(await client.stream(http, running.url, asked, num_tokens))

    async with client.session() as http:
        await publisher.publish.remote(1)  # everything compiled and connected, nobody there yet
        await _swapped(running, 1)
        users = [asyncio.create_task(talk(http, user)) for user in range(streams)]
        windows: list[Window] = []
        try:
            await asyncio.sleep(1.0)
            for number in range(2, swaps + 2):
                offered = await publisher.publish.remote(number)
                windows.append(Window(offered, await _swapped(running, number)))
                await asyncio.sleep(REST_S)
        finally:
            ending.set()
            await asyncio.gather(*users)
    return windows, seen


async def _swapped(running: Stage, number: int) -> Swap:
    """The report of a version's swap, as soon as it is in the journal."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for swap in await running.journal.swaps.remote():
            if swap.version == number:
                return swap
        await asyncio.sleep(0.05)
    raise RuntimeError(f"version {number} was offered and not taken over within {PATIENCE_S:.0f} s")


def _figures(windows: list[Window], seen: list[Stream], streams: int) -> tuple[list[Figure], dict[str, Any]]:
    gaps = [1000 * longest_gap(seen, window.offered, window.swap.at) for window in windows]
    calm = [1000 * longest_gap(seen, window.swap.at + 0.05, window.swap.at + REST_S - 0.05) for window in windows]
    stalls = [window.swap.stall_ms for window in windows]
    errors = [window.swap.canary_error or 0.0 for window in windows]
    moved = [window.swap.canary_moved or 0.0 for window in windows]
    whole = [stream for stream in seen if stream.error is None]
    figures = [
        Figure("longest gap of a swap, median", percentile(gaps, 0.5), "ms", at_most=GOAL_MS),
        Figure("longest gap of a swap, max", max(gaps), "ms", at_most=GOAL_MS),
        Figure("  the same between swaps, median", percentile(calm, 0.5), "ms"),
        Figure("  the same between swaps, max", max(calm), "ms"),
        Figure("engine paused, median", percentile(stalls, 0.5), "ms"),
        Figure("engine paused, max", max(stalls), "ms"),
        Figure("swaps under load", len(windows)),
        Figure("streams at a time", streams),
        Figure("streams in all", len(seen)),
        Figure("streams failed or cut", len(seen) - len(whole), at_most=0),
        Figure("canary error, max", max(errors), "nats"),
        Figure("canary moved, min", min(moved), "nats"),
        Figure("tokens streamed", sum(stream.num_tokens for stream in seen)),
    ]
    details = {
        "gap_ms": gaps,
        "calm_gap_ms": calm,
        "stall_ms": stalls,
        "took_over_ms": [1000 * (window.swap.at - window.offered) for window in windows],
        "errors": [stream.error for stream in seen if stream.error],
    }
    return figures, details
