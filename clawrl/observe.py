"""Metric names, logging and the run directory.

Knows every metric clawrl exports (`METRICS`) and where a run writes. Ignores who measures. Metrics go through
`ray.util.metrics`, so they appear at Ray's Prometheus endpoint as `ray_clawrl_<area>_<name>_<unit>`.
"""

from __future__ import annotations

import fcntl
import logging
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any, TextIO

METRICS: dict[str, tuple[str, str]] = {
    "gateway/requests_num": ("counter", "Requests answered, failed ones included."),
    "gateway/failures_num": ("counter", "Requests that ended in a 5xx or a broken stream."),
    "gateway/first_token_s": ("histogram", "Seconds from request to first streamed delta."),
    "policy/stall_s": ("histogram", "Seconds an engine stood paused to take over a version."),
    "policy/version_num": ("gauge", "Weight version a replica serves."),
    "policy/canary_error_nat": ("gauge", "Largest |engine - trainer| log-probability over the canary."),
    "judge/latency_s": ("histogram", "Seconds to judge one turn."),
    "judge/abstentions_num": ("counter", "Judgements without a score."),
    "collector/reward_score": ("gauge", "Running mean of judged scores."),
    "collector/samples_num": ("counter", "Samples built."),
    "collector/score_failures_num": ("counter", "Teacher or reference scores that failed; their term is dropped."),
    "journal/append_s": ("histogram", "Seconds from append to durable."),
    "buffer/size_num": ("gauge", "Samples waiting to be trained on."),
    "buffer/offline_num": ("gauge", "Samples beyond max_lag that wait for their share of a batch."),
    "buffer/replayed_num": ("counter", "Samples beyond max_lag that were trained on."),
    "buffer/dropped_num": ("counter", "Samples dropped as too old."),
    "trainer/step_num": ("gauge", "Optimizer steps taken."),
    "trainer/loss_value": ("gauge", "Loss of the last step."),
    "trainer/lag_num": ("gauge", "Mean versions between sampling and training in the last batch."),
    "pool/episodes_num": ("counter", "Attempts of environments that ended, however they did."),
    "pool/envs_num": ("gauge", "Environments that a pool's workers hold."),
    "pool/outcome_score": ("gauge", "Mean outcome of the newest group of attempts, -1 to 1."),
    "versions/latest_num": ("gauge", "Newest published version."),
    "versions/gate_rejections_num": ("counter", "Versions rejected before they served anybody."),
    "versions/rollbacks_num": ("counter", "Versions taken back by the watch."),
}
_LATENCY_BUCKETS_S = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]


@cache
def metric(name: str) -> Any:
    """The Ray metric object of a name in METRICS (one per process): `.set`, `.inc` or `.observe` it."""
    from ray.util import metrics

    kind, description = METRICS[name]
    exported = "clawrl_" + name.replace("/", "_")
    if kind == "histogram":
        return metrics.Histogram(exported, description, boundaries=_LATENCY_BUCKETS_S)
    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[kind](exported, description)


def set_up_logging(level: int = logging.INFO) -> None:
    """One `key=value` line per event on stderr; called by `cli` and `jobs` only."""
    logging.basicConfig(
        level=level, stream=sys.stderr, format="time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
    )
    for chatty in ("httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def open_run(root: str | Path, run: str) -> tuple[Path, bool]:
    """The folder of a run, and whether it was made now; `point_latest` makes it the one to go on with.

    `new` makes one, `latest` is the newest or the first, anything else a folder's name. Raises OSError as the file
    system gives it; FileNotFoundError for a named run that is not there.
    """
    root = Path(root).resolve()
    if run == "new" or (run == "latest" and not (root / "latest").exists()):
        return new_run_directory(root), True
    folder = (root / run).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(2, "no such run", str(folder))
    return folder, False


def lock_run(folder: Path) -> TextIO:
    """Hold a run for this process: the lock ends when the file is closed or the process does, however it ends.

    Raises BlockingIOError if another process holds it.
    """
    held = (folder / ".lock").open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise
    return held


def new_run_directory(root: str | Path) -> Path:
    """Make `root/<UTC time>` (with a suffix if taken).

    Raises OSError as the file system gives it (no space, no permission).
    """
    root = Path(root).resolve()
    root.mkdir(parents=True, exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for attempt in range(100):
        folder = root / (stamp if attempt == 0 else f"{stamp}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"{root} has a hundred runs named {stamp}")


def point_latest(root: str | Path, folder: Path) -> None:
    """Make `root/latest` name this run. Raises OSError as the file system gives it."""
    root = Path(root).resolve()
    fresh = root / f".latest-{folder.name}"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.relative_to(root) if folder.is_relative_to(root) else folder)
    fresh.replace(root / "latest")
