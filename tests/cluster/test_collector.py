"""The collector between a real journal and scripted models, all of them actors."""

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from handles import answer
from ray.exceptions import RayActorError

from clawrl.algorithms.advantages import topk_distillation
from clawrl.algorithms.hints import with_hint, with_note
from clawrl.algorithms.methods import Evidence, TokenTargets
from clawrl.config import JudgeSection, LearningSection
from clawrl.journal.actor import Journal
from clawrl.rollout.collector import Collector
from clawrl.testing import ScriptedJudge, ScriptedPolicy, next_state
from clawrl.types import Episode, Feedback, NextState, Sample, Turn

pytestmark = pytest.mark.cluster

LEARNING = LearningSection(support=4)
RESTARTS = {"max_restarts": -1}


class House:
    """A journal in a folder, scripted models and a collector over them."""

    def __init__(self, start: Callable[..., Any], folder: Path, **judge: Any) -> None:
        folder.mkdir(exist_ok=True)
        self._start, self.path = start, folder / "journal.sqlite"
        self.journal = start(Journal, f"sqlite:///{self.path}", **RESTARTS)
        self.judge = start(ScriptedJudge, *judge.values(), **RESTARTS)
        answer(self.judge.most_at_once.remote())  # up: tests of timeouts do not measure its start
        self._source = ScriptedPolicy()
        self.turns: list[Turn] = []

    def collect(self, learning: LearningSection = LEARNING, policy: Any = None, **judging: Any) -> Any:
        section = JudgeSection.model_validate({"timeout_s": 20.0, **judging})
        self.collector = self._start(Collector, self.journal, self.judge, policy, section, learning, **RESTARTS)
        return self.collector

    def say(self, script: str, user: str = "ann") -> Turn:
        """A turn, durable, and what followed it."""
        turn = self._source.turn([{"role": "user", "content": f"question {len(self.turns)}"}], 6, user=user)
        self.turns.append(turn)
        answer(self.journal.append.remote(turn, next_state(turn, script)))
        return turn

    def wait(self, num_judgements: int, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while (count := answer(self.journal.counts.remote())["judgements"]) < num_judgements:
            assert time.monotonic() < deadline, f"{count} of {num_judgements} judged after {timeout_s} s"
            time.sleep(0.05)

    def samples(self) -> dict[str, Sample]:
        rows = answer(self.journal.samples_to_train.remote(0, 1000, 0.0))
        return {sample.id: sample for _, sample, _ in rows}

    def judgements(self) -> list[tuple[str, int | None, str | None]]:
        """(turn, score, error) in the order of their commits."""
        with closing(sqlite3.connect(self.path)) as connection:
            return connection.execute("SELECT turn, score, error FROM judgements ORDER BY seq").fetchall()

    def stats(self) -> dict[str, Any]:
        """The collector's, once it has counted what is in the journal."""
        while (stats := answer(self.collector.stats.remote()))["in_flight"]:
            time.sleep(0.02)
        return stats


def rewards(sample: Sample) -> float:
    """The one advantage of a sample's reply tokens."""
    assert sample.advantages is not None
    values = np.unique(sample.advantages[sample.loss_mask])
    assert len(values) == 1
    return float(values[0])


def expected_advantages(scores: list[int | None], decay: float = 0.9) -> list[float]:
    """score - running mean, folded by hand."""
    mean, advantages = 0.0, []
    for score in scores:
        if score is not None:
            advantages.append(score - mean)
            mean = decay * mean + (1 - decay) * score
    return advantages


def test_a_turn_becomes_a_judgement_and_a_sample(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect()
    turn = house.say("-1 hint: be brief; use no list")
    house.wait(1)
    sample = house.samples()[turn.id]
    np.testing.assert_array_equal(sample.token_ids[sample.loss_mask], turn.capture.completion_ids)
    np.testing.assert_array_equal(sample.logprobs[sample.loss_mask], turn.capture.logprobs)
    assert rewards(sample) == -1
    assert sample.distillation is not None
    assert sample.distillation.valid[sample.loss_mask].any()
    # the reference is version 0, which sampled the reply: exactly the behaviour log-probabilities
    assert sample.reference_logprobs is not None
    np.testing.assert_array_equal(sample.reference_logprobs, sample.logprobs)
    stats = house.stats()
    assert (stats["judged"], stats["samples"], stats["hints"], stats["abstained"]) == (1, 1, 1, 0)
    assert stats["reward"] == -1


def test_what_cannot_teach_makes_a_judgement_only(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(LearningSection(baseline="none"))
    for script in ("0", "?", "+1"):
        house.say(script)
    house.wait(3)
    assert set(house.samples()) == {house.turns[2].id}
    assert house.stats()["skipped"] == 2
    counts = answer(house.journal.counts.remote())
    assert (counts["abstentions"], counts["samples"]) == (1, 1)


def moody(evidence: Evidence) -> TokenTargets:
    """A user's method that cannot take a turn that was refused."""
    score = evidence.judgement.score
    if score == -1:
        raise KeyError("refused")
    return TokenTargets(advantages=np.full(len(evidence.turn.capture.completion_ids), 3.0))


def test_a_users_method_that_fails_drops_only_that_turns_sample(actors, tmp_path, caplog):
    house = House(actors, tmp_path)
    house.collect(LearningSection(method="test_collector:moody"))
    for script in ("+1", "-1", "0"):
        house.say(script)
    house.wait(3)
    assert {id: rewards(sample) for id, sample in house.samples().items()} == {
        house.turns[0].id: 3.0,
        house.turns[2].id: 3.0,
    }
    assert house.stats()["build_failures"] == 1
    assert (
        f"learning.method='test_collector:moody' failed on turn {house.turns[1].id}: KeyError: 'refused'" in caplog.text
    )


def test_samples_do_not_depend_on_which_judgement_was_quicker(actors, tmp_path):
    """Early turns are judged slowest; baselines still move in the order in which the next states arrived."""
    scripts = ["+1", "-1 hint: be brief", "+1", "?", "0", "-1", "+1", "-1"]
    waits = [0.6, 0.0, 0.4, 0.1, 0.3, 0.0, 0.2, 0.0]
    slow, quick = House(actors, tmp_path / "slow"), House(actors, tmp_path / "quick")
    for i, (script, wait) in enumerate(zip(scripts, waits, strict=True)):
        word, *rest = script.split(maxsplit=1)
        slow.say(" ".join([word, f"wait:{wait}", *rest]), user=("ann", "bob")[i % 2])
        quick.say(script, user=("ann", "bob")[i % 2])
    for house in (slow, quick):
        house.collect(concurrency=8)
        house.wait(len(scripts))
    assert slow.samples().keys() == quick.samples().keys()
    for id, sample in slow.samples().items():
        np.testing.assert_array_equal(sample.advantages, quick.samples()[id].advantages)
    for first in (0, 1):
        turns, said = slow.turns[first::2], [script.split()[0] for script in scripts[first::2]]
        scores = [None if word == "?" else int(word) for word in said]
        found = [rewards(slow.samples()[turn.id]) for turn in turns if turn.id in slow.samples()]
        np.testing.assert_allclose(found, expected_advantages(scores), rtol=1e-6)
        order = [turn for turn, _, _ in slow.judgements()]
        assert [turn.id for turn in turns] == [id for id in order if id in {turn.id for turn in turns}]


def test_turns_are_judged_side_by_side_up_to_the_concurrency(actors, tmp_path):
    house = House(actors, tmp_path)
    for i in range(8):
        house.say("+1 wait:0.5", user=f"user{i}")
    house.collect(concurrency=4)
    house.wait(8)
    assert answer(house.judge.most_at_once.remote()) == 4


def test_a_late_judgement_abstains_and_holds_up_nobody_else(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(timeout_s=3.0)
    late = house.say("+1 wait:60", user="ann")
    prompt = house.say("+1", user="bob")
    house.wait(1)
    assert house.judgements() == [(prompt.id, 1, None)]
    house.wait(2)
    assert house.judgements()[1][:2] == (late.id, None)
    assert "judge.timeout_s=3" in str(house.judgements()[1][2])
    assert set(house.samples()) == {prompt.id}
    assert house.stats()["abstained"] == 1


@pytest.mark.processes
def test_a_judge_that_dies_and_comes_back_loses_no_turn(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(concurrency=4)
    for _ in range(8):
        house.say("+1 wait:1")
    while not answer(house.judge.most_at_once.remote()):
        time.sleep(0.02)
    ray.kill(house.judge, no_restart=False)
    house.wait(8)
    assert [(turn, score) for turn, score, _ in house.judgements()] == [(turn.id, 1) for turn in house.turns]
    assert len(house.samples()) == 8
    assert house.stats()["retries"] > 0


@pytest.mark.processes
def test_a_judge_that_stays_away_makes_turns_abstain_with_the_reason(actors, tmp_path):
    house = House(actors, tmp_path)
    ray.kill(house.judge, no_restart=True)
    house.collect(timeout_s=1.0)
    house.say("+1")
    house.wait(1)
    [(_, score, error)] = house.judgements()
    assert score is None
    assert "ActorDied" in str(error)
    assert house.stats()["retries"] > 1
    assert house.samples() == {}


@pytest.mark.processes
def test_a_judge_that_raises_is_asked_again_and_then_abstains(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(timeout_s=2.0)
    house.say("no script at all")
    house.say("+1")
    house.wait(2)
    assert [score for _, score, _ in house.judgements()] == [None, 1]
    assert "JudgeError" in str(house.judgements()[0][2])


@pytest.mark.processes
def test_a_teacher_that_refuses_drops_only_its_term(actors, tmp_path):
    """The judge's context holds the reply's prompt, but not with the long hint added."""
    house = House(actors, tmp_path, seed=0, max_model_len=150)
    house.collect()
    turn = house.say(f"-1 hint: be brief; {'be really brief ' * 20}")
    house.wait(1)
    sample = house.samples()[turn.id]
    assert sample.distillation is not None, "the short hint's teacher is there"
    assert house.stats()["teacher_failures"] == 1

    other = house.say(f"-1 hint: {'be really brief ' * 20}")
    house.wait(2)
    sample = house.samples()[other.id]
    assert sample.distillation is None
    assert sample.advantages is not None
    assert sample.reference_logprobs is not None
    stats = house.stats()
    assert (stats["teacher_failures"], stats["reference_failures"], stats["abstained"]) == (2, 0, 0)


def test_the_current_teacher_is_the_policy(actors, tmp_path):
    frozen, current = House(actors, tmp_path / "frozen"), House(actors, tmp_path / "current")
    targets = []
    for house, teacher in ((frozen, "frozen"), (current, "current")):
        policy = actors(ScriptedPolicy, 0, 3)
        house.collect(LearningSection.model_validate({"teacher": teacher, "difference_clip": 100.0}), policy)
        turn = house.say("-1 hint: be brief")
        house.wait(1)
        targets.append(house.samples()[turn.id].distillation)
    assert targets[0] is not None
    assert targets[1] is not None
    assert (targets[0].advantages != targets[1].advantages).any()


def test_only_max_hints_are_scored(actors, tmp_path):
    house = House(actors, tmp_path, seed=0, max_model_len=150)
    house.collect(LearningSection(max_hints=1))
    house.say(f"-1 hint: be brief; {'be really brief ' * 20}")
    house.wait(1)
    assert house.stats()["teacher_failures"] == 0


@pytest.mark.processes
@pytest.mark.parametrize("gently", [True, False], ids=["closed", "killed"])
def test_a_new_collector_goes_on_where_the_old_one_ended(actors, tmp_path, gently):
    """Every turn is judged once, and the baseline goes on from the journal's scores."""
    house = House(actors, tmp_path)
    scores = [1, -1, 1, 1, -1, 1, 1, 1]
    for i, score in enumerate(scores):
        house.say(f"{score} wait:{0.0 if i < 4 else 0.3}")
    first = house.collect(concurrency=2)
    house.wait(4)
    if gently:
        started = time.monotonic()
        answer(first.close.remote())
        assert time.monotonic() - started < 2
    ray.kill(first)
    house.collect()
    house.wait(8)
    assert [turn for turn, _, _ in house.judgements()] == [turn.id for turn in house.turns]
    found = [rewards(house.samples()[turn.id]) for turn in house.turns]
    np.testing.assert_allclose(found, expected_advantages([*scores]), rtol=1e-4)


@pytest.mark.processes
def test_a_restarted_collector_needs_no_word(actors, tmp_path):
    house = House(actors, tmp_path)
    collector = house.collect()
    answer(collector.stats.remote())
    ray.kill(collector, no_restart=False)
    house.say("+1")
    house.wait(1)


@pytest.mark.processes
def test_a_journal_that_dies_and_comes_back_loses_no_judgement(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect()
    for _ in range(4):
        house.say("+1 wait:1")
    while not answer(house.judge.most_at_once.remote()):
        time.sleep(0.02)
    ray.kill(house.journal, no_restart=False)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            house.wait(4)
            break
        except RayActorError:
            time.sleep(0.1)
    assert [turn for turn, _, _ in house.judgements()] == [turn.id for turn in house.turns]
    found = [rewards(house.samples()[turn.id]) for turn in house.turns]
    np.testing.assert_allclose(found, expected_advantages([1] * 4), rtol=1e-6)


def test_many_turns_of_one_user_flow(actors, tmp_path):
    """More turns than the collector holds at once, some quick, some slow: none is lost, none deadlocks."""
    house = House(actors, tmp_path)
    for i in range(40):
        house.say(f"{'+1' if i % 3 else '-1'} wait:{0.05 if i % 7 == 0 else 0.0}", user=("ann", "bob")[i % 5 == 0])
    house.collect(concurrency=2)
    house.wait(40)
    assert len({turn for turn, _, _ in house.judgements()}) == 40
    assert house.stats()["judged"] == 40


def opine(house: House, turn: Turn, score: Any = None, text: str | None = None) -> None:
    said = Feedback(f"{turn.id} {score} {text}", turn.id, turn.user, score, text, time.time())
    answer(house.journal.take_feedback.remote(said))


def test_explicit_feedback_stands_above_the_judge(actors, tmp_path):
    house = House(actors, tmp_path)
    turn = house.say("+1")
    opine(house, turn, -1)
    house.collect(LearningSection(support=4, baseline="none"))
    house.wait(1)
    house.stats()
    assert house.judgements() == [(turn.id, -1, None)]
    assert rewards(house.samples()[turn.id]) == -1.0


def test_a_turn_that_nothing_follows_learns_from_feedback(actors, tmp_path):
    """Thumbs alone make a reward, a correction a hint; without either it stays untrained."""
    house = House(actors, tmp_path)
    source = ScriptedPolicy(seed=3)
    liked, corrected, silent = (source.turn([{"role": "user", "content": str(i)}], 6) for i in range(3))
    answer(house.journal.append.remote(liked, corrected, silent))
    house.collect(LearningSection(support=4, teacher="frozen"), house.judge, feedback_wait_s=0.5)
    opine(house, liked, 1)
    opine(house, corrected, -1, "-1 hint: be brief")
    house.wait(2)
    house.stats()
    assert {(id, score) for id, score, _ in house.judgements()} == {(liked.id, 1), (corrected.id, -1)}
    samples = house.samples()
    assert set(samples) == {liked.id, corrected.id}
    assert samples[liked.id].distillation is None
    assert samples[corrected.id].distillation is not None


def test_late_feedback_teaches_a_turn_that_had_taught_nothing(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(LearningSection(support=4, baseline="none"))
    turn = house.say("?")
    house.wait(1)
    assert house.samples() == {}
    opine(house, turn, 1)
    deadline = time.monotonic() + 120
    while turn.id not in house.samples():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert house.judgements() == [(turn.id, 1, None)]


PROCESS = LearningSection(process_weight=0.5, kl_weight=0)


def play(house: House, group: str, **attempts: tuple[float | None, list[str]]) -> None:
    """A group's attempts, durable: the outcome of each, and what followed each of its steps but the last."""
    source = ScriptedPolicy(seed=len(house.turns))
    for name, (outcome, scripts) in attempts.items():
        session = f"{group}-{name}"
        for index in range(len(scripts) + 1):
            made = source.turn([{"role": "user", "content": f"{session} {index}"}], 6, session=session, index=index)
            turn = replace(made, id=f"{session}/{index}", group=group, source="toolcall")
            house.turns.append(turn)
            followed = [next_state(turn, scripts[index])] if index < len(scripts) else []
            answer(house.journal.append.remote(turn, *followed))
        status = "error" if outcome is None else "done"
        ended = Episode(session, "toolcall", group, "task", len(attempts), status, outcome, (), "", 1.0, 2.0)
        answer(house.journal.append.remote(ended))


def compared(house: House, groups: int, timeout_s: float = 60.0) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    while len(found := answer(house.journal.comparisons.remote())) < groups:
        assert time.monotonic() < deadline, f"{len(found)} of {groups} groups compared after {timeout_s} s"
        time.sleep(0.05)
    return found


def test_the_judge_votes_on_the_steps_of_a_group(actors, tmp_path):
    """By hand, c = 1/2: steps 0 are worth 1.5, 0.5, -1 (it abstained there), steps 1 are 1.5, 1, -1.5."""
    house = House(actors, tmp_path)
    house.collect(PROCESS)
    play(house, "g", a=(1.0, ["+1", "+1"]), b=(1.0, ["-1"]), c=(-1.0, ["?", "-1"]), broken=(None, ["+1"]))
    [comparison] = compared(house, 1)
    assert comparison.outcomes == (1.0, 1.0, -1.0)
    assert comparison.reward == pytest.approx(np.mean([1.5, 1.5, 1.0, 0.5, 1.0, -1.0, -1.5, -1.0]))
    expected = {}
    for step in ({"a/0": 1.5, "b/0": 0.5, "c/0": -1.0}, {"a/1": 1.5, "b/1": 1.0, "c/1": -1.5}, {"a/2": 1, "c/2": -1}):
        values = np.array([*step.values()])
        z = (values - values.mean()) / values.std()
        expected.update({f"g-{turn}": value for turn, value in zip(step, z, strict=True)})
    found = {id: rewards(sample) for id, sample in house.samples().items()}
    assert found == pytest.approx(expected, abs=1e-4)
    assert {(turn, score) for turn, score, _ in house.judgements()} == {
        ("g-a/0", 1), ("g-a/1", 1), ("g-b/0", -1), ("g-c/0", None), ("g-c/1", -1),
    }  # fmt: skip


@pytest.mark.processes
def test_a_restart_asks_for_no_vote_again_and_the_baseline_goes_on(actors, tmp_path):
    """The first group is compared before the restart; of the second, one vote came, and another does not in time."""
    house = House(actors, tmp_path)
    first = house.collect(PROCESS)
    play(house, "first", a=(1.0, ["+1"]), b=(1.0, []))
    compared(house, 1)
    # b is alone at no step: steps 0 are 1.5 and 1, step 1 of a is alone: 1 - 0
    assert rewards(house.samples()["first-a/1"]) == 1.0
    play(house, "second", a=(1.0, ["+1", "+1 wait:30"]), b=(1.0, ["+1"]))
    house.wait(3)
    ray.kill(first)
    house.judge = actors(ScriptedJudge)
    house.collect(PROCESS, timeout_s=1.0)
    compared(house, 2)
    assert [turn for turn, _, _ in house.judgements()].count("second-a/0") == 1
    [error] = [error for turn, _, error in house.judgements() if turn == "second-a/1"]
    assert "judge.timeout_s=1" in str(error)
    # steps 0 are alike; steps 1 too (nobody voted in time on a's); 2 is alone, against 0.1 of the first's mean reward
    samples = house.samples()
    assert {id for id in samples if id.startswith("second")} == {"second-a/2"}
    assert rewards(samples["second-a/2"]) == pytest.approx(1 - 0.1 * np.mean([1.5, 1.0, 1.0]))


@pytest.mark.processes
def test_by_the_outcome_alone_no_judge_is_asked(actors, tmp_path):
    house = House(actors, tmp_path)
    ray.kill(house.judge, no_restart=True)
    house.collect(LearningSection(kl_weight=0))
    play(house, "g", a=(1.0, ["-1"]), b=(-1.0, ["+1"]))
    [comparison] = compared(house, 1)
    assert (comparison.samples, comparison.reward) == (4, None)
    assert house.judgements() == []
    found = {id: round(rewards(sample), 3) for id, sample in house.samples().items()}
    assert found == {"g-a/0": 1.0, "g-a/1": 1.0, "g-b/0": -1.0, "g-b/1": -1.0}


NEVER = 1e12  # seconds: the scripted turns are of 1970
EXPERIENCE = LearningSection(method="opd", support=4, experience=True)


def end(house: House, user: str = "ann") -> Turn:
    """A turn with which its session is over."""
    turn = house._source.turn([{"role": "user", "content": "the last"}], 6, user=user)
    house.turns.append(turn)
    answer(house.journal.append.remote(turn, NextState(turn.id, "user", (), True, 0.0)))
    return turn


def lessons(house: House, number: int, timeout_s: float = 60.0) -> dict[str, tuple[str | None, str | None]]:
    """(text, error) by turn, once there are so many."""
    deadline = time.monotonic() + timeout_s
    while True:
        with closing(sqlite3.connect(house.path)) as connection:
            found = connection.execute("SELECT turn, text, error FROM lessons ORDER BY seq").fetchall()
        if len(found) >= number:
            return {turn: (text, error) for turn, text, error in found}
        assert time.monotonic() < deadline, f"{len(found)} of {number} turns taught after {timeout_s} s"
        time.sleep(0.05)


def test_what_a_session_teaches_is_learnt_by_all_its_turns_when_it_has_ended(actors, tmp_path):
    """Even by those at which nothing was hinted; what a teacher says under the list is what each is drawn to."""
    house = House(actors, tmp_path)
    house.collect(EXPERIENCE, session_idle_s=NEVER)
    for script in ("-1 hint: be brief", "+1", "-1 hint: use no list"):
        house.say(script)
    house.wait(3)
    assert (house.samples(), house.stats()["samples"]) == ({}, 0), "judged at once, learnt when it is over"
    last = end(house)
    taught = lessons(house, 4)
    assert taught == {turn.id: ("be brief; use no list", None) for turn in house.turns}
    samples = house.samples()
    assert list(samples) == [turn.id for turn in house.turns]
    for turn in house.turns:
        sample = samples[turn.id]
        hinted = tuple(with_hint(turn.messages, "be brief; use no list"))
        scores = answer(house.judge.score_messages.remote(hinted, (), {}, turn.capture.completion_ids, 20))
        expected = topk_distillation(
            turn.capture.completion_ids, turn.capture.top_ids, turn.capture.top_logprobs, scores, 1.0
        )
        assert sample.advantages is None
        assert sample.distillation is not None
        np.testing.assert_allclose(sample.distillation.advantages[sample.loss_mask], expected.advantages, rtol=1e-5)
    house.say("-1 hint: be polite")  # it goes on, and ends again
    end(house)
    assert len(lessons(house, 6)) == 6
    assert len(house.samples()) == 6
    assert lessons(house, 6)[last.id][0] == "be brief; use no list", "what was learnt is not learnt again"
    stats = house.stats()
    assert (stats["distilled_sessions"], stats["distilled_samples"], stats["build_failures"]) == (2, 6, 0)


def test_a_list_for_a_big_model_is_a_note_of_the_system_message(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(EXPERIENCE, session_idle_s=NEVER, prompts="full")
    turn = house.say("-1 hint: be brief")
    end(house)
    lessons(house, 2)
    noted = tuple(with_note(turn.messages, "be brief"))
    scores = answer(house.judge.score_messages.remote(noted, (), {}, turn.capture.completion_ids, 20))
    captured = turn.capture
    expected = topk_distillation(captured.completion_ids, captured.top_ids, captured.top_logprobs, scores, 1.0)
    sample = house.samples()[turn.id]
    assert sample.distillation is not None
    np.testing.assert_allclose(sample.distillation.advantages[sample.loss_mask], expected.advantages, rtol=1e-5)


def test_silence_ends_a_session_and_a_judge_that_fails_teaches_nothing(actors, tmp_path):
    house = House(actors, tmp_path)
    house.collect(EXPERIENCE, session_idle_s=0.2, timeout_s=1.0)
    odd = house.say("-1 hint: be \x00 brief \ud83d", user="eve")
    turn, quiet = house.say("-1 hint: fail"), house.say("+1", user="bob")
    taught = lessons(house, 3)
    assert taught[odd.id] == ("be   brief ?", None), "no database stores what was there"
    assert taught[turn.id][0] is None
    assert "the script says so" in str(taught[turn.id][1])
    assert taught[quiet.id] == (None, None)
    assert set(house.samples()) == {odd.id}
    assert house.stats()["distilled_failures"] == 1


@pytest.mark.processes
def test_a_killed_collector_teaches_each_turn_once(actors, tmp_path):
    """Killed while the session waits, and again while its last turn is judged."""
    house = House(actors, tmp_path)
    first = house.collect(EXPERIENCE, session_idle_s=NEVER)
    for script in ("-1 hint: be brief", "+1"):
        house.say(script)
    house.wait(2)
    ray.kill(first)
    second = house.collect(EXPERIENCE, session_idle_s=NEVER, concurrency=1)
    house.say("-1 wait:2 hint: use no list")
    end(house)
    while answer(house.judge.most_at_once.remote()) < 1:
        time.sleep(0.02)
    ray.kill(second)
    house.collect(EXPERIENCE, session_idle_s=NEVER)
    taught = lessons(house, 4)
    assert taught == {turn.id: ("be brief; use no list", None) for turn in house.turns}
    assert [turn for turn, _, _ in house.judgements()] == [turn.id for turn in house.turns]
    assert set(house.samples()) == set(taught)
