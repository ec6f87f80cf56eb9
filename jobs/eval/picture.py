"""The findings as a picture: what is measured along the way, and at its ends or as one figure of each run, by arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.eval.findings import ArmFinding, Curve, FigureFinding, Reports, curve_of, figure_curve
from jobs.eval.plan import Plan
from jobs.report import BLUE, GREEN, GREY, Interval

COLOURS = (BLUE, GREEN, "#b3261e", "#8a5a00", "#6b3fa0", GREY, "#00838f", "#ad1457", "#5d4037", "#9e9d24")


def draw(
    reports: Reports,
    findings: Sequence[ArmFinding],
    figures: Sequence[FigureFinding],
    plan: Plan,
    title: str,
    file: Path,
) -> None:
    from matplotlib.figure import Figure

    rows = len(plan.measures) + len(plan.figures)
    figure = Figure(figsize=(10, 0.6 + 3 * rows), dpi=110, layout="constrained")
    panels: Any = figure.subplots(rows, 2, squeeze=False, width_ratios=(3, 2))
    names = [arm.name for arm in plan.arms]
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    for (left, right), measure in zip(panels, plan.measures, strict=False):
        _curves(left, {name: curve_of(reports, measure, name) for name in names}, colours, plan.along)
        left.set(title=measure, ylabel="on the way (rolling mean)", ylim=(-0.02, 1.02))
        for each in findings:
            if each.pool == measure:
                shift = (names.index(each.arm) - (len(names) - 1) / 2) * 0.08
                _ends(right, each, shift, colours[each.arm])
        right.set(title="held out", xticks=(0, 1), xticklabels=("before", "after"), xlim=(-0.4, 1.4))
        right.set(ylabel="share", ylim=(-0.02, 1.02))
    for (left, right), name in zip(panels[len(plan.measures) :], plan.figures, strict=True):
        _curves(left, {arm: figure_curve(reports, name, arm) for arm in names}, colours, plan.along)
        left.set(title=name, ylabel="on the way (rolling mean)")
        for each in figures:
            if each.name == name:
                _figure(right, each, names.index(each.arm), colours[each.arm])
        right.set(title="each run, and the mean", xticks=range(len(names)), xlim=(-0.5, len(names) - 0.5))
        right.set_xticklabels(names, rotation=20, fontsize=8)
    for axes in panels.flat:
        axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _curves(axes: Any, curves: dict[str, Curve | None], colours: dict[str, str], along: str) -> None:
    axes.set_xlabel(along)
    for arm, curve in curves.items():
        if curve is not None:
            axes.plot(curve.groups, curve.mean, color=colours[arm], linewidth=2, label=arm)
            axes.fill_between(curve.groups, curve.low, curve.high, color=colours[arm], alpha=0.18, linewidth=0)
    if not any(curves.values()):
        axes.text(0.5, 0.5, "not followed on the way", transform=axes.transAxes, ha="center", color=GREY)
        axes.set(xticks=(), yticks=())


def _ends(axes: Any, found: ArmFinding, shift: float, colour: str) -> None:
    """Each run as a thin line, their mean with its interval over them."""
    for run in found.results:
        axes.plot([shift, 1 + shift], [run.before, run.after], color=colour, linewidth=0.8, alpha=0.4)
    for at, mean, interval in ((0, found.before, found.before_interval), (1, found.after, found.after_interval)):
        _point(axes, at + shift, mean, interval, colour, found.arm if at == 0 else None)


def _figure(axes: Any, found: FigureFinding, at: int, colour: str) -> None:
    """Each run as a small dot, their mean with its interval beside them."""
    values = [value for _, value in found.values]
    axes.plot([at - 0.12] * len(values), values, ".", color=colour, alpha=0.5)
    _point(axes, at + 0.08, found.mean, found.interval, colour, None)


def _point(axes: Any, at: float, mean: float, interval: Interval | None, colour: str, label: str | None) -> None:
    reach = None if interval is None else [[max(0.0, mean - interval.low)], [max(0.0, interval.high - mean)]]
    axes.errorbar(
        [at], [mean], yerr=reach, fmt="o", color=colour, mfc="white", mew=2, markersize=7, capsize=4, label=label
    )
