"""What a demonstration showed: figures with intervals, as a record, as JSON and as a picture.

Knows what was measured (`Evidence`). Ignores how a system is started, spoken to or watched: pure but for the two files
that `write` makes.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clawrl.types import Swap, VersionEvent, WeightVersion
from envs.chat.conversation import Evaluation, pooled
from jobs.suite import SuiteResult

RESAMPLES = 20_000
ROLLING = 40
"""First replies in one point of the rolling curves."""
IN_A_ROW = 3
"""So many first replies in a row that pass end the count of sessions (OpenClaw-RL v2's measure)."""
MIN_GAIN = 0.3
MAX_LOSS = 0.05
"""A demonstration that raises the score by less than MIN_GAIN, or costs more right answers, has failed."""
SWAP_SLACK_S = 2.0
"""A swap is recorded after its canary, which takes its time on a busy machine: the pause began at most this much
earlier than `at` - stall."""

JSON_NAME, PICTURE_NAME = "report.json", "learning_curve.png"
BLUE, GREEN, GREY = "#2458a6", "#2e7d4f", "#8a8f98"


@dataclass(frozen=True, slots=True)
class FirstReply:
    """The reply to the first message of a conversation, which says nothing about style."""

    at: float  # when it was asked for, seconds since the epoch
    satisfied: bool
    correct: bool
    shows_work: bool
    characters: int
    persona: str

    @property
    def good(self) -> bool:
        return self.satisfied and self.correct and self.shows_work


@dataclass(frozen=True, slots=True)
class Stream:
    """One streamed reply as its client saw it, times in seconds since the epoch."""

    started: float
    ended: float
    longest_gap_s: float  # between two chunks


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a demonstration measured."""

    method: str
    model: str
    persona: str
    seed: int
    run_directory: str
    started: float  # when the program began, seconds since the epoch
    serving: float  # when chat was served
    ended: float
    before: tuple[Evaluation, ...]  # by persona
    after: tuple[Evaluation, ...]
    suite_before: SuiteResult
    suite_after: SuiteResult
    divergence: float | None  # of the last version from the reference, nats per token
    first_replies: tuple[FirstReply, ...]
    streams: tuple[Stream, ...]
    versions: tuple[WeightVersion, ...]
    rejected: tuple[VersionEvent, ...]  # versions that an engine did not really run
    swaps: tuple[Swap, ...]
    counts: dict[str, int]  # of the journal
    dropped: int  # samples too old for the trainer
    requests: int
    requests_failed: int
    drained: bool  # nothing was left to judge or to train on at the second evaluation


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % bootstrap interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class VersionRow:
    """One version: what made it and what people saw of it."""

    version: int
    after_s: float  # since the program began, when it was published
    samples: int
    loss: float | None
    lag: float | None  # mean versions between sampling and training
    grad_norm: float | None
    pause_ms: float | None  # how long the engine stood still to take it over
    canary_error: float | None
    first_replies: int  # asked for while it was the newest
    kl: float | None  # from the reference on the turns that made it, nats per token
    score: float | None
    correct: float | None
    sound: float | None  # right, with the working
    good: float | None  # sound, and liked
    characters: float | None


@dataclass(frozen=True, slots=True)
class PersonaRow:
    """One person of several."""

    persona: str
    score_before: float
    score_after: float
    correct_before: float
    correct_after: float
    sessions: int
    sessions_until_liked: int | None
    sessions_until_good: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """The result; its fields are the keys of report.json. Scores and `correct` are shares of first replies."""

    method: str
    model: str
    persona: str
    seed: int
    score_before: float
    score_after: float
    score_before_interval: Interval
    score_after_interval: Interval
    gain_interval: Interval
    correct_before: float
    correct_after: float
    correct_before_interval: Interval
    correct_after_interval: Interval
    correct_change_interval: Interval
    shows_work_before: float
    shows_work_after: float
    sound_before: float  # right, with the working: a bare number is not
    sound_after: float
    good_before: float  # sound, and as the person likes it
    good_after: float
    sessions_until_liked: float | None  # until IN_A_ROW first replies in a row are liked, mean over people; None: never
    sessions_until_good: float | None
    reference_kl: float | None  # of the last version's held-out replies, nats per token
    unrelated_before: float  # right answers to the suite of unrelated tasks
    unrelated_after: float
    unrelated_tasks: dict[str, tuple[float, float]]  # before and after, by task
    reply_tokens_before: float
    reply_tokens_after: float
    evaluation_replies: int
    conversations: int
    turns: int
    judgements: int
    abstentions: int
    hints: int
    samples: int
    samples_trained: int
    samples_dropped: int
    versions: int
    versions_rejected: int
    swaps: int
    requests: int
    requests_failed: int
    longest_stall_ms: float | None  # None: no stream was running during a swap
    longest_gap_without_swap_ms: float | None
    longest_pause_ms: float | None
    streams_over_swaps: int
    start_s: float
    seconds: float
    drained: bool
    run_directory: str
    picture: str
    per_version: tuple[VersionRow, ...]
    first_replies: tuple[tuple[bool, bool, bool], ...]  # liked, right, with the working, as they were asked for
    people: tuple[PersonaRow, ...]
    shortcomings: tuple[str, ...]  # empty: the demonstration succeeded


def build(evidence: Evidence) -> Report:
    """Put the figures together and judge them."""
    before, after, counts = pooled(evidence.before), pooled(evidence.after), evidence.counts
    people, suites = _persona_rows(evidence), (evidence.suite_before.shares, evidence.suite_after.shares)
    over, apart = _split_streams(evidence.streams, evidence.swaps)
    return Report(
        method=evidence.method,
        model=evidence.model,
        persona=evidence.persona,
        seed=evidence.seed,
        score_before=before.score,
        score_after=after.score,
        score_before_interval=share_interval(before.score, before.num_replies),
        score_after_interval=share_interval(after.score, after.num_replies),
        gain_interval=change_interval(before.score, before.num_replies, after.score, after.num_replies),
        correct_before=before.correct,
        correct_after=after.correct,
        correct_before_interval=share_interval(before.correct, before.num_replies),
        correct_after_interval=share_interval(after.correct, after.num_replies),
        correct_change_interval=change_interval(before.correct, before.num_replies, after.correct, after.num_replies),
        shows_work_before=before.shows_work,
        shows_work_after=after.shows_work,
        sound_before=before.sound,
        sound_after=after.sound,
        good_before=before.good,
        good_after=after.good,
        sessions_until_liked=_mean_known([row.sessions_until_liked for row in people]),
        sessions_until_good=_mean_known([row.sessions_until_good for row in people]),
        reference_kl=evidence.divergence,
        unrelated_before=evidence.suite_before.mean,
        unrelated_after=evidence.suite_after.mean,
        unrelated_tasks={task: (suites[0][task], suites[1][task]) for task in suites[0]},
        reply_tokens_before=before.mean_length,
        reply_tokens_after=after.mean_length,
        evaluation_replies=after.num_replies,
        conversations=len(evidence.first_replies),
        turns=counts["main_turns"],
        judgements=counts["judgements"],
        abstentions=counts["abstentions"],
        hints=counts["hints"],
        samples=counts["samples"],
        samples_trained=counts["consumed"],
        samples_dropped=evidence.dropped,
        versions=len(evidence.versions),
        versions_rejected=len(evidence.rejected),
        swaps=len(evidence.swaps),
        requests=evidence.requests,
        requests_failed=evidence.requests_failed,
        longest_stall_ms=_longest_ms(over),
        longest_gap_without_swap_ms=_longest_ms(apart),
        longest_pause_ms=max((swap.stall_ms for swap in evidence.swaps), default=None),
        streams_over_swaps=len(over),
        start_s=evidence.serving - evidence.started,
        seconds=evidence.ended - evidence.started,
        drained=evidence.drained,
        run_directory=evidence.run_directory,
        picture=str(Path(evidence.run_directory) / PICTURE_NAME),
        per_version=_version_rows(evidence),
        first_replies=tuple(
            (reply.satisfied, reply.correct, reply.shows_work) for reply in _in_order(evidence.first_replies)
        ),
        people=people,
        shortcomings=_shortcomings(evidence),
    )


def write(report: Report, evidence: Evidence, folder: Path) -> None:
    """Make report.json and the picture in `folder`."""
    text = json.dumps(asdict(report), indent=2, allow_nan=False)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    draw(report, evidence, folder / PICTURE_NAME)


def lines(report: Report) -> list[tuple[str, str]]:
    """The short report for a terminal: (what, figures)."""
    pauses = "no swap" if report.longest_pause_ms is None else f"engine paused {report.longest_pause_ms:.0f} ms at most"
    stall = "no stream ran during a swap"
    if report.longest_stall_ms is not None:
        stall = f"{report.longest_stall_ms:.0f} ms ({report.streams_over_swaps} streams ran over a swap; {pauses})"
    return [
        ("personalisation score", _change(report.score_before, report.score_before_interval,
                                          report.score_after, report.score_after_interval)),
        ("right answers", _change(report.correct_before, report.correct_before_interval,
                                  report.correct_after, report.correct_after_interval)),
        ("right, with the working", f"{report.sound_before:.2f} → {report.sound_after:.2f}"),
        ("sessions until three in a row", f"{_sessions(report.sessions_until_liked)} liked, "
                                          f"{_sessions(report.sessions_until_good)} liked and right with the working"),
        ("unrelated tasks", f"{report.unrelated_before:.2f} → {report.unrelated_after:.2f} ("
                            + ", ".join(f"{task} {a:.2f} → {b:.2f}" for task, (a, b) in report.unrelated_tasks.items())
                            + ")"),
        ("KL from the reference", "not measured" if report.reference_kl is None else
                                  f"{report.reference_kl:.3f} nats per token"),
        ("tokens per reply", f"{report.reply_tokens_before:.0f} → {report.reply_tokens_after:.0f}"),
        ("conversations · turns", f"{report.conversations} · {report.turns}"),
        ("judgements", f"{report.judgements}, of which {report.abstentions} abstained; {report.hints} with a hint"),
        ("samples", f"{report.samples}, {report.samples_trained} trained on, {report.samples_dropped} too old"),
        ("versions · swaps", f"{report.versions}, {report.versions_rejected} of them rejected · {report.swaps}"),
        ("requests failed", f"{report.requests_failed} of {report.requests}"),
        ("longest stall of a stream", stall),
        ("seconds", f"{report.seconds:.0f}, of which {report.start_s:.0f} to start"),
        ("run directory", report.run_directory),
        ("picture", report.picture),
    ]  # fmt: skip


def share_interval(share: float, number: int) -> Interval:
    """Percentile bootstrap of a share of `number` yes-or-no outcomes (a resample's sum is binomial)."""
    return _percentiles(_resampled(share, number, seed=1))


def change_interval(share: float, number: int, later_share: float, later_number: int) -> Interval:
    """Percentile bootstrap of the difference of two shares, taken as independent."""
    return _percentiles(_resampled(later_share, later_number, seed=2) - _resampled(share, number, seed=1))


def newest_at(swaps: Sequence[Swap], at: float) -> int:
    """The version that served at a time; 0 before the first swap."""
    ordered = sorted(swaps, key=lambda swap: swap.at)
    index = bisect_right([swap.at for swap in ordered], at)
    return ordered[index - 1].version if index else 0


def rolling(values: Sequence[float], window: int = ROLLING) -> np.ndarray:
    """f64[len - w + 1]: means of every `w` neighbours, w = min(window, len); the first is of values[:w]."""
    width = min(window, len(values))
    return np.convolve(values, np.full(width, 1 / width), mode="valid") if width else np.empty(0)


def sessions_until(passes: Sequence[bool], in_a_row: int = IN_A_ROW) -> int | None:
    """How many sessions until so many first replies in a row pass, the last of them counted; None: never."""
    run = 0
    for number, passed in enumerate(passes, 1):
        run = run + 1 if passed else 0
        if run == in_a_row:
            return number
    return None


def k3(drifts: np.ndarray) -> float:
    """KL of the sampler from a reference: mean of exp(d) - 1 - d, d = l_reference - l_sampler of sampled tokens."""
    drifts = drifts.astype(np.float64)
    return float(np.mean(np.expm1(drifts) - drifts))


def draw(report: Report, evidence: Evidence, file: Path) -> None:
    """The learning curve: rolling scores over conversations, versions as they came, both evaluations at the ends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    style, right = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    replies = _in_order(evidence.first_replies)
    _curve(style, [reply.satisfied for reply in replies], BLUE)
    _curve(right, [reply.correct for reply in replies], GREEN)
    end = max(1, len(replies))
    _evaluations(style, end, BLUE, (report.score_before, report.score_before_interval),
                 (report.score_after, report.score_after_interval))  # fmt: skip
    _evaluations(right, end, GREEN, (report.correct_before, report.correct_before_interval),
                 (report.correct_after, report.correct_after_interval))  # fmt: skip
    _mark_versions((style, right), [reply.at for reply in replies], evidence.swaps)
    style.set_ylabel("as they like it" if report.persona == "all" else f"as the {report.persona} likes it")
    right.set_ylabel("right answers")
    right.set_xlabel("conversations")
    right.set_xlim(-0.05 * end, 1.05 * end)
    for axes in (style, right):
        axes.set_ylim(0, 1.02)
        axes.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    style.legend(loc="lower right", frameon=False, fontsize=9)
    figure.suptitle(
        f"First replies to somebody who never says beforehand what they like: "
        f"{report.score_before:.2f} → {report.score_after:.2f}\n"
        f"{report.method}, {report.versions} versions from {report.samples_trained} judged turns, "
        f"{report.seconds:.0f} s, seed {report.seed}",
        fontsize=10,
    )
    figure.savefig(file)


def _curve(axes: Any, outcomes: Sequence[bool], colour: str) -> None:
    means = rolling([float(outcome) for outcome in outcomes])
    at = np.arange(len(outcomes) - len(means) + 1, len(outcomes) + 1)
    axes.plot(at, means, color=colour, linewidth=2, label=f"in conversations (mean of the last {ROLLING})")


def _evaluations(
    axes: Any, end: int, colour: str, before: tuple[float, Interval], after: tuple[float, Interval]
) -> None:
    """Before and after with their intervals, a little outside the conversations."""
    shares = np.array([before[0], after[0]])
    bounds = np.array([[before[1].low, after[1].low], [before[1].high, after[1].high]])
    at = [-0.025 * end, 1.025 * end]
    axes.errorbar(
        at, shares, yerr=np.abs(bounds - shares), fmt="o", color=colour, mfc="white", mew=2, markersize=7, capsize=4,
        elinewidth=1.5, label="held-out problems, before and after (95 %)",
    )  # fmt: skip


def _mark_versions(panels: Sequence[Any], asked_at: Sequence[float], swaps: Sequence[Swap]) -> None:
    """A thin line where each version began to serve; numbers above the first panel, as many as fit."""
    first: dict[int, float] = {}
    for swap in sorted(swaps, key=lambda swap: swap.at):
        first.setdefault(swap.version, swap.at)
    step = max(1, -(-len(first) // 12))
    for version, at in first.items():
        place = bisect_right(asked_at, at) + 0.5
        for axes in panels:
            axes.axvline(place, color=GREY, linewidth=0.6, alpha=0.5, zorder=0)
        if version % step == 0:
            panels[0].annotate(
                f"v{version}", (place, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                fontsize=8, color=GREY,
            )  # fmt: skip


def _version_rows(evidence: Evidence) -> tuple[VersionRow, ...]:
    """Version 0 (as configured) and every version trained, in order."""
    swaps = {swap.version: swap for swap in reversed(evidence.swaps)}
    seen: dict[int, list[FirstReply]] = {}
    for reply in evidence.first_replies:
        seen.setdefault(newest_at(evidence.swaps, reply.at), []).append(reply)
    rows = [_version_row(0, evidence.serving - evidence.started, 0, {}, None, seen.get(0, []))]
    for version in sorted(evidence.versions, key=lambda version: version.number):
        number = version.number
        published = version.at - evidence.started
        rows.append(
            _version_row(
                number, published, len(version.samples), version.metrics, swaps.get(number), seen.get(number, [])
            )
        )
    return tuple(rows)


def _version_row(
    number: int, after_s: float, samples: int, metrics: dict[str, float], swap: Swap | None, seen: list[FirstReply]
) -> VersionRow:
    return VersionRow(
        version=number,
        after_s=after_s,
        samples=samples,
        loss=metrics.get("loss"),
        lag=metrics.get("lag_mean"),
        grad_norm=metrics.get("grad_norm"),
        pause_ms=swap.stall_ms if swap else None,
        canary_error=swap.canary_error if swap else None,
        first_replies=len(seen),
        kl=metrics.get("kl"),
        score=_mean_known([reply.satisfied for reply in seen]),
        correct=_mean_known([reply.correct for reply in seen]),
        sound=_mean_known([reply.correct and reply.shows_work for reply in seen]),
        good=_mean_known([reply.good for reply in seen]),
        characters=_mean_known([reply.characters for reply in seen]),
    )


def _persona_rows(evidence: Evidence) -> tuple[PersonaRow, ...]:
    replies = _in_order(evidence.first_replies)
    rows = []
    for before, after in zip(evidence.before, evidence.after, strict=True):
        own = [reply for reply in replies if reply.persona == before.persona]
        rows.append(
            PersonaRow(
                persona=before.persona,
                score_before=before.score,
                score_after=after.score,
                correct_before=before.correct,
                correct_after=after.correct,
                sessions=len(own),
                sessions_until_liked=sessions_until([reply.satisfied for reply in own]),
                sessions_until_good=sessions_until([reply.good for reply in own]),
            )
        )
    return tuple(rows)


def _in_order(replies: Sequence[FirstReply]) -> list[FirstReply]:
    """By the time they were asked for."""
    return sorted(replies, key=lambda reply: reply.at)


def _mean_known(values: Sequence[float | None]) -> float | None:
    """The mean; None of nothing, or where one of the values is None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _sessions(number: float | None) -> str:
    return "never" if number is None else f"{number:.0f}"


def _shortcomings(evidence: Evidence) -> tuple[str, ...]:
    """What keeps this demonstration from being a success, in words."""
    before, after = pooled(evidence.before), pooled(evidence.after)
    gain, change = after.score - before.score, after.correct - before.correct
    found = []
    if gain < MIN_GAIN:
        found.append(
            f"the score changed by {gain:+.2f}, less than +{MIN_GAIN}: the policy did not learn what was liked"
        )
    if change < -MAX_LOSS:
        found.append(
            f"right answers changed by {change:+.2f}, more than -{MAX_LOSS}: the style was paid for with answers"
        )
    if evidence.requests_failed:
        found.append(f"{evidence.requests_failed} of {evidence.requests} requests failed; none may")
    if evidence.rejected:
        found.append(
            f"{len(evidence.rejected)} of {len(evidence.versions)} versions rejected: {evidence.rejected[0].reason}"
        )
    if not evidence.drained:
        found.append("turns were still waiting for a judgement or for training when the time for it was over")
    return tuple(found)


def _split_streams(streams: Sequence[Stream], swaps: Sequence[Swap]) -> tuple[list[Stream], list[Stream]]:
    """Streams that overlapped a swap, and the others."""
    spans = [(swap.at - swap.stall_ms / 1000 - SWAP_SLACK_S, swap.at) for swap in swaps]
    over: list[Stream] = []
    apart: list[Stream] = []
    for stream in streams:
        overlaps = any(stream.started < end and start < stream.ended for start, end in spans)
        (over if overlaps else apart).append(stream)
    return over, apart


def _longest_ms(streams: Sequence[Stream]) -> float | None:
    return max((1000 * stream.longest_gap_s for stream in streams), default=None)


def _resampled(share: float, number: int, seed: int) -> np.ndarray:
    if number <= 0:
        raise ValueError("an interval needs at least one outcome")
    return np.random.default_rng(seed).binomial(number, share, RESAMPLES) / number


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, (2.5, 97.5))
    return Interval(float(low), float(high))


def _change(before: float, before_interval: Interval, after: float, after_interval: Interval) -> str:
    return (
        f"{before:.2f} [{before_interval.low:.2f}, {before_interval.high:.2f}] → "
        f"{after:.2f} [{after_interval.low:.2f}, {after_interval.high:.2f}]"
    )
