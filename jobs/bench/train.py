"""The trainer's throughput against a plain PyTorch loop on the same samples with as many threads.

Both loops stand in `jobs/train_bench.py`: the trainer is the Ray Train group of the product (FSDP2, packed rows), fed
through journal, buffer and weight store; the plain loop is one process with AdamW on batches padded to their longest
sample, logits for every position. They take turns batch by batch, one idle while the other works.
"""

from __future__ import annotations

from typing import Any

import ray

from clawrl import main
from clawrl.config import Config
from jobs.bench.figures import Figure
from jobs.train_bench import compare

GOAL = 0.8


def measure(config: Config, *, steps: int) -> tuple[list[Figure], dict[str, Any]]:
    settings = config.trainer.model_copy(update={"nice": 0})  # as little in the way of others as the plain loop is
    main.join_ray()
    try:
        found = compare(
            config.policy.model,
            settings=settings,
            learning=config.learning,
            steps=steps,
            batch_size=config.buffer.batch_size,
        )
    finally:
        ray.shutdown()
    figures = [
        Figure("trainer / plain loop", found["ratio"], at_least=GOAL),
        Figure("  lowest step", found["ratio_lowest"]),
        Figure("  highest step", found["ratio_highest"]),
        Figure("trainer", found["trainer_tokens_per_s"], "tokens/s"),
        Figure("trainer, publishing counted", found["trainer_published_tokens_per_s"], "tokens/s"),
        Figure("plain loop", found["plain_tokens_per_s"], "tokens/s"),
        Figure("publish", 1000 * found["publish_s"], "ms"),
        Figure("threads of each", found["threads"]),
    ]
    return figures, dict(found)
