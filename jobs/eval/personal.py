"""`jobs.eval personal`: which objective adapts to a person fastest, and at what price? Runs of `jobs.demo`.

A run is the demonstration: a simulated person, held-out problems before and after. Measured are first replies as the
person likes them (the personalisation score), right ones, and those that show the working: what a style that is learnt
must not cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from clawrl.cli import config_of
from jobs.eval.plan import Plan, arms_of, parse_seeds
from jobs.eval.series import Job, add_options, evaluate

ARMS = {
    "hybrid": ("learning.method=hybrid",),
    "rl": ("learning.method=rl",),
    "opd": ("learning.method=opd",),
    "opd-token": ("learning.method=opd", "learning.distillation=token"),
    "random-hint": ("learning.method=hybrid", "learning.hint_rule=random"),
}
MEASURES = {"liked": "score", "right": "correct", "working shown": "shows_work"}
"""Names of what is measured, and of the report's fields."""


def parser() -> argparse.ArgumentParser:
    about = "objectives and seeds with a simulated person: first replies to held-out problems before and after"
    parser = argparse.ArgumentParser(prog="python -m jobs.eval personal", description=about)
    add_options(parser, words=", ".join(ARMS), arms="hybrid,rl,opd,opd-token", seeds=5)
    parser.add_argument("--conversations", type=int, default=400, help="of each run (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems (default: %(default)s)")
    return parser


def run(options: argparse.Namespace, command: str) -> int:
    """Raises ConfigError."""
    config = config_of(options)
    plan = Plan(
        arms=arms_of(options.arms, ARMS.get, ", ".join(ARMS)),
        seeds=parse_seeds(options.seeds),
        measures=tuple(MEASURES),
        budget=(f"chat.conversations={options.conversations}", f"chat.evaluation_problems={options.problems}"),
        limits=f"{options.conversations} conversations",
        what=f"First replies to {options.problems} held-out problems ({config.chat.persona})",
        along="versions",
    )
    # Exit code 1: it did not learn, which is a finding.
    job = Job("personal", "jobs.demo", lambda seed: [f"--seed={seed}"], measured, codes=(0, 1))
    return evaluate(job, plan, config, options, command)


def measured(report: Mapping[str, Any]) -> dict[str, Any]:
    """A demonstration's report in the shape of `jobs.train`'s, a measure as a pool, a version as a group."""
    parts = [
        {
            "pool": name,
            "before": {"solved": report[f"{field}_before"]},
            "after": {"solved": report[f"{field}_after"]},
            "groups": [
                {"outcome": None if row.get(field) is None else 2 * row[field] - 1, "samples": row["samples"]}
                for row in report["per_version"]
            ],
        }
        for name, field in MEASURES.items()
    ]
    return {"pools": parts, "versions": report["versions"], "seconds": report["seconds"]}
