"""`python -m jobs.gate poisoned|honest|reckless`: the gate and the watch at work on the running system.

    poisoned   the collector turns the sign of everything it learns round for 5 updates: caught and taken back
    honest     the default settings, over several seeds: nothing is rejected, nothing is taken back
    reckless   a learning rate that reaches the style and breaks the answers: served without the gate, not with it

Knows the demonstration's parts (`jobs.demo`), and how to harm a system from outside: a collector of its own, a
setting. The product has no switch for either. Ends with 1 if what was claimed did not happen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from clawrl.cli import add_config_options, config_of
from clawrl.config import Config
from clawrl.errors import ClawrlError, ConfigError
from clawrl.main import System
from clawrl.observe import set_up_logging
from clawrl.rollout.collector import Collector
from clawrl.types import GateDecision, Sample, VersionEvent
from envs.chat.conversation import Evaluation
from jobs.demo import Screen, Watch, Wire, converse, innermost, measure, measured, open_client, told
from jobs.report import BLUE, GREEN, GREY, FirstReply, change_interval, rolling, share_interval

POISONED_UPDATES = 5
MIN_GAIN, MAX_LOSS = 0.2, 0.05
HEALTHY = 0.45
"""Conversations before the poison: the policy is in the middle of its learning, where a wrong sign does most harm."""
SETTINGS = (
    "run=new", "gate.held_out_share=0.2", "gate.size=128", "versions.keep=20", "chat.evaluation_problems=300",
)  # fmt: skip
"""A run of minutes has few turns: more of them are held out, and the way back may be longer than the kept versions."""
CONVERSATIONS = {
    "poisoned": ["chat.conversations=600"],
    "honest": ["chat.conversations=360"],
    "reckless": ["chat.conversations=340"],
}
RED = "#b3261e"
SHOWN_CHECK = {"poisoned": "agreement", "honest": "agreement", "reckless": "approved_loss"}
"""The check drawn below each run."""


class PoisonedCollector(Collector):
    """A collector with a defect that can be switched on: what it learns from arrives with the wrong sign.

    Judgements are journalled as they were made; only the targets of samples are turned round.
    """

    _left = 0

    async def poison(self, samples: int) -> None:
        """Turn the sign of so many samples that come now."""
        self._left = samples

    async def _build(self, *arguments: Any) -> Sample | None:
        sample = await super()._build(*arguments)
        if sample is None or sample.held_out or not self._left:
            return sample
        self._left -= 1
        target = sample.distillation
        return replace(
            sample,
            advantages=None if sample.advantages is None else -sample.advantages,
            distillation=None if target is None else replace(target, advantages=-target.advantages),
        )


class PoisonedSystem(System):
    collector = PoisonedCollector


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: what was measured of its replies at several times, and what gate and watch decided."""

    name: str
    seed: int
    measured: dict[str, Evaluation]  # by when
    marks: dict[str, float]  # conversations had when something was done
    versions: int
    served: int
    rejected: tuple[VersionEvent, ...]
    decisions: tuple[GateDecision, ...]
    first_replies: tuple[FirstReply, ...]
    swaps: tuple[tuple[float, int], ...]  # (time, version)
    failed_requests: int
    gate_seconds: float  # the longest examination
    seconds: float
    run_directory: str

    @property
    def stopped(self) -> list[GateDecision]:
        """Decisions that kept a version from serving, or took it back."""
        return [decision for decision in self.decisions if not decision.passed]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.gate", description="What the gate and the watch stop, on the running system."
    )
    parser.add_argument("demonstration", choices=list(DEMONSTRATIONS))
    add_config_options(parser)
    parser.add_argument("--json", metavar="FILE", help="write the result there, and the picture beside it (.png)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of the honest run (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    set_up_logging(logging.ERROR)
    try:
        options.overrides = [*SETTINGS, *CONVERSATIONS[options.demonstration], *options.overrides]
        outcomes, shortcomings = DEMONSTRATIONS[options.demonstration](config_of(options), options.seeds)
    except (KeyboardInterrupt, SystemExit):
        print("clawrl: interrupted; everything is stopped", file=sys.stderr)
        return 130
    except Exception as error:
        cause = innermost(error)
        print(f"clawrl: {cause if isinstance(cause, ClawrlError) else told(cause)}", file=sys.stderr)
        return 2 if isinstance(cause, ConfigError) else 1
    file = Path(options.json or Path(outcomes[-1].run_directory) / f"gate-{options.demonstration}.json")
    write(options.demonstration, outcomes, shortcomings, file)
    for line in (*summary(outcomes), f"result {file}", f"picture {file.with_suffix('.png')}"):
        print(line)
    for shortcoming in shortcomings:
        print(f"not shown: {shortcoming}")
    return 1 if shortcomings else 0


# -- the demonstrations ------------------------------------------------------------------------------------------------


def poisoned(config: Config, seeds: int) -> tuple[list[Outcome], list[str]]:
    outcome = run("poisoned", config, PoisonedSystem, _poison_later)
    before, after = outcome.measured["before the poison"], outcome.measured["at the end"]
    found = _common(outcome)
    if before.score - outcome.measured["at the start"].score < MIN_GAIN / 2:
        found.append(f"the score had not risen by {MIN_GAIN / 2} before the poison: {before.score:.2f}")
    if not outcome.stopped:
        found.append("no version was rejected or taken back: the poison went unnoticed")
    for what in ("score", "correct"):
        high = change_interval(getattr(before, what), before.num_replies, getattr(after, what), after.num_replies).high
        if high < 0:
            found.append(f"{what} went from {getattr(before, what):.2f} to {getattr(after, what):.2f}, beyond noise")
    return [outcome], found


def honest(config: Config, seeds: int) -> tuple[list[Outcome], list[str]]:
    outcomes, found = [], []
    for seed in range(seeds):
        chat = config.chat.model_copy(update={"seed": seed})
        trainer = config.trainer.model_copy(update={"seed": seed})
        outcome = run("honest", config.model_copy(update={"chat": chat, "trainer": trainer}), System, _talk)
        outcomes.append(outcome)
        found += [f"seed {seed}: {each}" for each in _common(outcome)]
        found += [f"seed {seed}: falsely stopped version {each.version}: {each.reason}" for each in outcome.stopped]
        before, after = outcome.measured["at the start"], outcome.measured["at the end"]
        if after.score - before.score < MIN_GAIN:
            found.append(
                f"seed {seed}: the score went from {before.score:.2f} to {after.score:.2f}: nothing was learnt"
            )
    return outcomes, found


def reckless(config: Config, seeds: int) -> tuple[list[Outcome], list[str]]:
    rate = config.trainer.model_copy(update={"learning_rate": 2e-3})
    config = config.model_copy(update={"trainer": rate})
    off = config.model_copy(update={"gate": config.gate.model_copy(update={"enabled": False})})
    without, gated = run("without the gate", off, System, _talk), run("with the gate", config, System, _talk)
    found = _common(without) + _common(gated)
    before, after = without.measured["at the start"], without.measured["at the end"]
    if after.score - before.score < MIN_GAIN or before.correct - after.correct < MAX_LOSS:
        found.append(
            f"without the gate the score went {before.score:.2f} → {after.score:.2f} and right answers "
            f"{before.correct:.2f} → {after.correct:.2f}: style was not bought with answers"
        )
    before, after = gated.measured["at the start"], gated.measured["at the end"]
    if not any(decision.stage == "before" for decision in gated.stopped):
        found.append("the gate rejected no version")
    interval = change_interval(before.correct, before.num_replies, after.correct, after.num_replies)
    if interval.high < 0:
        found.append(f"right answers fell from {before.correct:.2f} to {after.correct:.2f} in spite of the gate")
    return [without, gated], found


DEMONSTRATIONS: dict[str, Callable[[Config, int], tuple[list[Outcome], list[str]]]] = {
    "poisoned": poisoned,
    "honest": honest,
    "reckless": reckless,
}


def _common(outcome: Outcome) -> list[str]:
    return [f"{outcome.failed_requests} requests failed; none may"] if outcome.failed_requests else []


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stage:
    """A running system and those who talk to it."""

    config: Config
    system: System
    screen: Screen
    watch: Watch
    client: Any
    measured: dict[str, Evaluation]
    marks: dict[str, float]
    failed: int = 0

    async def measure(self, when: str) -> None:
        self.screen.say(f"measuring {when}")
        self.measured[when] = await measure(self.client, self.config)
        self.failed += self.measured[when].num_failed
        self.screen.note(measured(self.measured[when]))

    async def talk(self, numbers: range) -> None:
        talks = await converse(self.client, self.config, numbers, self.watch, self.screen)
        self.failed += sum(talk.num_failed for talk in talks)

    async def drain(self) -> None:
        self.screen.say("waiting for the last judgements and the last training step")
        await self.watch.drain(self.config.buffer.batch_size)


async def _talk(stage: Stage) -> None:
    await stage.talk(range(stage.config.chat.conversations))
    await stage.drain()


async def _poison_later(stage: Stage) -> None:
    """Some conversations as they are, then poison for 5 updates' worth of samples among the rest."""
    number = stage.config.chat.conversations
    healthy = int(number * HEALTHY)
    await stage.talk(range(healthy))
    await stage.drain()
    await stage.measure("before the poison")
    samples = POISONED_UPDATES * stage.config.buffer.batch_size
    stage.marks["poison"] = len(stage.screen.first_replies)
    stage.screen.say(f"turning the sign of the next {samples} samples")
    await stage.system.actors["collector"].poison.remote(samples)
    await stage.talk(range(healthy, number))
    await stage.drain()


def run(name: str, config: Config, system_class: type[System], script: Callable[[Stage], Any]) -> Outcome:
    """Start a system, measure, follow the script, measure again; nothing is left running, whatever happens."""
    started = time.time()
    with Screen(started) as screen:
        screen.say(f"{name} · seed {config.chat.seed}")
        system = system_class.start(config, screen.say)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return asyncio.run(_run(name, config, system, screen, script, started))
        finally:
            screen.say("stopping")
            system.stop()


async def _run(
    name: str, config: Config, system: System, screen: Screen, script: Callable[[Stage], Any], started: float
) -> Outcome:
    watch = Watch(system, screen)
    async with open_client(system.url, Wire()) as client, asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run())
        stage = Stage(config, system, screen, watch, client, {}, {})
        screen.expect(config.chat.conversations)
        await stage.measure("at the start")
        await script(stage)
        await stage.measure("at the end")
        watching.cancel()
    journal = system.actors["journal"]
    events, decisions, versions, swaps = await asyncio.gather(
        journal.version_events.remote(),
        journal.gate_decisions.remote(),
        journal.versions.remote(),
        journal.swaps.remote(),
    )
    return Outcome(
        name=name,
        seed=config.chat.seed,
        measured=stage.measured,
        marks=stage.marks,
        versions=len(versions),
        served=len({swap.version for swap in swaps}),
        rejected=tuple({event.version: event for event in events if event.state == "rejected"}.values()),
        decisions=tuple(decisions),
        first_replies=tuple(sorted(screen.first_replies, key=lambda reply: reply.at)),
        swaps=tuple((swap.at, swap.version) for swap in swaps),
        failed_requests=stage.failed,
        gate_seconds=max((decision.seconds for decision in decisions), default=0.0),
        seconds=time.time() - started,
        run_directory=str(system.run_directory),
    )


# -- the result --------------------------------------------------------------------------------------------------------


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for outcome in outcomes:
        lines.append(f"{outcome.name} · seed {outcome.seed} · {outcome.seconds:.0f} s")
        lines += [
            f"  {when}: score {each.score:.2f}, right answers {each.correct:.2f}"
            for when, each in outcome.measured.items()
        ]
        lines.append(
            f"  {outcome.versions} versions, {outcome.served} served, {len(outcome.rejected)} rejected; "
            f"longest examination {outcome.gate_seconds:.1f} s"
        )
        lines += [f"  version {each.version} {each.stage} serving: {each.reason}" for each in outcome.stopped]
    return lines


def write(name: str, outcomes: Sequence[Outcome], shortcomings: Sequence[str], file: Path) -> None:
    """The result as JSON, and its picture beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "demonstration": name,
        "shown": not shortcomings,
        "shortcomings": list(shortcomings),
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    file.write_text(json.dumps(result, indent=2, default=float) + "\n", encoding="utf-8")
    draw(name, outcomes, file.with_suffix(".png"))


def draw(name: str, outcomes: Sequence[Outcome], file: Path) -> None:
    """Per run: what people saw over conversations, the versions that came, those stopped in red, and a check below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9 * len(outcomes)), dpi=100, layout="constrained")
    panels = figure.subfigures(len(outcomes), 1, squeeze=False)[:, 0]
    for panel, outcome in zip(panels, outcomes, strict=True):
        upper, lower = panel.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _replies(upper, outcome)
        _checks(lower, outcome, SHOWN_CHECK[name])
    figure.savefig(file)


def _replies(axes: Any, outcome: Outcome) -> None:
    replies = outcome.first_replies
    for what, colour, label in (("satisfied", BLUE, "as the user likes it"), ("correct", GREEN, "right answers")):
        means = rolling([float(getattr(reply, what)) for reply in replies])
        axes.plot(range(len(replies) - len(means) + 1, len(replies) + 1), means, color=colour, linewidth=2, label=label)
    end = max(1, len(replies))
    places = {
        "at the start": -0.02 * end,
        "at the end": 1.02 * end,
        "before the poison": outcome.marks.get("poison", 0),
    }
    for when, each in outcome.measured.items():
        for share, colour in ((each.score, BLUE), (each.correct, GREEN)):
            interval = share_interval(share, each.num_replies)
            error = [[max(0.0, share - interval.low)], [max(0.0, interval.high - share)]]
            axes.errorbar(places[when], share, yerr=error, fmt="o", color=colour, mfc="white", capsize=3)
    for at, version in outcome.swaps:
        axes.axvline(_place(outcome, at), color=GREY, linewidth=0.6, alpha=0.5)
        _name(axes, _place(outcome, at), version, GREY)
    for decision in outcome.stopped:
        place = _place(outcome, decision.at)
        axes.axvline(place, color=RED, linewidth=2.5 if decision.stage == "after" else 1.2)
        _name(axes, place, decision.version, RED)
        if decision.stage == "after":
            axes.annotate("taken back", (place, 0.03), fontsize=8, color=RED, rotation=90, va="bottom", ha="right")
    if "poison" in outcome.marks:
        axes.axvline(outcome.marks["poison"], color="black", linestyle=":", label="poison begins")
    axes.plot([], [], color=RED, label="stopped by the gate or taken back")
    axes.set_ylim(0, 1.02)
    axes.set_title(f"{outcome.name}, seed {outcome.seed}; above: version numbers", fontsize=9, pad=14)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=7, frameon=False)


def _checks(axes: Any, outcome: Outcome, name: str) -> None:
    """One check of every candidate where it was decided, with its bootstrap interval; red where it failed."""
    for decision in outcome.decisions:
        for check in decision.checks:
            if check.name == name and decision.stage == "before" and check.low is not None and check.high is not None:
                error = [[max(0.0, check.value - check.low)], [max(0.0, check.high - check.value)]]
                colour = GREY if check.passed else RED
                axes.errorbar(_place(outcome, decision.at), check.value, yerr=error, fmt="o", ms=4, color=colour, lw=1)
                axes.set_title(f"{name}: {check.bound}", fontsize=8)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set_xlabel("conversations" if outcome.decisions else "conversations (no gate, no checks)")


def _place(outcome: Outcome, at: float) -> int:
    """Conversations had at that time."""
    return sum(reply.at <= at for reply in outcome.first_replies)


def _name(axes: Any, place: int, version: int, colour: str) -> None:
    height = 1.0 if colour == GREY else 1.045  # a refused version's number stands above those that came
    axes.annotate(f"{version}", (place, height), xycoords=("data", "axes fraction"), fontsize=6, color=colour)


if __name__ == "__main__":
    sys.exit(main())
