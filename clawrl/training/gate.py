"""The gate before a version serves anybody: what its weights say of held-out turns, and what that proves. Pure numpy.

Knows log-probabilities of replies that real people judged and that no version was trained on. Ignores models, actors
and who measured. Everything is looked at on the trainer's own weights, so no engine is asked and no chat waits.

    held-out turns ─► behaviour, parent's and candidate's log-probabilities ─► Evidence ─► checks ─► GateDecision

No check knows what style or answer was wanted. They ask: are these numbers, was the step of a sane size, is what was
approved still what the policy would say, is it still preferred to what was refused, does it stop where it stopped, and
did its batch praise what people praised (`agreement`).
A check that has too few turns to say anything is left out, and the reason says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clawrl.config import GateSection
from clawrl.training.agreement import ValuedReply, agreement
from clawrl.training.bootstrap import interval, picks
from clawrl.types import GateCheck, GateDecision

MOST_NATS = 3.0
"""One reply's change counts up to here in the preference: a few replies that became impossible are no majority."""


@dataclass(frozen=True, slots=True, eq=False)
class HeldOutTurn:
    """One judged reply of S tokens and their log-probabilities under the versions compared."""

    token_ids: np.ndarray  # i32[S]
    score: int | None
    lag: int  # steps from the version that sampled it to the candidate
    behaviour: np.ndarray  # f32[S], as sampled
    parent: np.ndarray  # f64[S]
    candidate: np.ndarray  # f64[S]
    reference: np.ndarray | None  # f32[S], version 0
    stops: np.ndarray | None  # f64[S], the candidate's of ending the reply at each place
    ended: bool  # the reply ended by itself, with its last token


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """All that was measured of a candidate."""

    finite: bool
    update: float  # ||w - parent|| / ||parent||
    turns: tuple[HeldOutTurn, ...]
    batch: tuple[ValuedReply, ...] = ()  # the samples trained on that have advantages


def decide(evidence: Evidence, settings: GateSection, version: int, *, seconds: float, at: float) -> GateDecision:
    """The verdict on a candidate: all checks that can be made must pass."""
    checks = tuple(check for check in _checks(evidence, settings) if check is not None)
    failed = [check for check in checks if not check.passed]
    judged = [sum(turn.score == score for turn in evidence.turns) for score in (1, -1)]
    reason = "; ".join(f"{check.name} {check.value:.3g}, {check.bound}" for check in failed)
    if not failed:
        reason = f"{len(checks)} checks passed"
        if min(judged) < settings.min_turns:
            reason += f"; of {len(evidence.turns)} held-out turns {judged[0]} were approved and {judged[1]} refused, "
            reason += f"gate.min_turns={settings.min_turns} of each are needed to compare them"
    return GateDecision(version, "before", not failed, reason, checks, seconds, at)


def _checks(evidence: Evidence, settings: GateSection) -> Iterator[GateCheck | None]:
    yield GateCheck(
        "finite", float(evidence.finite), None, None, "every weight must be a finite number", evidence.finite
    )
    yield _at_most("update", evidence.update, settings.max_update, "of the weights' norm")
    if not evidence.finite or not evidence.turns:
        return
    turns = evidence.turns
    recent = [turn for turn in turns if turn.lag <= settings.recent_versions]
    yield _at_most("kl_parent", kl_parent(turns), settings.max_kl, "nats per token")
    if (value := kl_reference(turns)) is not None:
        yield _at_most("kl_reference", value, settings.max_reference_kl, "nats per token")
    yield approved_loss("approved_loss", turns, _parent, settings.max_approved_loss, settings)
    yield approved_loss("approved_loss_recent", recent, _behaviour, settings.max_approved_loss_recent, settings)
    yield preference("preference", turns, _parent, settings)
    yield preference("preference_recent", recent, _behaviour, settings)
    judged = [ValuedReply(turn.token_ids, turn.score) for turn in turns if turn.score is not None]
    yield agreement(judged, evidence.batch, min_turns=settings.min_turns, confidence=settings.confidence)
    yield stopping(turns, settings)


def approved_loss(
    name: str, turns: Sequence[HeldOutTurn], old: Callable[[HeldOutTurn], np.ndarray], bound: float,
    settings: GateSection,
) -> GateCheck | None:  # fmt: skip
    """How much approved replies lost, as a share of what the old version had left open.

    Σ max(0, 1 - p'/p) / Σ (1 - p) over the tokens of replies judged +1; p old, p' the candidate's. The numerator is
    the total variation between the two as estimated on tokens that p sampled, bounded in [0, 1] per token; dividing by
    the open mass makes a model that is sure of its words and one that is not comparable (a shift of logits by d moves
    log p by (1 - p) d, so the ratio is about half the mean |d|). Fails where the bootstrap interval over turns lies
    beyond `bound` as a whole.
    """
    approved = [turn for turn in turns if turn.score == 1]
    if len(approved) < settings.min_turns:
        return None
    lost = np.array([np.maximum(0, -np.expm1(turn.candidate - old(turn))).sum() for turn in approved])
    left_open = np.array([-np.expm1(np.minimum(old(turn), 0)).sum() for turn in approved])
    tiny = np.finfo(float).tiny
    picked = picks(len(approved))
    low, high = interval(lost[picked].sum(1) / np.maximum(left_open[picked].sum(1), tiny), settings.confidence)
    value = float(lost.sum() / max(left_open.sum(), tiny))
    return GateCheck(name, value, low, high, f"its lower bound at most {bound:g}", low <= bound)


def preference(
    name: str, turns: Sequence[HeldOutTurn], old: Callable[[HeldOutTurn], np.ndarray], settings: GateSection
) -> GateCheck | None:
    """Whether approved replies gained against refused ones, in nats per reply: E[d | +1] - E[d | -1].

    d is the change of a reply's log-probability since `old`, clipped to ±MOST_NATS. Fails where even the upper bound
    of the bootstrap interval is negative: a fall beyond noise.
    """
    changes = np.array([np.clip((turn.candidate - old(turn)).sum(), -MOST_NATS, MOST_NATS) for turn in turns])
    scores = np.array([0 if turn.score is None else turn.score for turn in turns])
    good, bad = changes[scores == 1], changes[scores == -1]
    if min(len(good), len(bad)) < settings.min_turns:
        return None
    resampled = good[picks(len(good))].mean(1) - bad[picks(len(bad), 1)].mean(1)
    low, high = interval(resampled, settings.confidence)
    return GateCheck(name, float(good.mean() - bad.mean()), low, high, "its upper bound not below 0", high >= 0)


def stopping(turns: Sequence[HeldOutTurn], settings: GateSection) -> GateCheck | None:
    """How much longer the candidate's replies will be, from its chance of stopping at every place of real ones.

    Under the version that sampled a reply, the chances of stopping at its places add up to 1 in the mean over replies
    that end by themselves (each stop minus its chance is a martingale difference). If the candidate's add up to s, it
    stops s times as readily, and its replies are about 1 / s times as long.
    """
    known = [turn for turn in turns if turn.stops is not None]
    ended = sum(turn.ended for turn in known)
    if ended < settings.min_turns:
        return None
    chances = sum(float(np.exp(turn.stops).sum()) for turn in known if turn.stops is not None)
    ratio = ended / max(chances, np.finfo(float).tiny)
    most = settings.max_length_ratio
    return GateCheck(
        "length_ratio", ratio, None, None, f"between {1 / most:.2g} and {most:g}", 1 / most <= ratio <= most
    )


def kl_parent(turns: Sequence[HeldOutTurn]) -> float:
    """Schulman's k3 estimate of KL(parent || candidate) per token: mean of e^d - 1 - d, d = log p' - log p.

    The tokens were sampled by the parent or by versions near it, so a single one may have risen by a factor of a
    thousand; rises count up to 1 nat.
    """
    change = np.minimum(np.concatenate([turn.candidate - turn.parent for turn in turns]), 1.0)
    return float((np.expm1(change) - change).mean())


def kl_reference(turns: Sequence[HeldOutTurn]) -> float | None:
    """KL(candidate || version 0) per token, as the mean of log p' - log p_0 on tokens that the policy sampled."""
    referred = [turn.candidate - turn.reference for turn in turns if turn.reference is not None]
    return float(np.concatenate(referred).mean()) if referred else None


def _at_most(name: str, value: float, bound: float, unit: str) -> GateCheck:
    return GateCheck(name, value, None, None, f"at most {bound:g} {unit}", bool(value <= bound))  # NaN is not


def _parent(turn: HeldOutTurn) -> np.ndarray:
    return turn.parent


def _behaviour(turn: HeldOutTurn) -> np.ndarray:
    return turn.behaviour
