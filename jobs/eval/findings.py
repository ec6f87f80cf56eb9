"""What runs have shown: each arm's gain over seeds, the arms' difference by seed, as records and as a table. Pure.

Knows reports in the shape of `jobs.train`'s (its JSON) and the plan. Ignores how runs are made. Intervals are 95 %
bootstrap intervals over seeds: the runs are drawn, not the attempts in them. With three seeds there are ten different
draws, and an interval reaches from about the worst run to about the best; it is too narrow rather than too wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.eval.plan import Plan
from jobs.report import RESAMPLES, Interval, rolling

Reports = Mapping[tuple[str, int], Mapping[str, Any]]
"""The report of `jobs.train` by (arm, seed), of the runs that came to an end."""


@dataclass(frozen=True, slots=True)
class Result:
    """One run in one pool."""

    seed: int
    before: float
    after: float
    versions: int
    groups: int
    groups_alike: int
    seconds: float

    @property
    def gain(self) -> float:
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class ArmFinding:
    """One arm in one pool: shares of held-out tasks solved, means over seeds."""

    pool: str
    arm: str
    results: tuple[Result, ...]
    before: float
    after: float
    gain: float
    before_interval: Interval | None
    after_interval: Interval | None
    gain_interval: Interval | None


@dataclass(frozen=True, slots=True)
class PairFinding:
    """An arm's gain minus the first arm's, of the seeds that both have."""

    pool: str
    arm: str
    against: str
    differences: tuple[tuple[int, float], ...]  # (seed, difference)
    mean: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class FigureFinding:
    """One arm's mean of a figure: one number of each run that has it."""

    name: str
    arm: str
    values: tuple[tuple[int, float], ...]  # (seed, value)
    mean: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Curve:
    """A rolling mean along groups: what they solved (outcomes -1 to 1 as 0 to 1), or a figure."""

    groups: tuple[float, ...]  # where the window's middle is
    mean: tuple[float, ...]  # over seeds
    low: tuple[float, ...]
    high: tuple[float, ...]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Percentile bootstrap of the mean of `values`; None for a single one, which says nothing of others."""
    if len(values) < 2:
        return None
    low, high = _bounds(np.asarray(values, float)[:, None])
    return Interval(float(low[0]), float(high[0]))


def _bounds(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean over the first axis of f64[S, N], each f64[N]."""
    number = len(values)
    drawn = np.random.default_rng(0).multinomial(number, np.full(number, 1 / number), RESAMPLES) / number
    low, high = np.percentile(drawn @ values, (2.5, 97.5), axis=0)
    return low, high


def results_of(reports: Reports, pool: str, arm: str) -> tuple[Result, ...]:
    """An arm's runs in a pool that was measured before and after, by seed."""
    found = []
    for (name, seed), report in sorted(reports.items(), key=lambda item: item[0]):
        part = _part(report, pool)
        if name != arm or part is None or None in (part["before"]["solved"], part["after"]["solved"]):
            continue
        groups = part["groups"]
        found.append(
            Result(
                seed=seed,
                before=part["before"]["solved"],
                after=part["after"]["solved"],
                versions=report["versions"],
                groups=len(groups),
                groups_alike=sum(not group["samples"] for group in groups),
                seconds=report["seconds"],
            )
        )
    return tuple(found)


def arm_findings(reports: Reports, plan: Plan) -> list[ArmFinding]:
    found = []
    for pool in plan.measures:
        for arm in plan.arms:
            results = results_of(reports, pool, arm.name)
            if results:
                before, after, gain = zip(*((each.before, each.after, each.gain) for each in results), strict=True)
                found.append(
                    ArmFinding(
                        pool=pool,
                        arm=arm.name,
                        results=results,
                        before=float(np.mean(before)),
                        after=float(np.mean(after)),
                        gain=float(np.mean(gain)),
                        before_interval=mean_interval(before),
                        after_interval=mean_interval(after),
                        gain_interval=mean_interval(gain),
                    )
                )
    return found


def pair_findings(findings: Sequence[ArmFinding], plan: Plan) -> list[PairFinding]:
    """Every arm's gain against the first one's, paired by seed."""
    by_place = {(each.pool, each.arm): {result.seed: result.gain for result in each.results} for each in findings}
    return _paired(by_place, plan.measures, plan)


def figure_findings(reports: Reports, plan: Plan) -> list[FigureFinding]:
    found = []
    for name in plan.figures:
        for arm in plan.arms:
            figures = {seed: report["figures"][name] for (of, seed), report in reports.items() if of == arm.name}
            values = tuple((seed, value) for seed, value in sorted(figures.items()) if value is not None)
            if values:
                numbers = [value for _, value in values]
                found.append(FigureFinding(name, arm.name, values, float(np.mean(numbers)), mean_interval(numbers)))
    return found


def figure_pairs(findings: Sequence[FigureFinding], plan: Plan) -> list[PairFinding]:
    """Every arm's figures against the first one's, paired by seed."""
    return _paired({(each.name, each.arm): dict(each.values) for each in findings}, plan.figures, plan)


def _paired(by_place: Mapping[tuple[str, str], Mapping[int, float]], places: Sequence[str], plan: Plan) -> list[Any]:
    found = []
    first, *others = (arm.name for arm in plan.arms)
    for place in places:
        base = by_place.get((place, first), {})
        for arm in others:
            own = by_place.get((place, arm), {})
            differences = tuple((seed, own[seed] - base[seed]) for seed in sorted(own.keys() & base.keys()))
            if differences:
                values = [each for _, each in differences]
                found.append(PairFinding(place, arm, first, differences, float(np.mean(values)), mean_interval(values)))
    return found


def curve_of(reports: Reports, pool: str, arm: str) -> Curve | None:
    """The arm's learning curve as far as its shortest run goes; None if no run made two groups."""
    groups = [part["groups"] for report in _of_arm(reports, arm) if (part := _part(report, pool)) is not None]
    return _curve([[(each["outcome"] + 1) / 2 for each in run if each["outcome"] is not None] for run in groups])


def figure_curve(reports: Reports, name: str, arm: str) -> Curve | None:
    """A figure's course, of those that were followed on the way."""
    runs = [report["courses"].get(name, []) for report in _of_arm(reports, arm)]
    return _curve([[value for value in run if value is not None] for run in runs])


def curves(reports: Reports, plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """All curves that there are, by what is measured and by arm."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for names, of in ((plan.measures, curve_of), (plan.figures, figure_curve)):
        for name in names:
            made = {arm.name: of(reports, name, arm.name) for arm in plan.arms}
            found[name] = {arm: asdict(curve) for arm, curve in made.items() if curve is not None}
    return {name: by_arm for name, by_arm in found.items() if by_arm}


def _of_arm(reports: Reports, arm: str) -> list[Mapping[str, Any]]:
    return [report for (name, _), report in sorted(reports.items(), key=lambda item: item[0]) if name == arm]


def _curve(runs: Sequence[Sequence[float]]) -> Curve | None:
    series = [run for run in runs if len(run) > 1]
    if not series:
        return None
    shortest = min(map(len, series))
    width = max(1, shortest // 4)
    values = np.stack([rolling(means[:shortest], width) for means in series])
    low, high = _bounds(values)
    at = np.arange(values.shape[1]) + (width + 1) / 2
    return Curve(tuple(at), tuple(values.mean(axis=0)), tuple(low), tuple(high))


def table(
    findings: Sequence[ArmFinding],
    pairs: Sequence[PairFinding],
    plan: Plan,
    circumstances: Mapping[str, Any],
    figures: Sequence[FigureFinding] = (),
) -> str:
    """The report as Markdown."""
    lines = [
        f"{plan.what}: means over seeds, with 95 % bootstrap intervals over them.",
        "Of few seeds these are too narrow rather than too wide.",
        "",
        *_rows("measured", "arm", "runs", "before", "after", "gain"),
        *(_row(each.pool, each.arm, len(each.results), _with(each.before, each.before_interval),
               _with(each.after, each.after_interval), _with(each.gain, each.gain_interval, sign=True))
          for each in findings),
    ]  # fmt: skip
    lines += _pair_lines("Difference of the gains, paired by seed:", pairs, plan)
    if figures:
        lines += ["", *_rows("figure", "arm", "runs", *(f"seed {seed}" for seed in plan.seeds), "mean")]
        for each in figures:
            shown = [_at(dict(each.values), seed, ".3f") for seed in plan.seeds]
            lines.append(_row(each.name, each.arm, len(each.values), *shown, _with(each.mean, each.interval)))
        lines += _pair_lines("Difference of the figures, paired by seed:", figure_pairs(figures, plan), plan)
    lines += [
        "",
        "Each run:",
        "",
        *_rows("measured", "arm", "seed", "before", "after", "versions", "groups", "alike", "s"),
    ]
    for each in findings:
        for run in each.results:
            lines.append(
                _row(each.pool, each.arm, run.seed, f"{run.before:.3f}", f"{run.after:.3f}", run.versions, run.groups,
                     run.groups_alike, f"{run.seconds:.0f}")
            )  # fmt: skip
    lines += ["", *(f"- {name}: {_shown(value)}" for name, value in circumstances.items())]
    lines += [
        "",
        "Load is the 1-minute average before and after each run; attempts and versions in a given time hang on it.",
    ]
    return "\n".join(lines) + "\n"


def _pair_lines(title: str, pairs: Sequence[PairFinding], plan: Plan) -> list[str]:
    if not pairs:
        return []
    lines = ["", title, "", *_rows("measured", "arms", *(f"seed {seed}" for seed in plan.seeds), "mean")]
    for pair in pairs:
        shown = [_at(dict(pair.differences), seed, "+.3f") for seed in plan.seeds]
        mean = _with(pair.mean, pair.interval, sign=True)
        lines.append(_row(pair.pool, f"{pair.arm} − {pair.against}", *shown, mean))
    return lines


def _at(by_seed: Mapping[int, float], seed: int, form: str) -> str:
    return f"{by_seed[seed]:{form}}" if seed in by_seed else "–"


def _part(report: Mapping[str, Any], pool: str) -> Mapping[str, Any] | None:
    return next((part for part in report["pools"] if part["pool"] == pool), None)


def _rows(*titles: str) -> list[str]:
    return [_row(*titles), "|" + "---|" * len(titles)]


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _with(value: float, interval: Interval | None, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{interval.low:{form}}, {interval.high:{form}}]"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_shown(each)}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
