"""The findings as a picture: what is measured along the way, and at its ends or as one figure of each run, by arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jobs.eval.findings import ArmFinding, Curve, FigureFinding, Reports, curve_of, figure_curve
from jobs.eval.plan import Plan
from jobs.report import BLUE, GREEN, GREY, Interval

COLOURS = (BLUE, GREEN, "#b3261e", "#8a5a00", "#6b3fa0", GREY, "#00838f", "#ad1457", "#5d4037", "#9e9d24")


COLUMNS = 3


def draw(
    reports: Reports,
    findings: Sequence[ArmFinding],
    figures: Sequence[FigureFinding],
    plan: Plan,
    title: str,
    file: Path,
) -> None:
    """Of each measure and figure its course, where it was followed, and beside it what came of it."""
    from matplotlib.figure import Figure

    names = [arm.name for arm in plan.arms]
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    panels: list[Callable[[Any], None]] = []
    for of, places in ((curve_of, plan.measures), (figure_curve, plan.figures)):
        for place in places:
            curves = {name: curve for name in names if (curve := of(reports, place, name)) is not None}
            if curves:
                along = plan.others_along.get(place, plan.along)
                panels.append(partial(_curves, curves=curves, colours=colours, title=place, along=along))
            shares = [each for each in findings if each.pool == place]
            if shares:
                panels.append(partial(_ends, found=shares, names=names, colours=colours))
            numbers = [each for each in figures if each.name == place]
            if numbers:
                panels.append(partial(_figures, found=numbers, names=names, colours=colours))
    columns = min(COLUMNS, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(5 * columns, 0.6 + 3.2 * rows), dpi=110, layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        panel(axes)
        axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _curves(axes: Any, curves: dict[str, Curve], colours: dict[str, str], title: str, along: str) -> None:
    for arm, curve in curves.items():
        axes.plot(curve.groups, curve.mean, color=colours[arm], linewidth=2, label=arm)
        axes.fill_between(curve.groups, curve.low, curve.high, color=colours[arm], alpha=0.18, linewidth=0)
    axes.set_title(f"{title}: on the way", fontsize=10)
    axes.set(xlabel=along, ylabel="rolling mean")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _ends(axes: Any, found: Sequence[ArmFinding], names: Sequence[str], colours: dict[str, str]) -> None:
    """Each run as a thin line, their mean with its interval over them."""
    for each in found:
        colour, shift = colours[each.arm], (names.index(each.arm) - (len(names) - 1) / 2) * 0.08
        for run in each.results:
            axes.plot([shift, 1 + shift], [run.before, run.after], color=colour, linewidth=0.8, alpha=0.4)
        _point(axes, shift, each.before, each.before_interval, colour, each.arm)
        _point(axes, 1 + shift, each.after, each.after_interval, colour, None)
    axes.set_title(f"{found[0].pool}: held out", fontsize=10)
    axes.set(xticks=(0, 1), xticklabels=("before", "after"), xlim=(-0.4, 1.4), ylabel="share", ylim=(-0.02, 1.02))


def _figures(axes: Any, found: Sequence[FigureFinding], names: Sequence[str], colours: dict[str, str]) -> None:
    """Each run as a small dot, their mean with its interval beside them."""
    for each in found:
        at, colour = names.index(each.arm), colours[each.arm]
        values = [value for _, value in each.values]
        axes.plot([at - 0.12] * len(values), values, ".", color=colour, alpha=0.5)
        _point(axes, at + 0.08, each.mean, each.interval, colour, None)
    axes.set_title(found[0].name, fontsize=10, wrap=True)
    axes.set(xticks=range(len(names)), xlim=(-0.5, len(names) - 0.5), ylabel="each run, and the mean")
    axes.set_xticklabels(names, rotation=20, fontsize=8)


def _point(axes: Any, at: float, mean: float, interval: Interval | None, colour: str, label: str | None) -> None:
    reach = None if interval is None else [[max(0.0, mean - interval.low)], [max(0.0, interval.high - mean)]]
    axes.errorbar(
        [at], [mean], yerr=reach, fmt="o", color=colour, mfc="white", mew=2, markersize=7, capsize=4, label=label
    )
