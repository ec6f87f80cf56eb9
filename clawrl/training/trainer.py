"""The trainer: a Ray Train worker group that turns leased batches into weight versions, and another when it fails.

    run_trainer ─► controller ─► N ranks, each `rank.train_rank` ─► until the buffer closes

Knows Ray Train and when to give up. What the ranks do is in `rank`; only they load the model's libraries, which takes
longer than all else here.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError

from clawrl.config import GateSection, LearningSection, LoraSection, TrainerSection, VersionsSection
from clawrl.errors import ClawrlError
from clawrl.training.weights import Head

logger = logging.getLogger(__name__)

LONGEST_PAUSE_S = 30.0
"""Between a worker group that failed and the next."""

MAX_REASON = 400
RETRY_S = 2.0

COLLECTIVE_TIMEOUT_S = 600
"""A rank that answers no collective for so long is taken for dead."""


@dataclass(frozen=True, slots=True)
class TrainLoop:
    """All that a worker needs; it travels to every rank."""

    trainer: TrainerSection
    learning: LearningSection
    versions: VersionsSection
    model: str  # folder or Hugging Face name of version 0
    buffer: Any  # handles of the actors
    store: Any
    journal: Any = None  # asked for held-out turns; needed where the gate is enabled
    gate: GateSection = field(default_factory=lambda: GateSection(enabled=False))
    lora: LoraSection | None = None  # versions are adapters


def run_trainer(
    loop: TrainLoop, run_directory: str, *, cpus_per_worker: float = 0.25, name: str = "clawrl-trainer"
) -> None:
    """Train until the buffer closes. Blocks; whatever ends a worker group or its controller, another one goes on.

    A controller makes up to `max_failures` new groups by itself, which is quicker than a new controller. Raises
    ClawrlError when more than `max_failures` controllers failed since the newest version was made, and ActorDiedError
    when the store is gone for good. The store knows of failures meanwhile, for `clawrl status`.
    """
    failures, known = 0, _next_number(loop.store)
    while True:
        try:
            return _fit(loop, run_directory, cpus_per_worker, name)
        except Exception as error:
            before, known = known, _next_number(loop.store)
            failures = 1 if known > before else failures + 1
            said = reason(error)
            why = f"{failures} in a row without a version: {said}"
            logger.warning("event=trainer_failed failures=%d error=%s", failures, said)
            loop.store.trainer_failed.remote(why)
            if failures > loop.trainer.max_failures:
                raise ClawrlError(f"worker groups failed, {why}") from error
            time.sleep(min(2.0**failures, LONGEST_PAUSE_S))


def reason(error: Exception) -> str:
    """What ended a controller, on one line; of workers that failed what each said, which may be the same."""
    workers = getattr(error, "worker_failures", {})
    if workers:
        return "; ".join(dict.fromkeys(_last_words(workers[rank]) for rank in sorted(workers)))[:MAX_REASON]
    error = getattr(error, "controller_failure", error)
    return f"{type(error).__name__}: {_last_words(error)}"[:MAX_REASON]


def _last_words(error: Exception) -> str:
    """The first line of a message, or of the one that ends a traceback, whose other lines are indented."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    indented = [number for number, line in enumerate(lines) if line.startswith("  ")]
    return lines[min(indented[-1] + 1, len(lines) - 1) if indented else 0]


def _next_number(store: Any) -> int:
    """The number of the next version, as soon as the store can tell. Raises ActorDiedError if it never will."""
    while True:
        try:
            head: Head = ray.get(store.latest.remote())
            return head.next_number
        except ActorDiedError:
            raise
        except Exception as error:
            logger.warning("event=trainer_waits error=%s retry_s=%g", type(error).__name__, RETRY_S)
            time.sleep(RETRY_S)


def _fit(loop: TrainLoop, run_directory: str, cpus_per_worker: float, name: str) -> None:
    """One Ray Train run, from a new controller to the buffer's end."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    settings = loop.trainer
    resources: dict[str, float] = {"CPU": cpus_per_worker}
    if settings.gpus_per_worker:
        resources["GPU"] = settings.gpus_per_worker
    TorchTrainer(
        _train_rank,
        train_loop_config={"loop": loop, "checkpoints": Path(run_directory) / "trainer"},
        torch_config=TorchConfig(
            backend="cpu:gloo,cuda:nccl" if settings.gpus_per_worker else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=run_directory,
            failure_config=ray.train.FailureConfig(max_failures=settings.max_failures),
        ),
    ).fit()


def _train_rank(config: dict[str, Any]) -> None:
    """Ray Train's train function. Its controller and other actors load this module as well, and nothing heavy by it."""
    from clawrl.training.rank import train_rank

    train_rank(config["loop"], config["checkpoints"])
