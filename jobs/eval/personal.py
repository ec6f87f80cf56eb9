"""`jobs.eval personal`: which objective adapts to people fastest, and at what price? Runs of `jobs.demo`.

A run is the demonstration: one simulated person or three, held-out problems and unrelated tasks before and after.
Measured are first replies as a person likes them (the personalisation score), and what a style that is learnt must not
cost: right answers, the working (a reply that shrinks to a bare number shows none) and the tasks that have nothing to
do with it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

from clawrl.cli import config_of
from envs.chat.user import PERSONAS
from jobs.eval.findings import Reports
from jobs.eval.plan import Arm, Plan, arms_of, parse_seeds
from jobs.eval.series import Job, add_options, evaluate

UNTRAINED = "buffer.batch_size=1000000"
"""A batch that never comes full: no step is taken."""
LORA = ("learning.method=hybrid", "lora.rank=16", "judge.engine=policy", "trainer.learning_rate=2e-3")
ARMS = {
    "hybrid": ("learning.method=hybrid",),
    "rl": ("learning.method=rl",),
    "opd": ("learning.method=opd",),
    "opd-kl": ("learning.method=opd", "learning.distillation=kl"),
    "experience": ("learning.method=opd", "learning.experience=true", "judge.session_idle_s=2"),
    "opd-token": ("learning.method=opd", "learning.distillation=token"),
    "random-hint": ("learning.method=hybrid", "learning.hint_rule=random"),
    "hybrid-lora": LORA,
    "ema-lora": (*LORA, "learning.teacher=ema"),
    "user-lora": (*LORA, "lora.policy_scope=user"),
    "hierarchy-lora": (*LORA, "lora.policy_scope=hierarchy"),
    "memory": ("chat.memory=true", UNTRAINED),
    "memory-hybrid": ("chat.memory=true", "learning.method=hybrid"),
}
MEASURES = {
    "liked": "score",
    "right": "correct",
    "right with the working": "sound",
    "good": "good",
    "unrelated tasks": "unrelated",
}
"""Names of what is measured before and after, as shares, and of the report's fields. Good: liked, right, working."""
KL = "KL from the reference, nats per token"
FIGURES = {
    "sessions until 3 in a row are liked (never: all)": "sessions_until_liked",
    "sessions until 3 in a row are good (never: all)": "sessions_until_good",
    "reply tokens": "reply_tokens_after",
    "change of reply tokens": "reply_tokens_change",
    KL: "reference_kl",
}
COURSES = {"reply tokens": "characters", KL: "kl"}
"""Fields of a version's row by the figure whose course they show; lengths there are in characters."""
SESSIONS = 20
LIKED_OF_ALL = "liked of all sessions"
"""The one course along sessions: what does not train has no versions."""


def parser() -> argparse.ArgumentParser:
    about = (
        "objectives and seeds with simulated people: first replies to held-out problems, how many sessions it takes, "
        "and what it costs in right answers, shown working, length, KL and unrelated tasks"
    )
    parser = argparse.ArgumentParser(prog="python -m jobs.eval personal", description=about)
    add_options(parser, words=", ".join(ARMS), arms="hybrid,rl,opd,opd-token", seeds=5)
    parser.add_argument("--conversations", type=int, default=400, help="of each run (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=400, help="held-out problems (default: %(default)s)")
    parser.add_argument(
        "--users",
        choices=("separate", "joint"),
        help=f"{', '.join(PERSONAS)}: each in a run of their own, or all in one (default: chat.persona alone)",
    )
    return parser


def run(options: argparse.Namespace, command: str) -> int:
    """Raises ConfigError."""
    if options.users == "joint":
        options.overrides.append("chat.persona=all")
    config = config_of(options)
    people = PERSONAS if options.users or config.chat.persona == "all" else (config.chat.persona,)
    arms = arms_of(options.arms, ARMS.get, ", ".join(ARMS))
    plan = Plan(
        arms=alone(arms) if options.users == "separate" else arms,
        seeds=parse_seeds(options.seeds),
        measures=(*MEASURES, *(liked_by(person) for person in people if len(people) > 1)),
        budget=(f"chat.conversations={options.conversations}", f"chat.evaluation_problems={options.problems}"),
        limits=f"{options.conversations} conversations",
        what=f"First replies to {options.problems} held-out problems ({', '.join(people)}"
        f"{f', {options.users}' if options.users else ''})",
        along="versions",
        figures=(LIKED_OF_ALL, *FIGURES),
        others_along={LIKED_OF_ALL: f"sessions, by {SESSIONS}"},
    )

    def gather(reports: Reports, plan: Plan) -> tuple[Reports, Plan]:
        return (together(reports, arms), replace(plan, arms=arms)) if options.users == "separate" else (reports, plan)

    # Exit code 1: it did not learn, which is a finding.
    job = Job("personal", "jobs.demo", lambda seed: [f"--seed={seed}"], measured, codes=(0, 1), gather=gather)
    return evaluate(job, plan, config, options, command)


def liked_by(person: str) -> str:
    return f"liked by the {person}"


def alone(arms: Sequence[Arm]) -> tuple[Arm, ...]:
    """Each arm with each person alone."""
    return tuple(
        Arm(f"{arm.name}-{person}", (*arm.overrides, f"chat.persona={person}")) for arm in arms for person in PERSONAS
    )


def together(reports: Reports, arms: Sequence[Arm]) -> Reports:
    """Of an arm's runs with each person alone one report, where all have come to an end: means over people."""
    found: dict[tuple[str, int], Mapping[str, Any]] = {}
    for arm in arms:
        for seed in sorted({seed for _, seed in reports}):
            parts = [reports.get((f"{arm.name}-{person}", seed)) for person in PERSONAS]
            if all(part is not None for part in parts):
                found[arm.name, seed] = _mean_of([part for part in parts if part is not None])
    return found


def measured(report: Mapping[str, Any]) -> dict[str, Any]:
    """A demonstration's report in the shape of `jobs.train`'s, a measure as a pool, a version as a group."""
    rows, first = report["per_version"], report["first_replies"]
    parts = [
        _part(
            name,
            report[f"{field}_before"],
            report[f"{field}_after"],
            [
                {"outcome": None if row.get(field) is None else 2 * row[field] - 1, "samples": row["samples"]}
                for row in rows
            ],
        )
        for name, field in MEASURES.items()
    ]
    parts += [
        _part(liked_by(person["persona"]), person["score_before"], person["score_after"], [])
        for person in report["people"]
    ]
    known = {
        **report,
        "reply_tokens_change": report["reply_tokens_after"] - report["reply_tokens_before"],
        **{field: _sessions(report["people"], field) for field in ("sessions_until_liked", "sessions_until_good")},
    }
    return {
        "pools": parts,
        "figures": {
            LIKED_OF_ALL: _known_mean([liked for liked, *_ in first]),
            **{name: known[field] for name, field in FIGURES.items()},
        },
        "courses": {
            LIKED_OF_ALL: [
                _mean([liked for liked, *_ in first[at : at + SESSIONS]]) for at in range(0, len(first), SESSIONS)
            ],
            **{name: [row[field] for row in rows] for name, field in COURSES.items()},
        },
        "versions": report["versions"],
        "seconds": report["seconds"],
    }


def _part(name: str, before: float, after: float, groups: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pool": name, "before": {"solved": before}, "after": {"solved": after}, "groups": groups}


def _sessions(people: Sequence[Mapping[str, Any]], field: str) -> float:
    """Mean over people; one who never came so far counts with all sessions they had, as the published figure does."""
    return _mean([person["sessions"] if person[field] is None else person[field] for person in people])


def _mean_of(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Reports of different people as one; what only one has (who likes it) is taken over."""
    names = dict.fromkeys(part["pool"] for report in reports for part in report["pools"])
    pools = []
    for name in names:
        parts = [part for report in reports for part in report["pools"] if part["pool"] == name]
        columns = zip_longest(*(part["groups"] for part in parts))
        pools.append(
            _part(
                name,
                _mean([part["before"]["solved"] for part in parts]),
                _mean([part["after"]["solved"] for part in parts]),
                [_mean_group([group for group in column if group is not None]) for column in columns],
            )
        )
    return {
        "pools": pools,
        "figures": {
            name: _known_mean([report["figures"][name] for report in reports]) for name in (LIKED_OF_ALL, *FIGURES)
        },
        "courses": {
            name: [_known_mean(column) for column in zip_longest(*(report["courses"][name] for report in reports))]
            for name in (LIKED_OF_ALL, *COURSES)
        },
        "versions": sum(report["versions"] for report in reports),
        "seconds": sum(report["seconds"] for report in reports),
    }


def _mean_group(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    outcome = _known_mean([group["outcome"] for group in groups])
    return {"outcome": outcome, "samples": sum(group["samples"] for group in groups)}


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _mean(known) if known else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
