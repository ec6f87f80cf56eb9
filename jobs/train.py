"""`python -m jobs.train --config configs/toolcall.toml`: pools of environments, trained on until enough versions serve.

    start ─► measure on held-out tasks ─► the pools make attempts, the trainer makes versions ─► measure ─► report, stop

Knows the composition root and the pools. Ignores how anything is served or trained: held-out attempts go over HTTP as
side calls, and never train. The same program runs by `ray job submit`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clawrl.cli import add_config_options, config_of
from clawrl.config import Config, PoolSection
from clawrl.errors import ClawrlError, ConfigError
from clawrl.main import System
from clawrl.observe import set_up_logging
from clawrl.rollout.agent import run_episode
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.worker import Room, agent_of, caller_of, limits_of
from clawrl.types import Comparison, Episode
from jobs.demo import Screen, Watch, innermost, told
from jobs.report import BLUE, GREY, Interval, rolling, share_interval

CONCURRENCY = 16
CLOSE_S = 30.0
POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Measured:
    """Attempts at held-out tasks, one at each."""

    pool: str
    attempts: int
    solved: float  # share whose outcome is 1
    interval: Interval
    mean_outcome: float | None
    mean_turns: float
    failed: int  # without an outcome


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 trained, 1 failed, 2 wrong use or config, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train", description="Train on pools of environments.")
    add_config_options(parser)
    parser.add_argument("--versions", type=int, default=20, help="optimizer steps to train for (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="at most so long (default: %(default)s)")
    parser.add_argument("--tasks", type=int, default=200, help="held-out tasks of each pool (default: %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    set_up_logging(logging.ERROR)
    try:
        options.overrides.insert(0, "run=new")
        config = config_of(options)
        if options.tasks < 1:
            raise ConfigError(f"--tasks {options.tasks}: give at least 1")
        if not config.pools:
            raise ConfigError("no [[pools]] in the config: there is nothing to train on; see configs/toolcall.toml")
        folder = _run(config, options)
    except (KeyboardInterrupt, SystemExit):
        print("clawrl: interrupted; everything is stopped", file=sys.stderr)
        return 130
    except Exception as error:
        cause = innermost(error)
        print(f"clawrl: {cause if isinstance(cause, ClawrlError) else told(cause)}", file=sys.stderr)
        return 2 if isinstance(cause, ConfigError) else 1
    print(f"report {folder / 'report.json'}\npicture {folder / 'learning_curve.png'}")
    return 0


def _run(config: Config, options: argparse.Namespace) -> Path:
    started = time.time()
    with Screen(started) as screen:
        system = System.start(config, screen.say)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return asyncio.run(_train(config, system, screen, options, started))
        finally:
            screen.say("stopping")
            system.stop()


async def _train(config: Config, system: System, screen: Screen, options: argparse.Namespace, started: float) -> Path:
    watch = Watch(system, screen)
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run())
        before = await _measure_all(config, system, screen, options.tasks)
        learning = [pool for pool in config.pools if not pool.evaluate_only]
        versions = options.versions if learning else 0
        await _until(watch, versions, time.time() + 60 * options.minutes, screen)
        for pool in learning:
            await system.actors[f"pool-{pool.name}"].close.remote()
        after = await _measure_all(config, system, screen, options.tasks)
        watching.cancel()
    journal = system.actors["journal"]
    comparisons: list[Comparison] = await journal.comparisons.remote()
    report = {
        "pools": [
            {"pool": one.pool, "before": asdict(one), "after": asdict(two)}
            for one, two in zip(before, after, strict=True)
        ],
        "versions": watch.state.head,
        "groups": len(comparisons),
        "groups_alike": sum(not each.samples for each in comparisons),
        "samples": sum(each.samples for each in comparisons),
        "learning_rate": config.trainer.learning_rate,
        "seed": config.trainer.seed,
        "seconds": time.time() - started,
    }
    folder = system.run_directory
    (folder / "report.json").write_text(json.dumps(report, indent=2, default=float) + "\n", encoding="utf-8")
    _draw(comparisons, before, after, folder / "learning_curve.png")
    return folder


async def _until(watch: Watch, versions: int, deadline: float, screen: Screen) -> None:
    """Wait until so many versions were made, and the newest serves."""
    screen.say(f"training until version {versions}")
    while watch.state.head < versions or watch.state.serving != watch.state.head:
        if time.time() > deadline:
            screen.say(f"time is up at version {watch.state.head}")
            return
        await asyncio.sleep(POLL_S)


async def _measure_all(config: Config, system: System, screen: Screen, tasks: int) -> list[Measured]:
    found = []
    for pool in config.pools:
        screen.say(f"{pool.name}: {tasks} held-out tasks")
        found.append(await measure(pool, system.url, config.policy.served_name, tasks))
        screen.note(f"{pool.name}: {found[-1].solved:.2f} solved, {found[-1].mean_turns:.1f} turns each")
    return found


async def measure(pool: PoolSection, url: str, model: str, tasks: int) -> Measured:
    """One attempt at each of the first held-out tasks. Raises ClawrlError if none came to an outcome."""
    name, caller = f"measure-{uuid.uuid4().hex[:8]}", caller_of(pool, url, model, side=True)
    numbers, agent, leaving = iter(range(tasks)), agent_of(pool), list[asyncio.Task[None]]()

    async def worker() -> list[Episode]:
        episodes: list[Episode] = []
        room = Room(pool)
        try:
            await room.open()
            for number in numbers:
                attempt = Attempt(pool.name, name, tasks, f"{name}-{number}", "held_out", number)
                episodes.append(await run_episode(room.env, attempt, caller, limits_of(pool), agent, room.thread))
                if episodes[-1].status not in ("done", "truncated"):  # in what state it is nobody knows
                    leaving.append(asyncio.create_task(room.close()))
                    room = Room(pool)
                    await room.open()
        finally:
            leaving.append(asyncio.create_task(room.close()))
        return episodes

    try:
        found = [each for done in await asyncio.gather(*(worker() for _ in range(CONCURRENCY))) for each in done]
    finally:
        await asyncio.wait(leaving, timeout=CLOSE_S)
    outcomes = [episode.outcome for episode in found if episode.outcome is not None]
    if not outcomes:
        raise ClawrlError(f"{pool.name}: no attempt came to an outcome; the first: {found[0].reason}")
    solved = sum(outcome >= 1 for outcome in outcomes) / len(outcomes)
    return Measured(
        pool.name,
        len(found),
        solved,
        share_interval(solved, len(outcomes)),
        sum(outcomes) / len(outcomes),
        sum(len(episode.rewards) for episode in found) / len(found),
        len(found) - len(outcomes),
    )


def _draw(comparisons: Sequence[Comparison], before: list[Measured], after: list[Measured], file: Path) -> None:
    """A panel per pool: mean outcome of its groups in the order of their ends, and both measurements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2 * len(before)), dpi=130, layout="constrained")
    panels: Any = figure.subplots(len(before), 1, squeeze=False)[:, 0]
    for axes, first, last in zip(panels, before, after, strict=True):
        means = [sum(x.outcomes) / len(x.outcomes) for x in comparisons if x.source == first.pool and x.outcomes]
        shares = [(mean + 1) / 2 for mean in means]
        axes.plot(shares, ".", color=GREY, markersize=3, label="a group of attempts")
        if shares:
            mean = rolling(shares)
            first_at = (len(shares) - len(mean)) / 2
            axes.plot([first_at + at for at in range(len(mean))], mean, color=BLUE, label="rolling mean")
        for at, each in ((0, first), (max(1, len(shares)), last)):
            low, high = each.solved - each.interval.low, each.interval.high - each.solved
            axes.errorbar([at], [each.solved], yerr=[[low], [high]], fmt="o", color="black")
        axes.set(title=first.pool, xlabel="groups", ylabel="solved", ylim=(-0.02, 1.02))
        axes.legend(fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
