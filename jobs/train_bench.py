"""Trainer throughput: the real trainer on synthetic turns, against the loop one would write without it.

Knows both loops and how to time them on the same samples and the same number of threads. Ignores tables and limits:
`jobs.bench train` prints them. The plain loop is one process, pads every batch to its longest sample and makes logits
for every position; the trainer's figure is that of its Ray Train worker group, with journal, buffer and weight store.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from clawrl.config import BufferSection, LearningSection, TrainerSection, VersionsSection, model_path
from clawrl.types import Distillation, Sample

WARM_UP_STEPS = 2


def compare(
    model: str = "clawrl:tiny",
    *,
    settings: TrainerSection | None = None,
    learning: LearningSection | None = None,
    steps: int = 12,
    batch_size: int = 16,
) -> dict[str, float]:
    """Medians of tokens/s of both loops, and of the ratio step by step. Needs `ray.init` before.

    The loops take turns on each batch, the other one idle, so that a change of the machine's load meets both alike.
    Ratios are of wall time, and still worth little where `load` (1-minute average, this benchmark's own share
    included) is far above `threads`: threads that spin for each other lose more to strangers than processes do.
    """
    settings = settings or TrainerSection(nice=0)
    learning = learning or LearningSection()
    folder = model_path(model)
    batches = [synthetic_batch(step, batch_size, learning.support) for step in range(WARM_UP_STEPS + steps)]
    threads = settings.workers * settings.threads
    plain, update, published, publish, load = [], [], [], [], []
    for batch, rate, version in zip(
        batches,
        plain_loop(folder, batches, settings, learning, threads),
        trainer_loop(folder, batches, settings, learning),
        strict=True,
    ):
        tokens = sum(len(sample.token_ids) for sample in batch)
        plain.append(rate)
        update.append(tokens / version.metrics["seconds"])
        published.append(tokens / (version.metrics["seconds"] + version.metrics["publish_s"]))
        publish.append(version.metrics["publish_s"])
        load.append(os.getloadavg()[0])
    timed = slice(WARM_UP_STEPS, None)
    ratios = np.array(update[timed]) / np.array(plain[timed])
    return {
        "threads": float(threads),
        "load": statistics.median(load[timed]),
        "plain_tokens_per_s": statistics.median(plain[timed]),
        "trainer_tokens_per_s": statistics.median(update[timed]),
        "trainer_published_tokens_per_s": statistics.median(published[timed]),
        "publish_s": statistics.median(publish[timed]),
        "ratio": float(np.median(ratios)),
        "ratio_lowest": float(ratios.min()),
        "ratio_highest": float(ratios.max()),
    }


def synthetic_batch(step: int, batch_size: int, k: int, vocabulary: int = 1500) -> list[Sample]:
    """Turns of the embedded default's shape (prompts of 60-260 tokens, replies of 20-80) with every term."""
    rng = np.random.default_rng(step)
    return [_synthetic_sample(rng, f"bench-{step}-{i}", k, vocabulary, step) for i in range(batch_size)]


def _synthetic_sample(rng: np.random.Generator, name: str, k: int, vocabulary: int, version: int) -> Sample:
    prompt, reply = int(rng.integers(60, 260)), int(rng.integers(20, 80))
    length = prompt + reply
    mask = np.arange(length) >= prompt
    logprobs = np.where(mask, -2.0, 0.0).astype(np.float32)
    target = Distillation(
        support=rng.integers(0, vocabulary, (length, k)).astype(np.int32),
        behaviour_logprobs=np.full((length, k), -2.0, np.float32),
        advantages=rng.normal(0, 0.2, (length, k)).astype(np.float32),
        valid=np.repeat(mask[:, None], k, axis=1),
    )
    return Sample(
        id=name,
        user="bench",
        source="bench",
        token_ids=rng.integers(0, vocabulary, length).astype(np.int32),
        loss_mask=mask,
        logprobs=logprobs,
        advantages=np.where(mask, rng.choice([-1.0, 1.0]), 0).astype(np.float32),
        distillation=target,
        reference_logprobs=logprobs,
        oldest_version=version,
        newest_version=version,
        weight=1.0,
        at=0.0,
    )


def plain_loop(
    folder: str, batches: Sequence[Sequence[Sample]], settings: TrainerSection, learning: LearningSection, threads: int
) -> Iterator[float]:
    """Tokens/s (padding not counted) of each step of a single-process PyTorch loop with the same objective."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )
    for batch in batches:
        started = time.perf_counter()
        loss = _padded_loss(model, batch, learning)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        yield sum(len(sample.token_ids) for sample in batch) / (time.perf_counter() - started)


def _padded_loss(model: Any, batch: Sequence[Sample], learning: LearningSection) -> Any:
    """Clipped surrogate, top-k distillation and k3, over a batch padded to its longest sample, [B, L]."""
    import torch

    longest = max(len(sample.token_ids) for sample in batch)

    def padded(name: str, owner: str | None = None) -> torch.Tensor:
        arrays = [getattr(getattr(sample, owner) if owner else sample, name) for sample in batch]
        widths = [(0, 0)] * (arrays[0].ndim - 1)
        return torch.from_numpy(np.stack([np.pad(a, [(0, longest - len(a)), *widths]) for a in arrays]))

    ids, mask = padded("token_ids").long(), padded("loss_mask").float()[:, 1:]
    attention = torch.arange(longest)[None] < torch.tensor([len(sample.token_ids) for sample in batch])[:, None]
    table = model(ids, attention_mask=attention.long()).logits[:, :-1].log_softmax(-1)
    logprobs = table.gather(-1, ids[:, 1:, None])[..., 0]
    support = table.gather(-1, padded("support", "distillation").long()[:, 1:])

    def surrogate(now: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
        ratio = (now - old).exp()
        bounded = ratio.clamp(1 - learning.clip.low, 1 + learning.clip.high)
        return torch.minimum(ratio * advantages, bounded * advantages)

    tokens = surrogate(logprobs, padded("logprobs")[:, 1:], padded("advantages")[:, 1:])
    old, worth = padded("behaviour_logprobs", "distillation"), padded("advantages", "distillation")
    tokens = tokens + surrogate(support, old[:, 1:], worth[:, 1:]).sum(-1)
    drift = padded("reference_logprobs")[:, 1:] - logprobs
    tokens = tokens - learning.kl_weight * (drift.exp() - 1 - drift)
    return -((tokens * mask).sum(-1) / mask.sum(-1)).mean()


def trainer_loop(
    folder: str, batches: Sequence[Sequence[Sample]], settings: TrainerSection, learning: LearningSection
) -> Iterator[Any]:
    """The version that the real trainer makes of each batch, with its metrics; it gets a batch when asked to go on."""
    import ray

    from clawrl.journal.actor import Journal
    from clawrl.training.buffer import ReplayBuffer
    from clawrl.training.trainer import TrainLoop, run_trainer
    from clawrl.training.weights import WeightStore

    with tempfile.TemporaryDirectory(prefix="clawrl-bench-") as run_directory:
        journal: Any = ray.remote(Journal).options(num_cpus=0).remote(f"sqlite:///{run_directory}/journal.sqlite")
        versions = VersionsSection()
        store: Any = ray.remote(WeightStore).options(num_cpus=0).remote(versions, journal, run_directory, folder)
        section = BufferSection(batch_size=len(batches[0]), max_lag=len(batches))
        buffer: Any = ray.remote(ReplayBuffer).options(num_cpus=0).remote(section, journal)
        loop = TrainLoop(settings, learning, versions, folder, buffer, store)
        thread = threading.Thread(target=run_trainer, args=(loop, run_directory), daemon=True)
        thread.start()
        for step, batch in enumerate(batches, start=1):
            ray.get(journal.append.remote(*batch))
            while _head(store) < step:
                if not thread.is_alive():
                    raise RuntimeError(f"the trainer ended before step {step}; see its log")
                time.sleep(0.05)
            yield ray.get(journal.versions.remote())[-1]
        ray.get(buffer.close.remote())
        thread.join()
        for actor in (store, buffer, journal):
            ray.kill(actor)


def _head(store: Any) -> int:
    import ray

    head: Any = ray.get(store.latest.remote())
    return head.number


if __name__ == "__main__":
    import json

    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    print(json.dumps(compare(), indent=1))
