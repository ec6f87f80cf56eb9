"""The findings as a picture: per pool the arms' learning curves, and held-out tasks solved before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.eval.findings import ArmFinding, Reports, curve_of
from jobs.eval.plan import Plan
from jobs.report import BLUE, GREEN, GREY

COLOURS = (BLUE, GREEN, "#b3261e", "#8a5a00", "#6b3fa0", GREY)


def draw(reports: Reports, findings: Sequence[ArmFinding], plan: Plan, title: str, file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.6 + 3.4 * len(plan.measures)), dpi=130, layout="constrained")
    panels: Any = figure.subplots(len(plan.measures), 2, squeeze=False, width_ratios=(3, 2))
    for (curves, ends), pool in zip(panels, plan.measures, strict=True):
        for index, arm in enumerate(plan.arms):
            _curve(curves, reports, pool, arm.name, COLOURS[index % len(COLOURS)])
        curves.set(title=pool, xlabel=plan.along, ylabel="in training (rolling mean)", ylim=(-0.02, 1.02))
        found = [each for each in findings if each.pool == pool]
        for index, arm in enumerate(plan.arms):
            for each in found:
                if each.arm == arm.name:
                    _ends(ends, each, (index - (len(plan.arms) - 1) / 2) * 0.08, COLOURS[index % len(COLOURS)])
        ends.set(title="held out", xticks=(0, 1), xticklabels=("before", "after"), xlim=(-0.4, 1.4))
        ends.set(ylabel="share", ylim=(-0.02, 1.02))
        for axes in (curves, ends):
            axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _curve(axes: Any, reports: Reports, pool: str, arm: str, colour: str) -> None:
    curve = curve_of(reports, pool, arm)
    if curve is not None:
        axes.plot(curve.groups, curve.mean, color=colour, linewidth=2, label=arm)
        axes.fill_between(curve.groups, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)


def _ends(axes: Any, found: ArmFinding, shift: float, colour: str) -> None:
    """Each run as a thin line, their mean with its interval over them."""
    for run in found.results:
        axes.plot([shift, 1 + shift], [run.before, run.after], color=colour, linewidth=0.8, alpha=0.4)
    for at, mean, interval in ((0, found.before, found.before_interval), (1, found.after, found.after_interval)):
        reach = None if interval is None else [[max(0.0, mean - interval.low)], [max(0.0, interval.high - mean)]]
        axes.errorbar(
            [at + shift], [mean], yerr=reach, fmt="o", color=colour, mfc="white", mew=2, markersize=7, capsize=4,
            label=found.arm if at == 0 else None,
        )  # fmt: skip
