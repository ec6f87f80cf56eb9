"""The collector: judges what followed each turn, has the reply scored, and appends judgement and sample together.

Knows the journal, the judge and the teacher by their calls. Ignores how a judge thinks, what a trainer does and how
advantages are computed (`samples`, `algorithms`). It is a view of the journal: killed at any moment, it comes back
and judges whatever has no judgement yet.

    journal.pairs_to_judge ──► judge ──► score (teacher per hint, reference) ──► build ──► journal.append
       (long poll)             └── at most `concurrency` turns here ──┘     in order per user   (both at once)

Order. A user's turns are judged side by side, but their samples are built and stored in the order in which their next
states arrived (the journal's seq), because each one moves the user's running baseline. So baselines and samples depend
on the journal alone and never on which judgement was quicker, and what a killed collector leaves of a user is a prefix.
A slow judgement holds back later samples of the same user, for as long as two timeouts at most, and nobody else's.

Explicit feedback. Its score stands above the judge's; its text is read by the judge beside what followed. A turn that
nothing follows is judged by it alone, `judge.feedback_wait_s` after it came.

Environments. Turns of a group of attempts are not judged here: `comparing` runs beside this flow, and asks for votes on
their steps where `learning.process_weight` says so.

Sessions. With `learning.experience` a turn's sample waits until its session has ended (`experience`): then what the
whole session teaches takes the place of the turn's own hints.

Failures. A call that fails because its replica is gone is repeated until `judge.timeout_s` has passed; only then does
the turn abstain. A teacher or reference that fails drops its own term. A journal that fails is asked again until it
answers: no judgement is thrown away.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from ray.exceptions import RayTaskError

from clawrl.algorithms.advantages import RunningBaseline
from clawrl.algorithms.hints import with_hint, with_note
from clawrl.config import JudgeSection, LearningSection
from clawrl.errors import ClawrlError
from clawrl.observe import metric
from clawrl.rollout.comparing import Comparer
from clawrl.rollout.experience import Distiller, Exchange
from clawrl.rollout.samples import build_sample, is_held_out, needs_scores, require_complete, trains
from clawrl.types import Feedback, Judgement, NextState, PolicyScope, Sample, Scores, Turn

log = logging.getLogger(__name__)

POLL_S = 10.0
"""One long poll of the journal."""
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 3.0
"""Pauses between repeated calls double from the first to the last."""
IN_FLIGHT_PER_SLOT = 4
"""Turns held per judging slot: those being judged, and those judged that wait for an earlier turn of their user."""
FORGOTTEN = 1e-6
"""A score whose share of a running baseline is below this no longer counts."""

FEEDBACKS, FEEDBACK_POLL_S = 100, 1.0
"""Read at once, and the pause between."""

_Answer = TypeVar("_Answer")


class Collector:
    """Async actor. `journal`, `judge` and `teacher` are handles: `await handle.method.remote(...)`.

    The judge holds the policy's initial weights where they score: as the KL reference, and as the frozen teacher. Any
    other teacher is `teacher`.
    It starts by itself, so that a restarted actor goes on without being told.
    """

    def __init__(
        self,
        journal: Any,
        judge: Any,
        teacher: Any,
        judging: JudgeSection,
        learning: LearningSection,
        held_out_share: float = 0.0,
        policy_scope: PolicyScope = "group",
    ) -> None:
        self._journal, self._judge = journal, judge
        self._teacher = judge if learning.teacher == "frozen" else teacher
        self._teacher_weights = "current" if learning.teacher == "external" else learning.teacher
        self._judging, self._learning, self._held_out_share = judging, learning, held_out_share
        self._policy_scope: PolicyScope = policy_scope
        self._slots = asyncio.Semaphore(judging.concurrency)
        self._turns: set[asyncio.Task[None]] = set()
        self._newest: dict[str, asyncio.Event] = {}  # per user: set when the newest turn's judgement is durable
        self._baseline = RunningBaseline(learning.baseline_decay)
        self._rebuilt: set[str] = set()  # users whose baseline was read from the journal
        self._counts: Counter[str] = Counter()
        self._reward: float | None = None
        self._after = 0
        self._comparer = Comparer(journal, learning, self._insist, self._step_reference, self._step)
        self._distiller = Distiller(journal, judging.session_idle_s, self._insist, self._read, self._taught)
        # The tiny model heeds a note of the system message in 0.8 to 0.9 of its first replies, and in 0.1 to 0.3 of its
        # second ones, where a reply of its own speaks against it; what the last user message says, in 0.98 of both.
        self._advised = with_note if learning.experience and judging.prompts != "tiny" else with_hint
        loop = asyncio.get_running_loop()
        flows = [self._poll(), self._end_silence(), self._comparer.run()]
        if learning.experience:
            flows.append(self._distiller.run())
        self._polling = [loop.create_task(each) for each in flows]
        for task in self._polling:
            task.add_done_callback(_report_defect)

    async def stats(self) -> dict[str, float | None]:
        """Counts since the actor's start, turns in flight, and the running mean of all scores."""
        names = ("judged", "abstained", "hints", "samples", "skipped", "teacher_failures", "reference_failures")
        counts: dict[str, float | None] = {name: self._counts[name] for name in (*names, "retries", "build_failures")}
        compared = {f"compared_{name}": number for name, number in sorted(self._comparer.counts.items())}
        distilled = {f"distilled_{name}": number for name, number in sorted(self._distiller.counts.items())}
        known = {"in_flight": len(self._turns), "users": len(self._rebuilt), "reward": self._reward}
        return {**counts, **known, **compared, **distilled}

    async def close(self) -> None:
        """Stop at once; turns in flight have no judgement in the journal and are judged by the next collector."""
        tasks = [*self._polling, *self._turns]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- the flow ----------------------------------------------------------------------------------------------------

    async def _poll(self) -> None:
        most = IN_FLIGHT_PER_SLOT * self._judging.concurrency
        while True:
            while len(self._turns) >= most:
                await asyncio.wait(self._turns, return_when=asyncio.FIRST_COMPLETED)
            ask = partial(self._journal.pairs_to_judge.remote, self._after, most - len(self._turns), POLL_S)
            for seq, turn, next_state in await self._insist(ask):
                self._after = max(self._after, seq)
                stored = asyncio.Event()
                earlier, self._newest[turn.user] = self._newest.get(turn.user), stored
                task = asyncio.create_task(self._collect(turn, next_state, earlier, stored))
                self._turns.add(task)
                task.add_done_callback(self._turns.discard)
                task.add_done_callback(_report_defect)

    async def _collect(
        self, turn: Turn, next_state: NextState, earlier: asyncio.Event | None, stored: asyncio.Event
    ) -> None:
        """One turn from its next state to its durable judgement."""
        try:
            async with self._slots:
                judgement = await self._judged(turn, next_state)
                judgement = with_score(judgement, await self._feedback(turn))
                deferred = self._learning.experience and trains(turn)
                if deferred:
                    judgement = replace(judgement, deferred=True)
                else:
                    teacher, reference = await self._scored(turn, judgement)
            if earlier is not None:
                await earlier.wait()
            sample = None if deferred else await self._build(turn, judgement, teacher, reference)
            records = (judgement,) if sample is None else (judgement, sample)
            await self._insist(partial(self._journal.append.remote, *records))
            self._count(judgement, sample)
        finally:
            stored.set()
            if self._newest.get(turn.user) is stored:
                del self._newest[turn.user]

    async def _judged(self, turn: Turn, next_state: NextState) -> Judgement:
        """The judge's answer, or an abstention that says why there is none."""
        next_state = with_corrections(next_state, await self._feedback(turn))
        if not next_state.messages:
            return Judgement(turn.id, (), None, (), 0, 0.0, error="nothing was said after it", at=time.time())
        return await self._asked(self._judge.judge, turn, next_state)

    async def _step(self, turn: Turn, next_state: NextState) -> Judgement:
        """The judge's votes on a step of an episode, or an abstention."""
        async with self._slots:
            return await self._asked(self._judge.judge_step, turn, next_state)

    async def _asked(self, method: Any, turn: Turn, next_state: NextState) -> Judgement:
        started, timeout_s = time.time(), self._judging.timeout_s
        try:
            return await self._insist(partial(method.remote, turn, next_state), timeout_s=timeout_s)
        except Exception as error:
            log.warning("event=judge_abstains turn=%s error=%s", turn.id, type(error).__name__)
            now = time.time()
            return Judgement(turn.id, (), None, (), judge_version=0, seconds=now - started, error=str(error), at=now)

    async def _read(self, exchanges: Sequence[Exchange]) -> str | None:
        """What a session teaches, by the judge. Raises if there is no answer in time."""
        feedback = [await self._feedback(turn) for turn, *_ in exchanges]
        seen = [
            (turn, next_state and with_corrections(next_state, said))
            for (turn, next_state, _, _), said in zip(exchanges, feedback, strict=True)
        ]
        hints = tuple(judgement.hints for _, _, judgement, _ in exchanges if judgement is not None)
        async with self._slots:
            return await self._insist(
                partial(self._judge.lesson.remote, seen, hints), timeout_s=self._judging.timeout_s
            )

    async def _taught(self, turn: Turn, judgement: Judgement, lesson: str | None) -> Sample | None:
        """The sample of a turn whose session has ended."""
        judgement = replace(judgement, hints=() if lesson is None else (lesson,))
        async with self._slots:
            teacher, reference = await self._scored(turn, judgement)
        return await self._build(turn, judgement, teacher, reference)

    async def _feedback(self, turn: Turn) -> list[Feedback]:
        return await self._insist(partial(self._journal.feedback.remote, turn.id))

    async def _end_silence(self) -> None:
        """Let turns be judged that nothing followed and of which something was said."""
        after, wait_s = 0, self._judging.feedback_wait_s
        while True:
            ask = partial(self._journal.unanswered_feedback.remote, after, time.time() - wait_s, FEEDBACKS)
            after, turns = await self._insist(ask)
            ends = [NextState(turn, "user", (), False, time.time()) for turn in turns]
            if ends:
                await self._insist(partial(self._journal.append.remote, *ends))
            await asyncio.sleep(FEEDBACK_POLL_S)

    async def _scored(self, turn: Turn, judgement: Judgement) -> tuple[list[Scores | None], Scores | None]:
        """The teacher's scores of the reply under each hint used, and the reference's; None where there are none."""
        teach, refer = needs_scores(turn, judgement, self._learning)
        hints = judgement.hints[: self._learning.max_hints] if teach else ()
        *teacher, reference = await asyncio.gather(
            *(self._try_score(turn, "teacher", partial(self._ask_teacher, turn, hint)) for hint in hints),
            self._reference(turn) if refer else _nothing(),
        )
        return teacher, reference

    async def _build(
        self, turn: Turn, judgement: Judgement, teacher: list[Scores | None], reference: Scores | None
    ) -> Sample | None:
        """The turn's sample, against the baseline before it; then its score moves the baseline."""
        if turn.user not in self._rebuilt:
            await self._rebuild_baseline(turn.user)
        baseline = self._baseline.value(turn.user)
        try:
            sample = build_sample(turn, judgement, teacher, reference, baseline, self._learning)
            if sample is not None:
                held_out = is_held_out(turn.session, self._held_out_share)
                sample = replace(sample, held_out=held_out, policy_scope=self._policy_scope)
        except Exception:
            log.exception("event=build_failed turn=%s", turn.id)  # a defect: the judgement is kept, the flow goes on
            self._counts["build_failures"] += 1
            sample = None
        if judgement.score is not None:
            self._baseline.advantage(turn.user, judgement.score)
        return sample

    async def _rebuild_baseline(self, user: str) -> None:
        """From as many of the user's last scores as still count."""
        decay = self._learning.baseline_decay
        limit = math.ceil(math.log(FORGOTTEN) / math.log(decay)) if decay > 0 else 1
        scores = await self._insist(partial(self._journal.recent_scores.remote, user, limit))
        self._baseline.rebuild(user, scores)
        self._rebuilt.add(user)

    def _count(self, judgement: Judgement, sample: Sample | None) -> None:
        self._counts["judged"] += 1
        self._counts["hints"] += bool(judgement.hints)
        if judgement.score is None:
            self._counts["abstained"] += 1
            metric("judge/abstentions_num").inc()
        else:
            decay = self._learning.baseline_decay
            before = judgement.score if self._reward is None else self._reward
            self._reward = decay * before + (1 - decay) * judgement.score
            metric("collector/reward_score").set(self._reward)
        if sample is None:
            self._counts["skipped"] += 1
        else:
            self._counts["samples"] += 1
            metric("collector/samples_num").inc()

    # -- asking others -----------------------------------------------------------------------------------------------

    def _ask_teacher(self, turn: Turn, hint: str) -> Awaitable[Scores]:
        hinted = tuple(self._advised(turn.messages, hint))
        return self._teacher.score_messages.remote(
            hinted, turn.tools, turn.template, turn.capture.completion_ids, self._learning.teacher_top,
            weights=self._teacher_weights, user=turn.user,
        )  # fmt: skip

    async def _reference(self, turn: Turn) -> Scores | None:
        return await self._try_score(turn, "reference", partial(self._ask_reference, turn))

    async def _step_reference(self, turn: Turn) -> Scores | None:
        async with self._slots:
            return await self._reference(turn)

    def _ask_reference(self, turn: Turn) -> Awaitable[Scores]:
        return self._judge.score_ids.remote(turn.capture.prompt_ids, turn.capture.completion_ids, 0, weights="frozen")

    async def _try_score(self, turn: Turn, who: str, ask: Callable[[], Awaitable[Scores]]) -> Scores | None:
        """Complete scores, or None with a count: a teacher's own refusal (too long a prompt) is not repeated."""
        try:
            scores = await self._insist(
                ask, timeout_s=self._judging.timeout_s, final=(RayTaskError, ClawrlError, ValueError)
            )
            require_complete(scores, turn)
        except Exception as error:
            log.warning("event=score_failed who=%s turn=%s error=%s", who, turn.id, type(error).__name__)
            self._counts[f"{who}_failures"] += 1
            metric("collector/score_failures_num").inc()
            return None
        return scores

    async def _insist(
        self,
        ask: Callable[[], Awaitable[_Answer]],
        *,
        timeout_s: float | None = None,
        final: tuple[type[Exception], ...] = (),
    ) -> _Answer:
        """The answer of `ask()`, which is repeated with growing pauses until it succeeds.

        Raises what `ask` raised if that is one of `final`, and TimeoutError, naming the last failure, after
        `timeout_s` (None: never).
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        pause, failure = FIRST_PAUSE_S, "no answer"
        while True:
            try:
                return await _answer(ask(), until)
            except final:
                raise
            except _Late as late:
                raise TimeoutError(f"judge.timeout_s={timeout_s:g} passed: {failure}") from late
            except Exception as error:
                failure = _told(error)
            if until is not None and time.monotonic() + pause >= until:
                raise TimeoutError(f"judge.timeout_s={timeout_s:g} passed: {failure}")
            log.warning("event=call_repeated pause_s=%.2f error=%s", pause, failure.partition(":")[0])
            self._counts["retries"] += 1
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE_S)


def with_corrections(next_state: NextState, feedback: Sequence[Feedback]) -> NextState:
    """What followed, with the words of explicit feedback before it: those of a user."""
    said = tuple({"role": "user", "content": each.text} for each in feedback if each.text)
    return replace(next_state, role="user", messages=(*said, *next_state.messages)) if said else next_state


def with_score(judgement: Judgement, feedback: Sequence[Feedback]) -> Judgement:
    """The latest explicit score stands above the votes, which stay as they were cast."""
    scores = [each.score for each in feedback if each.score is not None]
    return replace(judgement, score=scores[-1]) if scores else judgement


class _Late(Exception):
    """No answer in time."""


async def _answer(pending: Awaitable[_Answer], until: float | None) -> _Answer:
    """Await a Ray reference or a Serve response; a late response is cancelled, which frees its replica."""
    left_s = None if until is None else max(0.0, until - time.monotonic())
    deadline = asyncio.timeout(left_s)
    try:
        async with deadline:
            return await pending
    except TimeoutError as error:
        if not deadline.expired():
            raise
        cancel = getattr(pending, "cancel", None)
        if cancel is not None:
            cancel()
        raise _Late from error


async def _nothing() -> None:
    return None


def _told(error: Exception) -> str:
    """`Kind: first line`, of the failure itself rather than of Ray's wrapping, which adds a traceback."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')[:300]}"


def _report_defect(task: asyncio.Task[None]) -> None:
    """Failures of others are handled where they happen; what ends a task is ours, and nothing may hide it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("event=defect remedy='restart the collector: it takes up what has no judgement'", exc_info=error)
