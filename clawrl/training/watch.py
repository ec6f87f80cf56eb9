"""The watch after promotion: what people say of the versions that serve them, and the way back when it gets worse.

Knows judged turns, in the order of their judgement, and the weight store's way back. Ignores how turns are judged and
how weights are swapped. It is a view: a watch that restarts reads the newest judged turns again. Everyone's policy is
watched by all that it said, and a user's by what it said to them, against what everyone's had before.

    journal.judged_turns ──(long poll)──► FallDetector, bounds on length and repetition ──fall──► store.withdraw

The detector is an e-detector (Shin, Ramdas and Rinaldo, arXiv 2203.03532) in CUSUM form over bets on a bounded mean
(Waudby-Smith and Ramdas, 2023). Against "the mean is at least m", a gambler who stakes λ/(1-m) multiplies her wealth by
1 + λ (m - x)/(1 - m) at each x in [0, 1]: she cannot be expected to win unless the mean fell. Starting over whenever
she is poorer than at the start makes wealth measure the time since the change; the mean run length to a false alarm is
at least the threshold, whenever one looks, for a known m. Here m is estimated from the turns before (minus a
tolerance and the estimate's own error), which is checked by simulation in tests/unit/test_watch.py.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clawrl.config import GateSection
from clawrl.types import GROUP, GateCheck, GateDecision, Judgement, PolicyScope, Turn

log = logging.getLogger(__name__)

STAKES = np.array([0.2, 0.4, 0.8])
"""Shares of the largest stake; the wealth is their mean, so whichever suits the fall wins."""
REFERENCE = 200
"""Turns before a change that the mean is estimated from."""
FEWEST = 40
"""Turns that make a reference."""
PROVEN = 15
"""In-control turns after which a version is not the cause of a fall that comes later."""
NGRAM = 4
_POLL_TURNS, _POLL_S, _RETRY_S = 64, 30.0, 1.0


@dataclass(frozen=True, slots=True)
class Fall:
    """The mean score fell, on [-1, 1]: its value before and since, and the version with which it began."""

    before: float
    since: float
    turns: int  # since the change
    version: int | None  # the first that is not proven; None: the fall came without a change of weights


class FallDetector:
    """Sequential test of a stream of scores in [-1, 1], each with the version that earned it. Pure."""

    def __init__(self, threshold: float, tolerance: float) -> None:
        """`threshold`: least mean number of turns to a false alarm. `tolerance`: fall of the mean that is let pass."""
        self._threshold, self._tolerance = threshold, tolerance / 2  # scores are told on [0, 1] inside
        self._reference: deque[float] = deque(maxlen=REFERENCE)
        self._proven: Counter[int] = Counter()
        self._lowest: float | None = None  # the mean defended, until the reference grows
        self.restart()

    def add(self, score: float, version: int) -> Fall | None:
        """Take in a turn; a Fall if it is one too many. The detector then waits for turns after the way back."""
        value = (score + 1) / 2
        if len(self._reference) < FEWEST:
            self._absorb((value, version))
            return None
        if self._lowest is None:
            self._lowest = self._lowest_mean()
        mean = self._lowest
        self._started[self._wealth <= 1] = len(self._pending)
        self._wealth = np.maximum(self._wealth, 1) * (1 + STAKES * (mean - value) / (1 - mean))
        self._pending.append((value, version))
        if self._wealth.mean() >= self._threshold:
            return self._fall()
        settled = int(self._started.min())
        for turn in self._pending[:settled]:
            self._absorb(turn)
        del self._pending[:settled]
        self._started -= settled
        return None

    def _lowest_mean(self) -> float:
        values = np.array(self._reference)
        error = values.std() / np.sqrt(len(values))
        return float(max(0.02, values.mean() - self._tolerance - error))

    def _fall(self) -> Fall:
        since = self._pending[self._started[self._wealth.argmax()] :]
        unproven = [version for _, version in since if version and self._proven[version] < PROVEN]
        fall = Fall(
            before=2 * float(np.mean(self._reference)) - 1,
            since=2 * float(np.mean([value for value, _ in since])) - 1,
            turns=len(since),
            version=min(unproven, default=None),
        )
        if fall.version is None:
            self._reference.clear()  # people speak otherwise now, of the same weights: a new mean
        self.restart()
        return fall

    def _absorb(self, turn: tuple[float, int]) -> None:
        self._reference.append(turn[0])
        self._lowest = None
        self._proven[turn[1]] += 1

    def restart(self) -> None:
        """Forget the turns since the last that were surely as good as those before."""
        self._wealth = np.ones(len(STAKES))
        self._started = np.zeros(len(STAKES), int)  # of each stake: where in `pending` its wealth last began
        self._pending: list[tuple[float, int]] = []


@dataclass(frozen=True, slots=True)
class _Reply:
    tokens: int
    repetition: float
    version: int


class ReplyBounds:
    """Mean length and repetition of the last replies against those before them. Pure."""

    def __init__(self, max_ratio: float, max_repetition: float) -> None:
        self._max_ratio, self._max_repetition = max_ratio, max_repetition
        self._before: deque[_Reply] = deque(maxlen=REFERENCE)
        self._last: deque[_Reply] = deque(maxlen=FEWEST)

    def add(self, num_tokens: int, repetition: float, version: int) -> tuple[GateCheck, int | None] | None:
        """Take in a reply; a failed check, and the version to blame (None: all had replied well before)."""
        if len(self._last) == FEWEST:
            self._before.append(self._last[0])
        self._last.append(_Reply(num_tokens, repetition, version))
        if len(self._before) < FEWEST:
            return None
        failed = next((check for check in (self._length(), self._repetition()) if not check.passed), None)
        if failed is None:
            return None
        proven = Counter(reply.version for reply in self._before)
        blamed = min(
            (each.version for each in self._last if each.version and proven[each.version] < PROVEN), default=None
        )
        self.restart()
        if blamed is None:
            self._before.clear()
        return failed, blamed

    def restart(self) -> None:
        """Forget the last replies."""
        self._last.clear()

    def _length(self) -> GateCheck:
        before = max(1.0, float(np.mean([reply.tokens for reply in self._before])))
        ratio, most = float(np.mean([reply.tokens for reply in self._last])) / before, self._max_ratio
        bound = f"between {1 / most:.2g} and {most:g}"
        return GateCheck("length_ratio", ratio, None, None, bound, 1 / most <= ratio <= most)

    def _repetition(self) -> GateCheck:
        limit = float(np.mean([reply.repetition for reply in self._before])) + self._max_repetition
        value = float(np.mean([reply.repetition for reply in self._last]))
        return GateCheck("repetition", value, None, None, f"at most {limit:.2f}", value <= limit)


def repetition(token_ids: np.ndarray) -> float:
    """Share of a reply's n-grams that it has said before; 0 for replies too short to repeat themselves."""
    if len(token_ids) < 2 * NGRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(token_ids, NGRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)


class Detectors:
    """What watches one policy."""

    def __init__(self, settings: GateSection) -> None:
        self._settings = settings
        self._falls = FallDetector(settings.false_alarm_turns, settings.tolerance)
        self._corrections = FallDetector(settings.false_alarm_turns, settings.tolerance)
        self._bounds = ReplyBounds(settings.max_length_ratio, settings.max_repetition)

    def restart(self) -> None:
        """Forget what was said of a version that is gone."""
        for detector in (self._falls, self._corrections, self._bounds):
            detector.restart()

    def decided(self, turn: Turn, judgement: Judgement, version: int, spoke: int) -> GateDecision | None:
        """Take in a turn of the version that `spoke`; a decision if it is one too many.

        `version` is who may be blamed: the same, or 0, which never is.
        """
        if judgement.score is not None:
            streams: tuple[tuple[Literal["reward", "corrections"], FallDetector, float], ...] = (
                ("reward", self._falls, float(judgement.score)),
                ("corrections", self._corrections, -1.0 if judgement.score == -1 else 1.0),
            )
            for kind, detector, score in streams:
                fall = detector.add(score, version)
                if fall is not None:
                    return fall_decision(kind, fall, spoke, self._settings)
        ids = turn.capture.completion_ids
        bounded = self._bounds.add(len(ids), repetition(ids), version)
        if bounded is None:
            return None
        check, blamed = bounded
        return decision(
            f"{check.name} of the last {FEWEST} replies {check.value:.2f}, {check.bound}", check, blamed, spoke
        )


class Watch:
    """Async actor. `journal` and `store` are handles. It starts by itself and asks again whatever fails."""

    def __init__(self, settings: GateSection, journal: Any, store: Any, policy_scope: PolicyScope = "group") -> None:
        self._settings, self._journal, self._store = settings, journal, store
        self._personal = policy_scope != "group"
        self._detectors: dict[str, Detectors] = {}  # by scope
        self._turns = 0
        self._undelivered: deque[tuple[str, GateDecision]] = deque()
        self._following = asyncio.create_task(self._follow()) if settings.enabled else None

    async def stats(self) -> dict[str, int]:
        return {"turns": self._turns}

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()

    async def _follow(self) -> None:
        after: int | None = None  # the last turn taken; every turn is taken once, whatever fails
        while True:
            try:
                await self._deliver()
                if after is None:
                    found = await self._journal.recent_judged_turns.remote(2 * REFERENCE)
                else:
                    found = await self._journal.judged_turns.remote(after, _POLL_TURNS, _POLL_S)
                standing = await self._store.standing.remote() if found else {}
                after = after or 0
                for seq, turn, judgement in found:
                    after = max(after, seq)
                    version = max((span.version for span in turn.capture.versions), default=0)
                    state, scope = standing.get(version, (None, GROUP))
                    if state != "rejected":
                        self._take_in(turn, judgement, version, scope)
                        standing = await self._store.standing.remote() if await self._deliver() else standing
            except Exception as error:
                log.warning("event=watch_waits error=%s retry_s=%g", type(error).__name__, _RETRY_S)
                await asyncio.sleep(_RETRY_S)

    async def _deliver(self) -> bool:
        """Tell the store what was decided, which is kept until it has heard; false if there is nothing to tell."""
        if not self._undelivered:
            return False
        while self._undelivered:
            scope, decided = self._undelivered[0]
            await self._store.withdraw.remote(decided)
            self._undelivered.popleft()
            for each in self._detectors if scope == GROUP else (scope,):  # users' policies come from everyone's
                self._detectors[each].restart()
        return True

    def _take_in(self, turn: Turn, judgement: Judgement, version: int, scope: str) -> None:
        """A turn tells of the policy that spoke. For a user's own, everyone's is what was before, and blameless."""
        self._turns += 1
        watched = {scope: version}
        if self._personal:
            watched.setdefault(turn.user, 0)
        for each, blamed in watched.items():
            if each not in self._detectors:
                self._detectors[each] = Detectors(self._settings)
            if (decided := self._detectors[each].decided(turn, judgement, blamed, version)) is not None:
                self._undelivered.append((each, decided))


def fall_decision(
    kind: Literal["reward", "corrections"], fall: Fall, newest: int, settings: GateSection
) -> GateDecision:
    """A fall in words and as a record; corrections are told as a share."""
    before, since = fall.before, fall.since
    what = "mean score"
    if kind == "corrections":
        before, since, what = (1 - before) / 2, (1 - since) / 2, "share of corrections"
    bound = f"not worse than {before:.2f} by more than {settings.tolerance:g}, beyond chance"
    reason = f"{what} went from {before:.2f} to {since:.2f} over {fall.turns} turns"
    return decision(reason, GateCheck(kind, since, None, None, bound, False), fall.version, newest)


def decision(reason: str, check: GateCheck, blamed: int | None, newest: int) -> GateDecision:
    """The record of a failed check. Without a version to blame it passes: nothing is taken back."""
    if blamed is None:
        reason += f"; version {newest} had served well before, so the weights are not the cause and stay"
        return GateDecision(newest, "after", True, reason, (check,), 0.0, time.time())
    return GateDecision(blamed, "after", False, f"{reason}, since version {blamed}", (check,), 0.0, time.time())
