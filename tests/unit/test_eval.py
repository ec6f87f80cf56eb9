"""`jobs.eval`: arms and what names a run, intervals and tables, runs that were made and those that fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clawrl.config import Config, load_config
from clawrl.errors import ConfigError
from clawrl.rollout.pool import order_of
from jobs.eval import __main__ as program
from jobs.eval import findings, personal, picture, pools, runs, series
from jobs.eval.plan import Arm, Plan, arms_of, digest, folder_name

DRILL = Path(__file__).parents[2] / "configs" / "drill.toml"
ARMS = (Arm("outcome", ("learning.process_weight=0",)), Arm("process", ("learning.process_weight=0.3",)))
PLAN = Plan(ARMS, (0, 1, 2), ("drill",), ("--versions=20",), "20 versions", "Tasks solved", "groups")


def arms(text: str, config: Config) -> tuple[Arm, ...]:
    return arms_of(text, lambda word: pools.overrides_of(word, config), "outcome, process")


def report(before: float | None, after: float | None, outcomes: tuple[float | None, ...] = (-1, 0, 1, 1)) -> dict:
    groups = [{"outcome": outcome, "samples": 0 if outcome == 1 else 8, "version": 0} for outcome in outcomes]
    part = {"pool": "drill", "before": {"solved": before}, "after": {"solved": after}, "groups": groups}
    return {"pools": [part], "versions": 9, "seconds": 60.0}


REPORTS = {
    **{("outcome", seed): report(0.4, 0.4 + gain) for seed, gain in enumerate((0.1, 0.1, 0.1))},
    **{("process", seed): report(0.4, 0.4 + gain) for seed, gain in enumerate((0.2, 0.1, 0.3))},
}


# -- arms --------------------------------------------------------------------------------------------------------------


def test_arms_are_overrides_under_a_name():
    config = load_config(DRILL)
    assert arms("outcome,process", config) == ARMS
    assert arms("process:0.5, slow=trainer.learning_rate:1e-4", config) == (
        Arm("process-0.5", ("learning.process_weight=0.5",)),
        Arm("slow", ("trainer.learning_rate=1e-4",)),
    )
    weighty = load_config(DRILL, ["learning.process_weight=0.7"])
    assert arms("process", weighty) == (Arm("process", ("learning.process_weight=0.7",)),)


@pytest.mark.parametrize(
    "text", ["", "best", "outcome:1", "process:0", "process:nan", "process:x", "a=b", "=a:1", "a=:1"]
)
def test_a_word_that_is_no_arm_is_refused(text):
    with pytest.raises(ConfigError, match="--arms"):
        arms(text, load_config(DRILL))


def test_two_arms_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="same name"):
        arms("outcome,outcome", load_config(DRILL))


def test_a_seed_reaches_the_trainer_and_every_pool():
    mixed = DRILL.with_name("mixed.toml")
    config = load_config(mixed, pools.seeded(load_config(mixed), 5))
    assert config.trainer.seed == 5
    assert {pool.seed for pool in config.pools} == {5}

    def drawn(**changes: Any) -> list[int]:
        order = order_of(config.pools[0].model_copy(update=changes))
        return [order.getrandbits(31) for _ in range(4)]

    assert drawn() == drawn()
    assert drawn() != drawn(seed=6)
    assert drawn(seed=None) != drawn(seed=None)


def test_a_run_is_known_by_what_its_result_depends_on():
    def named(*words: str, plan: Plan = PLAN, commit: str = "abc") -> str:
        return digest(load_config(DRILL, words), plan, commit)

    assert named() == named("run_root=elsewhere", "gateway.port=31000", "run=latest")
    others = {
        named(),
        named("trainer.learning_rate=1e-4"),
        named("pools.0.group_size=4"),
        named(commit="abd"),
        named(plan=replace(PLAN, budget=("--versions=21",))),
    }
    assert len(others) == 5
    assert named(plan=replace(PLAN, arms=ARMS[:1], seeds=(0,))) == named(), "more arms and seeds may follow"
    assert folder_name(ARMS[1], 0) != folder_name(Arm("process", ("learning.process_weight=0.5",)), 0)


# -- intervals, findings, table ----------------------------------------------------------------------------------------


def test_an_interval_over_seeds_holds_the_mean_and_keeps_within_what_was_seen():
    found = findings.mean_interval([0.1, 0.2, 0.6])
    assert found is not None
    assert 0.1 <= found.low < 0.3 < found.high <= 0.6
    assert findings.mean_interval([0.2]) is None, "one run says nothing of others"
    many = findings.mean_interval(np.random.default_rng(1).normal(0, 1, 400).tolist())
    assert many is not None
    assert many.high - many.low == pytest.approx(2 * 1.96 / 20, rel=0.15), "as normal theory has it for many"


def test_gains_are_means_over_seeds_and_differences_are_paired():
    arms = findings.arm_findings(REPORTS, PLAN)
    assert [(each.arm, round(each.gain, 6)) for each in arms] == [("outcome", 0.1), ("process", 0.2)]
    assert arms[0].gain_interval is not None
    assert arms[1].gain_interval is not None
    assert arms[0].gain_interval.high - arms[0].gain_interval.low == pytest.approx(0)
    assert arms[1].gain_interval.low < 0.2 < arms[1].gain_interval.high
    (pair,) = findings.pair_findings(arms, PLAN)
    assert [seed for seed, _ in pair.differences] == [0, 1, 2]
    assert [each for _, each in pair.differences] == pytest.approx([0.1, 0.0, 0.2])
    assert pair.mean == pytest.approx(0.1)


def test_a_run_that_is_missing_or_was_not_measured_is_left_out_of_its_pair():
    partial: dict[tuple[str, int], Any] = {**REPORTS, ("process", 1): report(None, 0.5)}
    del partial["outcome", 0]
    arms = findings.arm_findings(partial, PLAN)
    assert [len(each.results) for each in arms] == [2, 2]
    (pair,) = findings.pair_findings(arms, PLAN)
    assert [seed for seed, _ in pair.differences] == [2]
    assert "| drill | process − outcome | – | – | +0.200 | +0.200 |" in findings.table(arms, [pair], PLAN, {})


def test_the_table_tells_arms_pairs_runs_and_circumstances():
    arms = findings.arm_findings(REPORTS, PLAN)
    text = findings.table(arms, findings.pair_findings(arms, PLAN), PLAN, {"commit": "abc", "load": {"a": [1.0, 2.5]}})
    assert "| drill | outcome | 3 | 0.400 [0.400, 0.400] | 0.500 [0.500, 0.500] | +0.100 [+0.100, +0.100] |" in text
    assert "| drill | process − outcome | +0.100 | +0.000 | +0.200 | +0.100 [" in text
    assert "| drill | process | 2 | 0.400 | 0.700 | 9 | 4 | 2 | 60 |" in text
    assert "- commit: abc" in text
    assert "- load: a: 1.0, 2.5" in text


def test_a_curve_goes_as_far_as_the_shortest_run():
    reports = {
        ("a", 0): report(0, 0, (-1,) * 8),
        ("a", 1): report(0, 0, (*(1,) * 8, None, 1, 1)),
        ("b", 0): report(0, 0, ()),
    }
    curve = findings.curve_of(reports, "drill", "a")
    assert curve is not None
    assert len(curve.groups) == len(curve.mean) == 7  # windows of two in eight
    assert (curve.groups[0], curve.groups[-1]) == (1.5, 7.5)
    assert set(curve.mean) == {0.5}
    assert (set(curve.low), set(curve.high)) == ({0.0}, {1.0})
    assert findings.curve_of(reports, "drill", "b") is None


def test_the_picture_is_drawn_with_what_there_is(tmp_path):
    reports = {**REPORTS, ("process", 2): report(None, None, ())}
    picture.draw(reports, findings.arm_findings(reports, PLAN), [], PLAN, "title", tmp_path / "new" / "x.png")
    assert (tmp_path / "new" / "x.png").stat().st_size > 5000


def figured(seed: int, arm: str, kl: float | None) -> dict:
    return {**report(0.4, 0.5), "figures": {"KL": kl}, "courses": {"KL": [0.0, None, 0.1, kl or 0.2]}}


def test_figures_have_means_intervals_pairs_courses_and_a_panel(tmp_path):
    plan = replace(PLAN, figures=("KL",))
    values = {("outcome", 0): 0.1, ("outcome", 1): 0.2, ("process", 0): 0.4, ("process", 1): None}
    reports = {(arm, seed): figured(seed, arm, value) for (arm, seed), value in values.items()}
    found = findings.figure_findings(reports, plan)
    assert [(each.arm, each.values) for each in found] == [
        ("outcome", ((0, 0.1), (1, 0.2))), ("process", ((0, 0.4),)),
    ]  # fmt: skip
    assert found[0].mean == pytest.approx(0.15)
    assert found[0].interval is not None
    (pair,) = findings.figure_pairs(found, plan)
    assert (pair.pool, pair.arm, pair.against, pair.mean) == ("KL", "process", "outcome", pytest.approx(0.3))
    text = findings.table(findings.arm_findings(reports, plan), [], plan, {}, found)
    assert "| KL | process | 1 | 0.400 | – | – | 0.400 |" in text
    assert "| KL | process − outcome | +0.300 | – | – | +0.300 |" in text
    curve = findings.figure_curve(reports, "KL", "outcome")
    assert curve is not None
    assert curve.mean == pytest.approx((0.0, 0.1, 0.15)), "what was not measured on the way is left out"
    assert findings.curves(reports, plan)["KL"].keys() == {"outcome", "process"}
    picture.draw(reports, findings.arm_findings(reports, plan), found, plan, "title", tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


# -- making the runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made(monkeypatch, tmp_path) -> list[str]:
    """The names of the runs that were made, by a maker that fails for seed 1 of process as long as it is told to."""
    names: list[str] = []

    def make_run(folder: Path, job: str, arguments: list[str], say: Any, codes: Any) -> dict:
        assert (job, codes) == ("jobs.train", (0,))
        names.append(folder.name.split("-")[0] + folder.name[-1])
        if names[-1] == "process1" and not (tmp_path / "mended").exists():
            raise runs.RunFailed("exit code 1: out of memory")
        assert "trainer.seed=" + folder.name[-1] in arguments
        result = {"report": report(0.4, 0.5), "run": "r", "at": "now", "seconds": 1.0, "load": [0.5, 1.5]}
        folder.mkdir(parents=True)
        (folder / runs.RESULT).write_text(json.dumps(result))
        return result

    monkeypatch.setattr(series, "make_run", make_run)
    monkeypatch.setattr(series, "commit", lambda: "abc")
    return names


def evaluate(tmp_path: Path, *words: str) -> int:
    out = ["--out", str(tmp_path / "found"), "--json", str(tmp_path / "x.json")]
    return program.main(["pools", "--config", str(DRILL), "--seeds", "2", *out, *words, f"run_root={tmp_path}"])


def test_a_run_that_failed_loses_only_itself_and_is_made_again(made, tmp_path, capsys):
    assert evaluate(tmp_path) == 1
    assert made == ["outcome0", "process0", "outcome1", "process1"]
    told = json.loads((tmp_path / "x.json").read_text())
    assert told["failed"] == {"process seed 1": "exit code 1: out of memory"}
    assert [(run["arm"], run["seed"]) for run in told["runs"]] == [("outcome", 0), ("process", 0), ("outcome", 1)]

    made.clear()
    assert evaluate(tmp_path, "--made") == 0
    assert made == []
    assert len(json.loads((tmp_path / "x.json").read_text())["runs"]) == 3
    (tmp_path / "mended").touch()
    assert evaluate(tmp_path) == 0
    assert made == ["process1"]
    assert evaluate(tmp_path, "--seeds", "3") == 0
    assert made == ["process1", "outcome2", "process2"]
    assert evaluate(tmp_path, "trainer.learning_rate=1e-4") == 0, "another config is made anew"
    assert len(made) == 7
    text = (tmp_path / "found.md").read_text()
    assert "python -m jobs.eval pools --config" in text
    assert "- commit: abc" in text
    assert json.loads((tmp_path / "found.json").read_text())["load"]["process seed 1"] == [0.5, 1.5]
    assert (tmp_path / "found.png").stat().st_size > 5000
    assert "process seed 1: drill 0.40 → 0.50" in capsys.readouterr().err


def test_runs_made_elsewhere_are_added_to(made, tmp_path, monkeypatch):
    (tmp_path / "mended").touch()
    assert evaluate(tmp_path) == 0
    monkeypatch.setattr(series, "commit", lambda: "def")
    (tmp_path / "found.json").rename(tmp_path / "one.json")
    assert evaluate(tmp_path, "--seeds", "3", "--with", str(tmp_path / "one.json")) == 0
    assert made[4:] == ["outcome2", "process2"]
    told = json.loads((tmp_path / "found.json").read_text())
    assert told["commit"] == {
        "abc": ["outcome 0", "process 0", "outcome 1", "process 1"],
        "def": ["outcome 2", "process 2"],
    }
    assert [run["found"]["versions"] for run in told["runs"]] == [9] * 6
    assert "abc: outcome 0, process 0" in (tmp_path / "found.md").read_text()


@pytest.mark.parametrize("text", ["", "{}", '{"runs": [{"arm": "outcome"}]}'])
def test_findings_that_hold_no_runs_are_refused(tmp_path, capsys, text):
    (tmp_path / "one.json").write_text(text)
    assert evaluate(tmp_path, "--with", str(tmp_path / "one.json")) == 2
    assert "one.json holds no findings with what each run found" in capsys.readouterr().err


@pytest.mark.parametrize("each", [{"CPU": 9}, {"GPU": 1}, {"CPU": 4, "cpu": 1}])
def test_more_than_any_machine_has_is_refused(each):
    nodes = [{"CPU": 8.0, "memory": 1e9}, {"CPU": 4.0}]
    with pytest.raises(ConfigError, match=r"no machine of the cluster has so much \(the largest: CPU=8, GPU=0\)"):
        runs._require_room(nodes, each)
    runs._require_room(nodes, {"CPU": 8})


def test_half_a_result_is_none(tmp_path):
    assert runs.result_of(tmp_path) is None
    (tmp_path / runs.RESULT).write_text('{"report": {"po')
    assert runs.result_of(tmp_path) is None


def test_a_run_that_does_not_start_says_why(tmp_path):
    said: list[str] = []
    with pytest.raises(runs.RunFailed, match=r"exit code 2: clawrl: --tasks 0: give at least 1"):
        runs.make_run(tmp_path, "jobs.train", ["--config", str(DRILL), "--tasks", "0"], said.append)
    assert "give at least 1" in said[-1]
    assert "give at least 1" in (tmp_path / "log.txt").read_text()
    assert runs.result_of(tmp_path) is None


@pytest.mark.parametrize("words", [["pools", "--seeds", "0"], ["pools", "--arms", "best"], ["pools", "a.b=c"]])
def test_wrong_use_is_told_before_anything_starts(words, capsys):
    assert program.main([*words, "--config", str(DRILL)]) == 2
    assert capsys.readouterr().err.startswith("eval: ")


# -- people ------------------------------------------------------------------------------------------------------------


def demonstration(people: dict[str, int | None], score: float = 0.8, versions: int = 2) -> dict[str, Any]:
    """A report of jobs.demo: who took part, and after how many of 50 sessions they were satisfied."""
    sides = {"score": (0.2, score), "correct": (0.7, 0.65), "sound": (0.6, 0.6), "good": (0.1, 0.5)}
    sides |= {"unrelated": (0.9, 0.8), "reply_tokens": (30.0, 24.0)}
    ends = {f"{field}_{at}": both[at == "after"] for field, both in sides.items() for at in ("before", "after")}
    rows = [
        {"samples": 32 * at, "score": at / 2 or None, "correct": 1.0, "sound": 0.5, "good": None, "kl": 0.01 * at,
         "characters": 60.0}
        for at in range(versions)
    ]  # fmt: skip
    rows_of_people = [
        {"persona": persona, "score_before": 0.2, "score_after": score, "sessions": 50,
         "sessions_until_liked": sessions, "sessions_until_good": None}
        for persona, sessions in people.items()
    ]  # fmt: skip
    first = [(at > 30, True, False) for at in range(50)]
    made = {
        "first_replies": first,
        "per_version": rows,
        "people": rows_of_people,
        "versions": versions,
        "seconds": 60.0,
        "reference_kl": 0.3,
    }
    return {**ends, **made}


def test_a_demonstration_is_measured_as_pools_are():
    read = personal.measured(demonstration({"student": 9}))
    plan = replace(PLAN, measures=tuple(personal.MEASURES), arms=(Arm("rl", ()), Arm("hybrid", ())))
    found = findings.arm_findings({("rl", 0): read, ("rl", 1): read}, plan)
    assert [round(each.gain, 6) for each in found] == [0.6, -0.05, 0.0, 0.4, -0.1]
    assert [group["outcome"] for group in read["pools"][0]["groups"]] == [None, 0.0]
    assert list(read["figures"].values()) == [
        pytest.approx(19 / 50), 9, 50, 24.0, -6.0, 0.3
    ], "one who never came so far counts with all"  # fmt: skip
    assert read["courses"][personal.LIKED_OF_ALL] == [0.0, 0.45, 1.0]
    assert read["courses"]["KL from the reference, nats per token"] == [0.0, 0.01]


def test_people_apart_are_reported_together_once_all_have_come_to_an_end():
    (arm,) = arms = (Arm("hybrid", ("learning.method=hybrid",)),)
    assert [(each.name, each.overrides[-1]) for each in personal.alone(arms)] == [
        (f"hybrid-{person}", f"chat.persona={person}") for person in ("student", "assistant", "teacher")
    ]
    takes = {"student": (8, 0.9, 3), "assistant": (20, 0.6, 2), "teacher": (None, 0.3, 2)}
    reports = {
        (f"{arm.name}-{person}", seed): personal.measured(demonstration({person: sessions}, score, versions))
        for person, (sessions, score, versions) in takes.items()
        for seed in (0, 1)
    }
    del reports["hybrid-teacher", 1]
    whole = personal.together(reports, arms)
    assert list(whole) == [("hybrid", 0)]
    read = whole["hybrid", 0]
    after = {part["pool"]: part["after"]["solved"] for part in read["pools"]}
    assert after["liked"] == pytest.approx(0.6)
    assert after["liked by the assistant"] == 0.6
    assert list(read["figures"].values())[1] == pytest.approx((8 + 20 + 50) / 3)
    assert read["courses"][personal.LIKED_OF_ALL] == [0.0, 0.45, 1.0]
    assert [group["outcome"] for group in read["pools"][0]["groups"]] == [None, 0.0, 1.0]
    assert [group["samples"] for group in read["pools"][0]["groups"]] == [0, 96, 64]


@pytest.mark.parametrize(("users", "runs_made"), [("separate", 3), ("joint", 1)])
def test_users_apart_or_joint_come_out_as_one_arm(tmp_path, monkeypatch, users, runs_made):
    made: list[list[str]] = []

    def make_run(folder: Path, job: str, arguments: list[str], say: Any, codes: Any) -> dict:
        made.append(arguments)
        persona = arguments[-2].removeprefix("chat.persona=")
        people = [persona] if users == "separate" else ["student", "assistant", "teacher"]
        told = demonstration(dict.fromkeys(people, 9))
        return {"report": told, "run": "r", "at": "now", "seconds": 1.0, "load": [0.5, 1.5]}

    monkeypatch.setattr(series, "make_run", make_run)
    monkeypatch.setattr(series, "commit", lambda: "abc")
    out = ["--out", str(tmp_path / "found"), f"run_root={tmp_path}"]
    assert program.main(["personal", "--arms", "memory", "--seeds", "1", "--users", users, *out]) == 0
    assert len(made) == runs_made
    assert all(personal.UNTRAINED in arguments for arguments in made)
    assert ("chat.persona=all" in made[0]) == (users == "joint")
    text = (tmp_path / "found.md").read_text()
    assert "| liked by the teacher | memory | 1 | 0.200 | 0.800 | +0.600 |" in text
    assert "| sessions until 3 in a row are liked (never: all) | memory | 1 | 9.000 | 9.000 |" in text
    assert json.loads((tmp_path / "found.json").read_text())["curves"]["right"].keys() == {"memory"}


def test_arms_of_people_are_objectives_that_the_config_knows():
    for overrides in personal.ARMS.values():
        load_config(None, overrides)
    assert program.main(["personal", "--arms", "best"]) == 2


@pytest.mark.parametrize(("code", "fine"), [(0, True), (1, True), (2, False)])
def test_a_demonstration_that_did_not_learn_is_a_result(tmp_path, monkeypatch, code, fine):
    (tmp_path / "fake_job.py").write_text(
        "import pathlib, sys\n"
        "folder = pathlib.Path(sys.argv[-1].partition('=')[2]) / 'latest'\n"
        "folder.mkdir()\n"
        "(folder / 'report.json').write_text('{}')\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if fine:
        assert runs.make_run(tmp_path / "run", "fake_job", [str(code)], print, (0, 1))["report"] == {}
    else:
        with pytest.raises(runs.RunFailed, match="exit code 2"):
            runs.make_run(tmp_path / "run", "fake_job", [str(code)], print, (0, 1))
