"""Whether a batch agrees with held-out scores: on replies whose words are known to be liked or not."""

import numpy as np
import pytest

from clawrl.training.agreement import ValuedReply, _features, _guesses, agreement
from clawrl.types import GateCheck

LIKED, DISLIKED, COMMON = range(10, 20), range(20, 30), range(30, 60)


def replies(number: int, seed: int, *, sign: int = 1, share: float = 1.0) -> list[ValuedReply]:
    """Replies of common words and a few that say how they are judged, in a `share` of them; the value is the judgement
    times `sign`."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        liked = i % 2 == 0
        telling = liked if rng.random() < share else rng.random() < 0.5
        words = rng.choice(LIKED if telling else DISLIKED, 3), rng.choice(COMMON, 12)
        made.append(ValuedReply(np.concatenate(words).astype(np.int32), float(sign if liked else -sign)))
    return made


def check(held_out: list[ValuedReply], batch: list[ValuedReply]) -> GateCheck | None:
    return agreement(held_out, batch, min_turns=8, confidence=0.99)


def test_a_batch_that_says_the_same_passes():
    found = check(replies(40, 0), replies(32, 1))
    assert found is not None
    assert found.value > 0.8
    assert found.passed


def test_a_batch_turned_round_fails():
    found = check(replies(40, 0), replies(32, 1, sign=-1))
    right_way = check(replies(40, 0), replies(32, 1))
    assert found is not None
    assert right_way is not None
    assert found.value == pytest.approx(-right_way.value)
    assert found.high is not None
    assert found.high < -0.5
    assert not found.passed


def test_only_the_differences_of_advantages_count():
    """A baseline that is off moves all of them; nobody was contradicted."""
    held_out, batch = replies(40, 0), replies(32, 1)
    moved = [ValuedReply(each.token_ids, 0.3 * each.value - 2) for each in batch]
    found, other = check(held_out, batch), check(held_out, moved)
    assert found is not None
    assert other is not None
    assert other.value == pytest.approx(found.value)


def test_half_turned_round_is_within_noise():
    found = check(replies(40, 0), [*replies(16, 1), *replies(16, 2, sign=-1)])
    assert found is not None
    assert abs(found.value) < 0.4
    assert found.passed


def test_equal_advantages_agree_with_everything():
    found = check(replies(40, 0), [ValuedReply(each.token_ids, 0.5) for each in replies(32, 1)])
    assert found is not None
    assert (found.value, found.low, found.high, found.passed) == (0, 0, 0, True)


def test_where_words_tell_nothing_the_check_is_left_out():
    assert check(replies(40, 0, share=0.0), replies(32, 1, sign=-1)) is None


@pytest.mark.parametrize(("held_out", "batch"), [(14, 32), (40, 6)])
def test_with_few_turns_the_check_is_left_out(held_out, batch):
    assert check(replies(held_out, 0), replies(batch, 1, sign=-1)) is None


def test_honest_noise_is_rarely_refused():
    """Words that tell little: of many honest batches about as many fail as the bound's confidence lets."""
    found = [check(replies(60, seed, share=0.5), replies(32, 1000 + seed)) for seed in range(40)]
    made = [each for each in found if each is not None]
    assert len(made) > 20
    assert all(each.passed for each in made)
    noise = [
        check(replies(60, seed), replies(32, 1000 + seed, share=0.0)) for seed in range(100)
    ]  # fmt: skip
    assert sum(each is not None and not each.passed for each in noise) <= 5


def test_each_guess_is_that_of_a_ridge_regression_without_it():
    """Against the normal equations, solved anew for every reply left out; the centre stays that of all."""
    known = replies(10, 0, share=0.5)
    features = _features([each.token_ids for each in known])
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1)
    values = np.array([each.value for each in known])
    left_out, guesses = _guesses(features, values, features)
    rows, targets = features - features.mean(0), values - values.mean()
    penalty = np.trace(rows @ rows.T) / 10

    def solved(chosen: np.ndarray) -> np.ndarray:
        normal = rows[chosen].T @ rows[chosen] + penalty * np.eye(rows.shape[1])
        return np.linalg.solve(normal, rows[chosen].T @ targets[chosen])

    np.testing.assert_allclose(guesses, rows @ solved(np.arange(10)), atol=1e-9)
    for i in range(10):
        alone = rows[i] @ solved(np.delete(np.arange(10), i))
        assert left_out[i] - values.mean() == pytest.approx(alone, abs=1e-9)
