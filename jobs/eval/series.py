"""All runs of a plan, made where they were not made yet, and the report on them.

    for every arm × seed: made already? else a run of the job ─► findings ─► table, JSON, picture

Runs are made one after the other, or over a Ray cluster (`--parallel`), and what was made is kept: the same command,
given again, makes the rest. Findings
hold what each run found, so that another machine, or a later commit, adds runs to them (`--with`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clawrl.cli import add_config_options, config_of
from clawrl.config import Config
from clawrl.errors import ConfigError
from jobs.eval import findings, picture
from jobs.eval.findings import Reports
from jobs.eval.plan import Arm, Plan, digest, folder_name, names_of
from jobs.eval.runs import Run, RunFailed, commit, make_run, prefixed, result_of, side_by_side

_PLACES = ("run_root=", "run=", "gateway.")
"""Overrides that say where a run is, and not what."""

Results = dict[tuple[str, int], dict[str, Any]]
"""By arm and seed: `found` (what the job's `read` gives), `words` (of its command line), `commit`, and when and how."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is run. `seeded` gives the words that make a run another one; `read` what was measured, of its report.

    `gather` makes fewer reports of all: of an arm's runs with one person each, one.
    """

    verb: str
    module: str
    seeded: Callable[[int], Sequence[str]]
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    codes: Sequence[int] = (0,)
    gather: Callable[[Reports, Plan], tuple[Reports, Plan]] = lambda reports, plan: (reports, plan)


def add_options(parser: argparse.ArgumentParser, *, words: str, arms: str, seeds: int) -> None:
    """Those that all verbs have; `words` lists the arms with names of their own, the others are defaults."""
    add_config_options(parser)
    parser.add_argument(
        "--arms",
        default=arms,
        help=f"{words} or name=section.key:value; the first is what others are held against (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=seeds, metavar="N", help="of each arm (default: %(default)s)")
    parser.add_argument(
        "--with",
        dest="others",
        action="append",
        default=[],
        metavar="FILE",
        help="findings (NAME.json) of such runs made elsewhere or at another commit: these are not made again",
    )
    parser.add_argument(
        "--parallel",
        type=resources_of,
        metavar="CPU=N,GPU=N",
        help="make runs side by side on the Ray cluster at RAY_ADDRESS, or on this machine: what each takes of it",
    )
    parser.add_argument("--made", action="store_true", help="make no run: report on those that there are")
    parser.add_argument("--json", metavar="FILE", help="write the findings there too")
    parser.add_argument(
        "--out", metavar="NAME", help="NAME.md, NAME.json and NAME.png (default: in the state's folder)"
    )


def resources_of(text: str) -> dict[str, float]:
    """Raises argparse's error for what is no such list."""
    try:
        pairs = [word.split("=") for word in text.split(",")]
        found = {name.strip(): float(amount) for name, amount in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list as CPU=8,GPU=1") from None
    if any(not name or not amount > 0 for name, amount in found.items()):
        raise argparse.ArgumentTypeError(f"{text!r}: every amount must be above 0, as in CPU=8,GPU=1")
    return found


def evaluate(job: Job, plan: Plan, config: Config, options: argparse.Namespace, command: str) -> int:
    """Make what is not made yet, and report on all of it; 1 if a run failed. Raises ConfigError."""
    for arm in plan.arms:
        config_of(argparse.Namespace(**{**vars(options), "overrides": [*options.overrides, *arm.overrides]}))
    source, known = commit(), _made_elsewhere(options.others)
    state = Path(config.run_root).resolve() / f"eval-{job.verb}-{digest(config, plan, source)}"
    results, failures = _make(job, plan, options, state, source, known)
    if not results:
        why = "; ".join(failures.values()) or "none is made yet"
        print(f"eval: no run came to an end; {why}", file=sys.stderr)
        return 1
    circumstances = {
        "command": command,
        "commit": _commits(results),
        "arms": {arm.name: list(arm.overrides) for arm in plan.arms},
        "budget": f"{plan.limits} in each run",
        "failed": failures or "none",
        "cores": os.cpu_count(),
        "load": {f"{arm} seed {seed}": result["load"] for (arm, seed), result in results.items()},
    }
    _report(job, plan, results, circumstances, options, state)
    return 1 if failures else 0


def _made_elsewhere(files: Sequence[str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Runs of other findings by the words of their command lines. Raises ConfigError."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in files:
        try:
            runs = json.loads(Path(file).read_text(encoding="utf-8"))["runs"]
            found |= {tuple(run["words"]): run for run in runs}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--with {file} holds no findings with what each run found ({type(error).__name__}: {error}); "
                "name the NAME.json of `jobs.eval --out NAME`"
            ) from None
    return found


def _commits(results: Results) -> str | dict[str, list[str]]:
    """The commit, or the runs made at each."""
    by_commit: dict[str, list[str]] = {}
    for (arm, seed), result in results.items():
        by_commit.setdefault(result["commit"], []).append(f"{arm} {seed}")
    return next(iter(by_commit)) if len(by_commit) == 1 else by_commit


def _make(
    job: Job,
    plan: Plan,
    options: argparse.Namespace,
    state: Path,
    source: str,
    known: Mapping[tuple[str, ...], dict[str, Any]],
) -> tuple[Results, dict[str, str]]:
    """Results by (arm, seed), and why others have none."""
    results: Results = {}
    failures: dict[str, str] = {}
    words = {(arm.name, seed): [*_arguments(plan, arm, options), *job.seeded(seed)] for arm, seed in plan.runs}
    named = {place: tuple(each for each in every if not each.startswith(_PLACES)) for place, every in words.items()}
    kept = {
        (arm.name, seed): result_of(state / folder_name(arm, seed)) or known.get(named[arm.name, seed])
        for arm, seed in plan.runs
    }
    left = [(arm, seed) for arm, seed in plan.runs if kept[arm.name, seed] is None]
    _say(f"{len(plan.runs)} runs, {len(plan.runs) - len(left)} of them made already; state in {state.name}")
    if left:
        _say(f"{'missing' if options.made else 'to make'}: {names_of(left)}")
    left = [] if options.made else left
    runs = [
        Run(
            state / folder_name(arm, seed),
            job.module,
            tuple(words[arm.name, seed]),
            f"{arm.name} seed {seed}",
            job.codes,
        )
        for arm, seed in left
    ]
    for index, outcome in side_by_side(runs, options.parallel) if options.parallel and runs else _in_turn(runs):
        (arm, seed), label = left[index], runs[index].label
        if isinstance(outcome, RunFailed):
            failures[label] = str(outcome)
            _say(f"{label} failed: {outcome}")
        else:
            kept[arm.name, seed] = outcome
            _say(f"{label}: {_outcome(job.read(outcome['report']))} in {outcome['seconds']:.0f} s")
    for place, result in kept.items():
        if result is None:
            continue
        report = result.pop("report", None)
        made = {} if report is None else {"found": job.read(report), "words": named[place], "commit": source}
        results[place] = {**result, **made}
    return results, failures


def _in_turn(runs: Sequence[Run]) -> Iterator[tuple[int, dict[str, Any] | RunFailed]]:
    """What comes of each run, by its place among them."""
    started = time.monotonic()
    for number, run in enumerate(runs):
        rest = (time.monotonic() - started) / number * (len(runs) - number) / 60 if number else None
        _say(f"run {number + 1} of {len(runs)}: {run.label}{'' if rest is None else f', about {rest:.0f} min left'}")
        try:
            yield number, make_run(run.folder, run.job, run.arguments, prefixed(run.label), run.codes)
        except RunFailed as error:
            yield number, error


def _arguments(plan: Plan, arm: Arm, options: argparse.Namespace) -> list[str]:
    config = ["--config", options.config] if options.config else []
    method = ["--method", options.method] if options.method else []
    return [*config, *method, *plan.budget, *options.overrides, *arm.overrides]


def _report(
    job: Job, plan: Plan, results: Results, circumstances: dict[str, Any], options: argparse.Namespace, state: Path
) -> None:
    reports, plan = job.gather({place: result["found"] for place, result in results.items()}, plan)
    arms, figures = findings.arm_findings(reports, plan), findings.figure_findings(reports, plan)
    pairs = findings.pair_findings(arms, plan)
    text = findings.table(arms, pairs, plan, circumstances, figures)
    told = {
        **circumstances,
        "arms_found": [asdict(each) for each in arms],
        "pairs": [asdict(each) for each in pairs],
        "figures": [asdict(each) for each in figures],
        "figure_pairs": [asdict(each) for each in findings.figure_pairs(figures, plan)],
        "curves": findings.curves(reports, plan),
        "along": {name: plan.others_along.get(name, plan.along) for name in (*plan.measures, *plan.figures)},
        "runs": [{**result, "arm": arm, "seed": seed} for (arm, seed), result in results.items()],
    }
    out = Path(options.out) if options.out else state / "findings"
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(told, indent=1) + "\n"
    for file in (out.with_name(out.name + ".json"), *([Path(options.json)] if options.json else [])):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(whole, encoding="utf-8")
    title = f"{', '.join(plan.measures)}: seeds {', '.join(map(str, plan.seeds))}; {plan.limits} each"
    out.with_name(out.name + ".png").unlink(missing_ok=True)
    picture.draw(reports, arms, figures, plan, title, out.with_name(out.name + ".png"))
    out.with_name(out.name + ".md").write_text(f"{text}\n![]({out.name}.png)\n", encoding="utf-8")
    print(text)
    for ending in ("md", "json", "png"):
        print(f"wrote {out}.{ending}")


def _outcome(report: Mapping[str, Any]) -> str:
    def share(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.2f}"

    return ", ".join(
        f"{part['pool']} {share(part['before']['solved'])} → {share(part['after']['solved'])}"
        for part in report["pools"]
    )


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)
