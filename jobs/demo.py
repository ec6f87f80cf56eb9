"""`make demo`: the whole loop with a simulated person, from the first start to a report of what was learnt.

    start ─► measure ─► converse, while the policy is judged, trained and swapped ─► drain ─► measure ─► report, stop

Knows the composition root, the simulated users and the report. Ignores how anything is served, judged or trained: the
conversations and both measurements go over HTTP with the `openai` client, as anybody's would.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2  # what openai's client speaks through
import numpy as np
import openai
import ray
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

import jobs
from clawrl.cli import add_config_options, config_of
from clawrl.config import Config
from clawrl.errors import ClawrlError, ConfigError
from clawrl.observe import set_up_logging
from clawrl.types import Swap, WeightVersion
from envs.chat.conversation import Conversation, Evaluation, evaluate, hold_conversation, pooled
from jobs import report
from jobs.notes import NO_NOTES, NoNotes, Notebook, opening
from jobs.people import People
from jobs.report import Evidence, FirstReply, Stream
from jobs.suite import SuiteResult, ask_suite, questions

POLL_S = 0.5
DRAIN_S = 120.0
EVALUATION_CONCURRENCY = 16
BATCHES_WAITING = 2
"""The next conversation begins when fewer turns than this many batches wait for the judge or the trainer."""
JUDGED_WAITING = 2
"""Nor while more turns wait for the judge than it judges side by side, so many times over: whoever keeps notes of its
hints waits for these, not for the trainer."""
DIVERGENCE_REPLIES = 64
"""Replies that the reference scores too."""
REQUEST_S = 120.0
BEAT_S = 15.0
"""Where there is no terminal to draw in, a line this often."""


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 it learnt, 1 it did not or something failed, 2 wrong use or config, 130 interrupted."""
    options = _parser().parse_intermixed_args(arguments)
    set_up_logging(logging.ERROR)
    screen = Screen(jobs.STARTED)
    try:
        if options.seed is not None:
            options.overrides += [f"chat.seed={options.seed}", f"trainer.seed={options.seed}"]
        options.overrides.insert(0, "run=new")  # a demonstration begins with the model as it is
        config = config_of(options)
        People(config.chat)  # a file of problems that cannot be used is told before anything starts
        result = _run(config, screen)
    except (KeyboardInterrupt, SystemExit):
        print("clawrl: interrupted; everything is stopped", file=sys.stderr)
        return 130
    except Exception as error:
        cause = innermost(error)
        words = str(cause) if isinstance(cause, ClawrlError) else told(cause) + screen.keep_traceback(error)
        print(f"clawrl: {words}", file=sys.stderr)
        return 2 if isinstance(cause, ConfigError) else 1
    return _show(result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.demo",
        description="Start clawrl, let a simulated person talk to it while it learns, and report what it learnt.",
    )
    add_config_options(parser)
    parser.add_argument("--seed", type=int, metavar="N", help="of the conversations and the trainer (chat.seed)")
    return parser


def _run(config: Config, screen: Screen) -> report.Report:
    """Everything between the command line and the report; nothing is left running, whatever happens."""
    with screen:
        from clawrl.main import System  # torch and Ray take seconds to load

        signal.signal(signal.SIGTERM, signal.default_int_handler)
        system = System.start(config, screen.say)
        try:
            screen.run_directory = system.run_directory
            evidence = asyncio.run(_demonstrate(config, system, screen))
            screen.say("writing the report")
            result = report.build(evidence)
            report.write(result, evidence, system.run_directory)
        finally:
            screen.say("stopping")
            system.stop()
    return result


def _show(result: report.Report) -> int:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    table = Table(show_header=False, title=f"clawrl demo · {result.method} · seed {result.seed}", title_justify="left")
    for what, figures in report.lines(result):
        table.add_row(what, Text(figures, overflow="fold"))
    console.print(table)
    for shortcoming in result.shortcomings:
        console.print(f"[bold red]not done:[/] {shortcoming}", soft_wrap=True)
    return 1 if result.shortcomings else 0


# -- the demonstration -----------------------------------------------------------------------------------------------


async def _demonstrate(config: Config, system: Any, screen: Screen) -> Evidence:
    serving = time.time()
    wire = Wire()
    watch = Watch(system, screen)
    notebook = Notebook(system.actors["journal"]) if config.chat.memory else NO_NOTES
    async with open_client(system.url, wire) as client, asyncio.TaskGroup() as group:
        watching = group.create_task(watch.run())
        screen.say(f"measuring on {config.chat.evaluation_problems} held-out problems and the suite of unrelated tasks")
        before, suite_before = await asyncio.gather(
            measure_each(client, config, notebook), measure_suite(client, config)
        )
        screen.note(measured(pooled(before)))
        screen.say(f"{config.chat.conversations} conversations, {config.chat.concurrency} at a time")
        screen.expect(config.chat.conversations)
        numbers = range(config.chat.conversations)
        conversations = await converse(client, config, numbers, watch, screen, notebook)
        screen.say("waiting for the last judgements and the last training step")
        drained = await watch.drain(config.buffer.batch_size)
        screen.say("measuring again")
        after, suite_after = await asyncio.gather(measure_each(client, config, notebook), measure_suite(client, config))
        divergence = await reference_divergence(system, [id for each in after for id in each.ids])
        screen.note(measured(pooled(after)))
        watching.cancel()
    journal = system.actors["journal"]
    events = await journal.version_events.remote()
    return Evidence(
        method=config.learning.method,
        model=config.policy.model,
        persona=config.chat.persona,
        seed=config.chat.seed,
        run_directory=str(system.run_directory),
        started=screen.started,
        serving=serving,
        ended=time.time(),
        before=tuple(before),
        after=tuple(after),
        suite_before=suite_before,
        suite_after=suite_after,
        divergence=divergence,
        first_replies=tuple(screen.first_replies),
        streams=tuple(wire.streams),
        versions=tuple(await journal.versions.remote()),
        rejected=tuple({event.version: event for event in events if event.state == "rejected"}.values()),
        swaps=tuple(await journal.swaps.remote()),
        counts=await journal.counts.remote(),
        dropped=watch.state.dropped,
        requests=wire.num_requests,
        requests_failed=sum(each.num_failed for each in (*conversations, *before, *after, suite_before, suite_after)),
        drained=drained,
    )


async def measure(client: openai.AsyncOpenAI, config: Config) -> Evaluation:
    """`measure_each` as one."""
    return pooled(await measure_each(client, config, NO_NOTES))


async def measure_each(client: openai.AsyncOpenAI, config: Config, notebook: Notebook | NoNotes) -> list[Evaluation]:
    """Held-out first messages at the policy's own temperature, as side calls; the personas share the problems."""
    people, found = People(config.chat), []
    for persona in people.personas:
        found.append(
            await evaluate(
                client,
                config.policy.served_name,
                persona,
                people.problems_of(persona),
                EVALUATION_CONCURRENCY,
                account=persona,
                opening=opening(await notebook.notes(persona)),
                reply_tokens=config.chat.reply_tokens,
            )
        )
        if not found[-1].num_replies:
            raise ClawrlError(f"none of the {persona}'s requests was answered; see the logs in the run directory")
    return found


async def measure_suite(client: openai.AsyncOpenAI, config: Config) -> SuiteResult:
    asked = questions(config.judge.prompts)
    result = await ask_suite(client, config.policy.served_name, asked)
    if missing := {question.task for question in asked} - result.shares.keys():
        raise ClawrlError(f"no question of the unrelated tasks {sorted(missing)} was answered; see the logs")
    return result


async def reference_divergence(system: Any, ids: Sequence[str]) -> float | None:
    """KL of the policy from the reference (the initial weights, in the judge's engine), nats per token.

    Estimated as the losses do (k3) on the first DIVERGENCE_REPLIES of these recorded replies, each token with the
    log-probability it was sampled with. None if none of them was recorded.
    """
    from ray import serve

    from clawrl.serving import app

    judge = serve.get_deployment_handle(app.judge_name(system.config), app.APPLICATION)
    journal = system.actors["journal"]
    turns = [await journal.turn.remote(id) for id in ids[:DIVERGENCE_REPLIES]]
    captures = [turn.capture for turn in turns if turn is not None]
    scored = await asyncio.gather(
        *(judge.score_ids.remote(each.prompt_ids, each.completion_ids, 0, weights="frozen") for each in captures)
    )
    drifts = [scores.logprobs - capture.logprobs for scores, capture in zip(scored, captures, strict=True)]
    return report.k3(np.concatenate(drifts)) if drifts else None


async def converse(
    client: openai.AsyncOpenAI,
    config: Config,
    numbers: Iterable[int],
    watch: Watch,
    screen: Screen,
    notebook: Notebook | NoNotes = NO_NOTES,
) -> list[Conversation]:
    """Conversations of these numbers, at most `concurrency` at a time; none begins while judge or trainer is behind.

    Each person behind them is one account with one taste. They are in no hurry: what they say is worth little to a
    trainer that comes to it many versions later.
    """
    chat, people = config.chat, People(config.chat)
    places = asyncio.Semaphore(chat.concurrency)

    async def one(number: int) -> Conversation:
        async with places:
            await watch.caught_up(BATCHES_WAITING * config.buffer.batch_size, JUDGED_WAITING * config.judge.concurrency)
            user = people.person(number)
            session, began = f"demo-{chat.seed}-{number}", time.time()
            talk = await hold_conversation(
                client,
                config.policy.served_name,
                user,
                None,
                session,
                chat.max_turns,
                account=user.persona,
                opening=opening(await notebook.notes(user.persona)),
                reply_tokens=chat.reply_tokens,
            )
            screen.converse(talk, began)
            return talk

    return await _all(one(number) for number in numbers)


async def _all(coroutines: Any) -> list[Any]:
    """Results in order; the first failure cancels the others."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(coroutine) for coroutine in coroutines]
    return [task.result() for task in tasks]


# -- the wire ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Wire:
    """What passed between the client and the gateway."""

    num_requests: int = 0
    streams: list[Stream] = field(default_factory=list)


class _TimedTransport(httpx2.AsyncHTTPTransport):
    """HTTP as always; notes when the pieces of every streamed reply arrived."""

    def __init__(self, wire: Wire) -> None:
        super().__init__(limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64))
        self._wire = wire

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._wire.num_requests += 1
        response = await super().handle_async_request(request)
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            response.stream = _TimedStream(response.stream, self._wire)
        return response


class _TimedStream(httpx2.AsyncByteStream):
    """A response body that notes the longest wait between two of its pieces, and reports when it is closed.

    Clients leave it at the end mark and may come back for what is left, so it may be iterated more than once.
    """

    def __init__(self, body: Any, wire: Wire) -> None:
        self._body, self._wire = body, wire
        self._first: float | None = None
        self._last = self._longest_s = 0.0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._body:
            now = time.time()
            if self._first is None:
                self._first = now
            else:
                self._longest_s = max(self._longest_s, now - self._last)
            self._last = now
            yield piece

    async def aclose(self) -> None:
        if self._first is not None:
            self._wire.streams.append(Stream(self._first, self._last, self._longest_s))
            self._first = None
        await self._body.aclose()


def open_client(url: str, wire: Wire) -> openai.AsyncOpenAI:
    """The official client; without retries, so that every failed request is counted."""
    http = openai.DefaultAsyncHttpxClient(transport=_TimedTransport(wire), trust_env=False)
    key = os.environ.get("CLAWRL_API_KEY", "none")
    return openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=REQUEST_S, http_client=http)


# -- watching ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class State:
    """What the running system last said of itself."""

    counts: dict[str, int] = field(default_factory=dict)  # of the journal
    leased: int = 0
    dropped: int = 0
    waiting: int = 0  # samples for the policy that has most of them to learn from
    unproven: int = 0  # versions that are to serve, and do not yet
    serving: int = 0
    head: int = 0
    loss: float | None = None

    @property
    def unjudged(self) -> int:
        return self.counts.get("next_states", 0) - self.counts.get("judgements", 0)

    @property
    def untrained(self) -> int:
        to_train = sum(self.counts.get(name, 0) for name in ("samples", "for_both")) - self.counts.get("held_out", 0)
        return max(0, to_train - self.counts.get("consumed", 0) - self.dropped)


class Watch:
    """Follows a system by the gateway's /status and the journal's versions, and tells the screen."""

    def __init__(self, system: Any, screen: Screen) -> None:
        self.state = State()
        self._system, self._screen = system, screen
        self._num_told = 0
        self._news = asyncio.Condition()

    async def run(self) -> None:
        """Until cancelled. Raises ClawrlError when the trainer has ended."""
        url = self._system.url.removesuffix("/v1") + "/status"
        async with httpx2.AsyncClient(trust_env=False, timeout=10) as client:
            while True:
                with suppress(httpx2.HTTPError, KeyError, ValueError):  # asked again in a moment
                    self._take((await client.get(url)).json())
                    await self._tell_versions()
                    async with self._news:
                        self._news.notify_all()
                self._require_trainer()
                self._screen.show(self.state)
                await asyncio.sleep(POLL_S)

    async def caught_up(self, limit: int, unjudged: int) -> None:
        """Wait until fewer than `limit` turns wait for the judge or the trainer, `unjudged` of them for the judge."""

        def settled() -> bool:
            state = self.state
            return state.unjudged < unjudged and state.unjudged + state.leased + state.waiting < limit

        async with self._news:
            await self._news.wait_for(settled)

    async def drain(self, batch_size: int) -> bool:
        """Wait until all is judged, trained as far as whole batches go, and served; false if that takes too long."""

        def settled() -> bool:
            state = self.state
            full = state.waiting >= batch_size
            return not (state.unjudged or full or state.leased or state.unproven or state.serving != state.head)

        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S), self._news:
                for _ in range(2):  # what is known may be older than the last reply, or than the last judgement
                    await self._news.wait()
                    await self._news.wait_for(settled)
                return True
        return False

    def _take(self, status: dict[str, Any]) -> None:
        versions, buffer = status["versions"], status["buffer"]
        self.state.counts = {name: int(number) for name, number in status["journal"].items()}
        self.state.leased, self.state.dropped = buffer["leased"], buffer["dropped"] + buffer["offline"]
        self.state.waiting, self.state.unproven = buffer["longest"], versions["unproven"]
        self.state.serving, self.state.head = versions["serving"] or 0, versions["head"]

    async def _tell_versions(self) -> None:
        """A line for every swap since the last look."""
        if self.state.counts["swaps"] == self._num_told:
            return
        journal = self._system.actors["journal"]
        versions, swaps, events = await asyncio.gather(
            journal.versions.remote(), journal.swaps.remote(), journal.version_events.remote()
        )
        made = {version.number: version for version in versions}
        refused = {event.version: event.reason for event in events if event.state == "rejected"}
        for swap in swaps[self._num_told :]:
            version = made.get(swap.version)
            if version is not None:
                self.state.loss = version.metrics.get("loss", self.state.loss)
                self._screen.land(version, swap, refused.get(swap.version))
        self._num_told = len(swaps)

    def _require_trainer(self) -> None:
        done, _ = ray.wait([self._system.training], timeout=0)
        if done:
            try:
                ray.get(done)
            except Exception as error:
                raise ClawrlError(f"the trainer failed: {told(error)}") from error
            raise ClawrlError("the trainer ended by itself; see the run directory's logs")


# -- the screen --------------------------------------------------------------------------------------------------------


class Screen:
    """What the person at the terminal sees; on stderr, so that the report stands alone on stdout."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.run_directory: Path | None = None
        self.first_replies: list[FirstReply] = []
        self._console = Console(stderr=True, highlight=False)
        self._spinner = Spinner("dots")
        self._step, self._total, self._num_failed = "loading the program", 0, 0
        self._state = State()
        self._last_line = started
        self._live = Live(console=self._console, get_renderable=self._draw, refresh_per_second=4, transient=True)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, line: str) -> None:
        """A step begins."""
        self._step = line
        self._print(f"[bold]{line}[/]")

    def note(self, line: str) -> None:
        """A result on the way."""
        self._print(line)

    def expect(self, conversations: int) -> None:
        self._total = conversations

    def converse(self, talk: Conversation, began: float) -> None:
        """A conversation is over."""
        self._num_failed += talk.num_failed
        if talk.exchanges:
            first = talk.exchanges[0]
            self.first_replies.append(
                FirstReply(
                    at=began,
                    satisfied=first.satisfied,
                    correct=first.solution.correct,
                    shows_work=first.solution.shows_work,
                    characters=len(first.reply),
                    persona=talk.persona,
                )
            )

    def land(self, version: WeightVersion, swap: Swap, refused: str | None) -> None:
        """A replica took over a version."""
        if refused is not None:
            self._print(f"[red]version {swap.version} is rejected:[/] {refused}")
            return
        metrics = version.metrics
        facts = [
            f"loss {metrics['loss']:+.4f}" if "loss" in metrics else "no step taken",
            f"{len(version.samples)} turns",
            f"lag {metrics.get('lag_mean', 0):.1f}",
            f"paused {swap.stall_ms:.0f} ms",
        ]
        if self.first_replies:
            facts.append(f"first replies {self._recent('satisfied'):.2f}")
        self._print(f"[cyan]version {swap.version}[/] serves: {' · '.join(facts)}")

    def show(self, state: State) -> None:
        """The system's newest figures."""
        self._state = state
        if not self._console.is_terminal and time.time() - self._last_line > BEAT_S:
            done = f"{len(self.first_replies)} of {self._total} conversations · {self._figures()}"
            self._print(done if self._total else f"still {self._step}")

    def keep_traceback(self, error: Exception) -> str:
        """Write a defect's traceback where it can be found; returns the words that say where."""
        if self.run_directory is None:
            return ""
        file = self.run_directory / "failure.txt"
        with suppress(OSError):
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            return f" (traceback in {file})"
        return ""

    def _print(self, line: str) -> None:
        self._last_line = time.time()
        self._console.print(f"[dim]{self._last_line - self.started:6.1f} s[/]  {line}", soft_wrap=True)

    def _recent(self, what: str) -> float:
        last = self.first_replies[-report.ROLLING :]
        return sum(getattr(reply, what) for reply in last) / len(last) if last else 0.0

    def _figures(self) -> str:
        state, counts = self._state, self._state.counts
        loss = "" if state.loss is None else f" (loss {state.loss:+.4f})"
        return " · ".join(
            (
                f"first replies {self._recent('satisfied'):.2f} liked, {self._recent('correct'):.2f} right",
                f"turns {counts.get('main_turns', 0)}",
                f"judged {counts.get('judgements', 0)}",
                f"hints {counts.get('hints', 0)}",
                f"waiting {state.unjudged} + {state.untrained}",
                f"version {state.serving}{loss}",
                f"failed {self._num_failed}",
            )
        )

    def _draw(self) -> RenderableType:
        """Called by rich's own thread, four times a second."""
        self._spinner.update(text=f"{time.time() - self.started:5.0f} s  {self._step}")
        if not self._total:
            return self._spinner
        done = len(self.first_replies)
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(self._total, done, width=40), f"{done} of {self._total} conversations")
        return Group(self._spinner, grid, Text(self._figures(), style="dim"))


def measured(evaluation: Evaluation) -> str:
    return (
        f"first replies: {evaluation.score:.2f} liked, {evaluation.correct:.2f} right, "
        f"{evaluation.sound:.2f} right with the working"
    )


def innermost(error: BaseException) -> BaseException:
    """What went wrong, out of the task groups it came in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def told(error: BaseException) -> str:
    """`Kind: first … last line`, of the failure itself rather than of Ray's wrapping, which adds a traceback."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or ["no further word"]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} … {lines[-1]}"
    return f"{type(cause).__name__}: {text[:400]}"


if __name__ == "__main__":
    sys.exit(main())
