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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from clawrl.cli import add_config_options, config_of
from clawrl.config import Config, PoolSection
from clawrl.errors import ClawrlError, ConfigError, EnvError
from clawrl.main import System
from clawrl.observe import set_up_logging
from clawrl.rollout.agent import Agent, Caller, run_episode
from clawrl.rollout.attempt import Attempt, ended
from clawrl.rollout.attempt import told as told_briefly
from clawrl.rollout.worker import Room, agent_of, caller_of, limits_of
from clawrl.types import Comparison, Episode, Swap
from jobs.demo import Screen, Watch, innermost, told
from jobs.report import BLUE, GREY, ROLLING, Interval, newest_at, rolling, share_interval

CONCURRENCY = 16
"""Attempts of one pool that are measured side by side, and at most: none is measured further than this whose first
attempts all came to no outcome."""
CLOSE_S = 30.0
POLL_S = 1.0
ENDS = ("done", "truncated", "timeout", "error", "lost")


@dataclass(frozen=True, slots=True)
class Measured:
    """Attempts at held-out tasks, one at each."""

    pool: str
    attempts: int
    solved: float | None  # share whose outcome is 1; None: no attempt came to an outcome
    interval: Interval | None
    mean_outcome: float | None
    mean_turns: float
    failed: int  # without an outcome
    reason: str  # why the first of them has none


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
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        system = System.start(config, screen.say)
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
        learning = [pool.name for pool in config.pools if not pool.evaluate_only]
        troubles = _Troubles({name: system.actors[f"pool-{name}"] for name in learning})
        await _until(watch, options.versions if learning else 0, time.time() + 60 * options.minutes, screen, troubles)
        counts = await _close_pools(troubles.pools, screen)
        after = await _measure_all(config, system, screen, options.tasks)
        watching.cancel()
    journal = system.actors["journal"]
    comparisons: list[Comparison] = await journal.comparisons.remote()
    swaps: list[Swap] = await journal.swaps.remote()
    report = {
        "pools": [
            {
                "pool": one.pool,
                "before": asdict(one),
                "after": asdict(two),
                "episodes": counts.get(one.pool, {}),
                "groups": [_point(each, swaps, started) for each in comparisons if each.source == one.pool],
            }
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


def _point(comparison: Comparison, swaps: Sequence[Swap], started: float) -> dict[str, Any]:
    """A group of attempts as a point of the learning curve; its version is the one that served when it had ended."""
    outcomes = comparison.outcomes
    return {
        "seconds": round(comparison.at - started, 1),
        "version": newest_at(swaps, comparison.at),
        "outcome": sum(outcomes) / len(outcomes) if outcomes else None,
        "attempts": len(outcomes),
        "samples": comparison.samples,
    }


class _Troubles:
    """Pools that come to nothing; each reason is told once."""

    def __init__(self, pools: dict[str, Any]) -> None:
        self.pools = pools
        self._told: dict[str, str] = {}

    async def tell(self, screen: Screen) -> None:
        for name, reason in zip(self.pools, await _ask_all(self.pools.values(), "trouble"), strict=True):
            if reason and reason != self._told.get(name):
                screen.note(escape(f"{name}: no attempt comes to an outcome; the last: {reason}"))
                self._told[name] = reason


async def _ask_all(actors: Iterable[Any], method: str) -> list[Any]:
    async def one(actor: Any) -> Any:
        return await getattr(actor, method).remote()

    return await asyncio.gather(*map(one, actors))


async def _until(watch: Watch, versions: int, deadline: float, screen: Screen, troubles: _Troubles) -> None:
    """Wait until so many versions were made, and the newest serves."""
    screen.say(f"training until version {versions}")
    while watch.state.head < versions or watch.state.serving != watch.state.head:
        if time.time() > deadline:
            screen.say(f"time is up at version {watch.state.head}")
            return
        await troubles.tell(screen)
        await asyncio.sleep(POLL_S)


async def _close_pools(pools: dict[str, Any], screen: Screen) -> dict[str, dict[str, int]]:
    """End the pools, by name; what each has made of its attempts."""
    counts = dict(zip(pools, await _ask_all(pools.values(), "stats"), strict=True))
    await _ask_all(pools.values(), "close")
    for name, found in counts.items():
        ends = ", ".join(f"{found[status]} {status}" for status in ENDS if found.get(status))
        screen.note(f"{name}: {found.get('groups', 0)} groups; attempts that ended: {ends or 'none'}")
    return counts


async def _measure_all(config: Config, system: System, screen: Screen, tasks: int) -> list[Measured]:
    """All pools side by side, so that none waits for a slow one. Raises ClawrlError if none came to an outcome."""

    async def one(pool: PoolSection) -> Measured:
        found = await measure(pool, system.url, config.policy.served_name, tasks)
        screen.note(escape(f"{pool.name}: {_told(found)}"))
        return found

    screen.say(f"{tasks} held-out tasks of {', '.join(pool.name for pool in config.pools)}")
    found = await asyncio.gather(*map(one, config.pools))
    if all(each.solved is None for each in found):
        raise ClawrlError("; ".join(f"{each.pool}: {_told(each)}" for each in found))
    return found


def _told(found: Measured) -> str:
    failed = f"{found.failed} of {found.attempts} attempts came to no outcome; the first: {found.reason}"
    if found.solved is None:
        return failed
    return f"{found.solved:.2f} solved, {found.mean_turns:.1f} turns each" + (f"; {failed}" if found.failed else "")


async def measure(pool: PoolSection, url: str, model: str, tasks: int) -> Measured:
    """One attempt at each of the first held-out tasks; no further where none of the first comes to an outcome."""
    name, caller = f"measure-{uuid.uuid4().hex[:8]}", caller_of(pool, url, model, side=True)
    numbers, agent, leaving = iter(range(tasks)), agent_of(pool), list[asyncio.Task[None]]()
    found: list[Episode] = []

    def hopeless() -> bool:
        return len(found) >= CONCURRENCY and all(episode.outcome is None for episode in found)

    async def worker() -> None:
        room: Room | None = None
        try:
            for number in numbers:
                if hopeless():
                    return
                attempt = Attempt(pool.name, name, tasks, f"{name}-{number}", "held_out", number)
                room = room or Room(pool)
                found.append(await _measured(pool, room, attempt, caller, agent))
                if found[-1].status not in ("done", "truncated"):  # in what state it is nobody knows
                    leaving.append(asyncio.create_task(room.close()))
                    room = None
        finally:
            if room is not None:
                leaving.append(asyncio.create_task(room.close()))

    try:
        await asyncio.gather(*(worker() for _ in range(min(CONCURRENCY, tasks, pool.max_envs))))
    finally:
        if leaving:
            await asyncio.wait(leaving, timeout=CLOSE_S)
    return measured_of(pool.name, found)


async def _measured(pool: PoolSection, room: Room, attempt: Attempt, caller: Caller, agent: Agent | None) -> Episode:
    """One attempt in a room, which is opened if it was not."""
    try:
        if room.env is None:
            await room.open()
        env: Any = room.env
        return await run_episode(env, attempt, caller, limits_of(pool), agent, room.thread)
    except EnvError as error:
        return ended(attempt, "error", told_briefly(error), 0.0)


def measured_of(pool: str, episodes: Sequence[Episode]) -> Measured:
    """What attempts at held-out tasks have shown."""
    outcomes = [episode.outcome for episode in episodes if episode.outcome is not None]
    reasons = [f"{episode.status}: {episode.reason}" for episode in episodes if episode.outcome is None]
    solved = sum(outcome >= 1 for outcome in outcomes) / len(outcomes) if outcomes else None
    return Measured(
        pool=pool,
        attempts=len(episodes),
        solved=solved,
        interval=None if solved is None else share_interval(solved, len(outcomes)),
        mean_outcome=sum(outcomes) / len(outcomes) if outcomes else None,
        mean_turns=sum(len(episode.rewards) for episode in episodes) / max(1, len(episodes)),
        failed=len(reasons),
        reason=reasons[0] if reasons else "",
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
            mean = rolling(shares, max(1, min(ROLLING, len(shares) // 4)))
            first_at = (len(shares) - len(mean)) / 2
            axes.plot([first_at + at for at in range(len(mean))], mean, color=BLUE, label="rolling mean")
        for at, each in ((0, first), (max(1, len(shares)), last)):
            if each.solved is None or each.interval is None:
                continue
            low, high = each.solved - each.interval.low, each.interval.high - each.solved
            axes.errorbar([at], [each.solved], yerr=[[low], [high]], fmt="o", color="black")
        axes.set(title=first.pool, xlabel="groups", ylabel="solved", ylim=(-0.02, 1.02))
        axes.legend(fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    sys.exit(main())
