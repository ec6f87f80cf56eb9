"""The gate's checks on replies whose log-probabilities were made by hand."""

from typing import Any

import numpy as np
import pytest

from clawrl.config import GateSection
from clawrl.training.agreement import ValuedReply
from clawrl.training.gate import Evidence, HeldOutTurn, decide, kl_parent, kl_reference

SETTINGS = GateSection(min_turns=4)
NUM = 10
"""Turns of each kind."""


def turn(score: int | None, change: float, *, tokens: int = 2, p: float = 0.5, lag: int = 1, **others) -> HeldOutTurn:
    """A reply whose tokens had probability `p` and moved by `change` nats each."""
    before = np.full(tokens, np.log(p))
    return HeldOutTurn(
        **{
            "token_ids": np.zeros(tokens, np.int32),
            "score": score,
            "lag": lag,
            "behaviour": before,
            "parent": before,
            "candidate": before + change,
            "reference": None,
            "stops": None,
            "ended": True,
        }
        | others
    )


def turns(good: float, bad: float, **others) -> tuple[HeldOutTurn, ...]:
    return (*(turn(1, good, **others) for _ in range(NUM)), *(turn(-1, bad, **others) for _ in range(NUM)))


def decision(*held_out: HeldOutTurn, finite: bool = True, update: float = 0.01, settings: GateSection = SETTINGS):
    return decide(Evidence(finite, update, held_out), settings, 10, seconds=0.5, at=1.0)


def check(name: str, *held_out: HeldOutTurn, **others) -> Any:
    found = [each for each in decision(*held_out, **others).checks if each.name == name]
    return found[0] if found else None


def failed(*held_out: HeldOutTurn, **others) -> set[str]:
    return {each.name for each in decision(*held_out, **others).checks if not each.passed}


class TestDecision:
    def test_a_small_step_the_right_way_passes(self):
        found = decision(*turns(0.01, -0.01))
        assert found.passed
        assert (found.version, found.stage, found.seconds, found.at) == (10, "before", 0.5, 1.0)
        assert {each.name for each in found.checks} == {
            "finite", "update", "kl_parent", "approved_loss", "approved_loss_recent", "preference", "preference_recent"
        }  # fmt: skip

    def test_weights_that_are_not_finite_are_refused_whatever_else(self):
        assert failed(finite=False) == {"finite"}
        assert [each.name for each in decision(*turns(0, 0), finite=False).checks] == ["finite", "update"]

    @pytest.mark.parametrize("update", [0.3, float("nan"), float("inf")])
    def test_a_step_too_far(self, update):
        assert failed(update=update) == {"update"}

    def test_without_enough_turns_nothing_is_compared_and_it_says_so(self):
        found = decision(*turns(-1.0, 1.0)[:NUM], turn(-1, 1.0))
        assert "preference" not in {each.name for each in found.checks}
        few = decision(turn(1, -1.0), turn(-1, 1.0), settings=GateSection(max_kl=1.0))
        assert few.passed
        assert "of 2 held-out turns 1 were approved and 1 refused, gate.min_turns=8" in few.reason

    def test_the_reason_names_what_failed(self):
        reason = decision(*turns(-0.3, -0.3)).reason
        assert "approved_loss 0.518" in reason
        assert "at most 0.07" in reason

    def test_the_same_evidence_gives_the_same_decision(self):
        rng = np.random.default_rng(0)
        mixed = [turn(int(rng.choice([-1, 1])), float(rng.normal(0, 0.02))) for _ in range(40)]
        assert decision(*mixed) == decision(*mixed)


class TestApprovedLoss:
    def test_by_hand(self):
        """p = 0.5 falls to 0.25: half of the tokens' probability is lost, half was open."""
        found = check("approved_loss", *turns(np.log(0.5), 0.0))
        assert found is not None
        assert found.value == pytest.approx(0.5 / 0.5)
        assert (found.low, found.high) == pytest.approx((1.0, 1.0))
        assert not found.passed

    def test_a_rise_costs_nothing(self):
        assert check("approved_loss", *turns(0.5, 0.5)).value == 0

    def test_refused_replies_may_fall_as_they_like(self):
        assert "approved_loss" not in failed(*turns(0.0, -0.5))

    def test_a_sure_model_and_an_unsure_one_are_measured_alike(self):
        """The same small shift d of a logit moves log p by (1 - p) d, so both lose about d."""
        for p in (0.5, 0.9, 0.99):
            found = check("approved_loss", *turns(-(1 - p) * 0.02, 0.0, p=p))
            assert found.value == pytest.approx(0.02, rel=0.02)

    def test_one_ruined_reply_among_many_is_within_noise(self):
        one_bad = [turn(1, -3.0), *(turn(1, 0.0) for _ in range(2 * NUM))]
        found = check("approved_loss", *one_bad)
        assert found.value > SETTINGS.max_approved_loss
        assert found.passed

    def test_small_steps_add_up_against_the_version_that_spoke(self):
        """This step takes little, but since the replies were sampled much is gone."""
        slow = [turn(1, -0.01, behaviour=np.full(2, np.log(0.8))) for _ in range(NUM)]
        assert failed(*slow) == {"approved_loss_recent"}
        long_ago = [turn(1, -0.01, behaviour=np.full(2, np.log(0.8)), lag=20) for _ in range(NUM)]
        assert failed(*long_ago) == set()


class TestPreference:
    def test_by_hand(self):
        """Two tokens of +0.1 against two of -0.05: 0.2 + 0.1 nats per reply."""
        assert check("preference", *turns(0.1, -0.05)).value == pytest.approx(0.3)

    def test_a_fall_beyond_noise_is_refused(self):
        assert "preference" in failed(*turns(-0.02, 0.02))

    def test_a_fall_within_noise_is_not(self):
        rng = np.random.default_rng(1)
        noisy = [turn(score, float(rng.normal(0, 0.05))) for score in (1, -1) for _ in range(NUM)]
        found = check("preference", *noisy)
        assert found.low < 0 < found.high
        assert found.passed

    def test_one_reply_counts_three_nats_at_most(self):
        assert check("preference", *turns(-50.0, 0.0)).value == -3

    def test_both_groups_are_resampled_independently(self):
        """Equally many of each, in the same order: pairs would hide most of the noise."""
        rng = np.random.default_rng(0)
        common = np.sort(rng.normal(0, 1, 40))
        found = check("preference", *(turn(score, 0.1 * each) for score in (1, -1) for each in common))
        assert found.high == pytest.approx(2.33 * 0.2 * common.std() * np.sqrt(2 / 40), rel=0.15)


class TestAgreement:
    def test_a_batch_turned_round_is_refused_though_the_candidate_looks_well(self):
        held_out = [turn(score, 0.01 * score, token_ids=reply(score)) for score in (1, -1) for _ in range(NUM)]
        for sign in (1, -1):
            batch = tuple(ValuedReply(reply(score), 0.7 * sign * score) for score in (1, -1) for _ in range(NUM))
            found = decide(Evidence(True, 0.01, tuple(held_out), batch), SETTINGS, 10, seconds=0.5, at=1.0)
            assert {each.name for each in found.checks if not each.passed} == (set() if sign == 1 else {"agreement"})
            assert [each.value for each in found.checks if each.name == "agreement"] == [pytest.approx(sign)]

    def test_without_scores_nothing_is_compared(self):
        batch = tuple(ValuedReply(reply(1), 1.0) for _ in range(NUM))
        unjudged = tuple(turn(None, 0.0) for _ in range(NUM))
        found = decide(Evidence(True, 0.01, unjudged, batch), SETTINGS, 10, seconds=0.5, at=1.0)
        assert found.passed
        assert "agreement" not in {each.name for each in found.checks}


def reply(score: int) -> np.ndarray:
    """A reply in the words of those that are judged so."""
    return np.array([5, 6, 7] if score > 0 else [5, 8, 9], np.int32)


class TestDivergence:
    def test_from_the_parent(self):
        assert kl_parent([turn(1, 0.0)]) == 0
        assert kl_parent([turn(1, -0.5)]) == pytest.approx(np.exp(-0.5) - 1 + 0.5)
        assert kl_parent([turn(1, 20.0)]) == pytest.approx(np.e - 2)

    def test_from_the_reference_where_it_is_known(self):
        known = turn(1, 0.0, reference=np.full(2, np.log(0.25)))
        assert kl_reference([turn(1, 0.0)]) is None
        assert kl_reference([known, turn(1, 0.3)]) == pytest.approx(np.log(2))
        assert failed(known, settings=GateSection(max_reference_kl=0.5)) == {"kl_reference"}


class TestStopping:
    def reply(self, *chances: float) -> HeldOutTurn:
        return turn(1, 0.0, tokens=len(chances), stops=np.log(chances))

    def test_chances_that_add_up_to_one_keep_the_length(self):
        replies = [self.reply(0.25, 0.75)] * NUM
        assert check("length_ratio", *replies).value == pytest.approx(1)

    def test_half_the_chances_double_the_length(self):
        assert check("length_ratio", *[self.reply(0.1, 0.4)] * NUM).value == pytest.approx(2)
        assert failed(*[self.reply(0.01, 0.3)] * NUM) == {"length_ratio"}

    def test_on_samples_of_a_known_process(self):
        """Replies that stop with chance 0.2 at each place, under a candidate that stops with 0.4: half as long."""
        rng = np.random.default_rng(0)
        replies = [self.reply(*[0.4] * int(rng.geometric(0.2))) for _ in range(2000)]
        assert check("length_ratio", *replies).value == pytest.approx(0.5, rel=0.05)
