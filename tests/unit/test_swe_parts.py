"""The software-engineering environment without a sandbox: what does not count, task folders, verdicts, mining."""

import ast
import json
import shutil
from pathlib import Path

import pytest

from clawrl.errors import EnvError
from clawrl.rollout.env import SPLITS, split_of
from envs.swe.building import patches
from envs.swe.env import OWN_TASKS
from envs.swe.grading import Report, report_of, spec_of, statuses
from envs.swe.mine import NoTask, told
from envs.swe.mutations import bugs, chosen
from envs.swe.patches import is_configuration, is_test, not_counting
from envs.swe.task import files_of, read_task, read_tasks

NAME = "tally-lost-points"

TESTS = [
    "tests/test_a.py", "pkg/tests/data/x.json", "test_a.py", "a_test.go", "src/a.test.ts", "lib/a_spec.rb",
    "conftest.py", "src/conftest.py", "e2e/flow.js", "pkg/testing/tools.py",
]  # fmt: skip
CONFIGURATION = [
    "pyproject.toml", "setup.cfg", "tox.ini", "sub/pytest.ini", "jest.config.js", "pytest.py", "src/_pytest/python.py",
    "sitecustomize.py", "a/b.pth", "lib/usercustomize.py",
]  # fmt: skip
SOURCES = [
    "pkg/latest.py", "contest.py", "pkg/attestation/core.py", "src/pkg/pytest.py", "docs/index.md", "tally/tables.py",
    "protest/a.py", "inspector.py", "pkg/specs.py",
]  # fmt: skip


def test_tests_and_configuration_are_told_by_their_names():
    assert [name for name in TESTS if not is_test(name)] == []
    assert [name for name in CONFIGURATION if not is_configuration(name)] == []
    assert [name for name in SOURCES if is_test(name) or is_configuration(name)] == []


def test_what_the_solution_changes_counts_and_what_the_tests_change_does_not():
    changed = ["a.py", "django/test/client.py", "pyproject.toml", "data/rows.csv", "tests/a.py"]
    assert not_counting(changed, {"django/test/client.py"}, {"data/rows.csv"}) == [
        "pyproject.toml",
        "data/rows.csv",
        "tests/a.py",
    ]


def test_own_tasks_are_in_both_splits():
    tasks = read_tasks(OWN_TASKS)
    assert {split_of(task.id) for task in tasks} == set(SPLITS)
    for task in tasks:
        assert files_of(task.gold_patch).isdisjoint(files_of(task.test_patch))
        assert task.brings_tests


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OWN_TASKS / NAME, tmp_path / "tasks" / NAME))


@pytest.mark.parametrize(
    "name", ["tests.json", "eval.sh", "gold.patch", "test.patch", "problem_statement.md", "Dockerfile"]
)
def test_a_missing_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(EnvError, match=name):
        read_task(folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("task.yaml", "a: [", "not valid YAML"),
        ("task.yaml", "- a", "must be a table"),
        ("task.yaml", "instance_id: other", "not the folder's name"),
        ("task.yaml", "eval_timeout: soon", "number of seconds"),
        ("tests.json", "{", "not valid JSON"),
        ("tests.json", "[]", "FAIL_TO_PASS = None must be a list"),
        ("tests.json", '{"FAIL_TO_PASS": [], "PASS_TO_PASS": []}', "FAIL_TO_PASS is empty"),
        ("tests.json", '{"FAIL_TO_PASS": ["a"], "PASS_TO_PASS": [1]}', "PASS_TO_PASS"),
        ("eval.sh", "pytest", "has no mark"),
        ("gold.patch", "change it", "is no patch"),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(folder: Path, name: str, text: str, said: str):
    (folder / name).write_text(text)
    with pytest.raises(EnvError, match=said) as raised:
        read_task(folder)
    assert str(folder / name) in str(raised.value)


def test_task_repositories_and_single_tasks_are_read(folder: Path):
    (folder.parent / "notes").mkdir()
    assert [task.id for task in read_tasks(folder.parents[1])] == [NAME]
    assert [task.id for task in read_tasks(folder)] == [NAME]
    with pytest.raises(EnvError, match="holds no task"):
        read_tasks(folder / "repo")
    with pytest.raises(EnvError, match="is no folder"):
        read_tasks(folder / "nowhere")


def test_an_image_named_in_the_task_goes_before_the_dockerfile(folder: Path):
    assert read_task(folder).image == str(folder)
    with (folder / "task.yaml").open("a") as file:
        file.write("image: somebody/sweb.eval.x:latest\n")
    assert read_task(folder).image == "somebody/sweb.eval.x:latest"


def _tests(fail: tuple[int, int], kept: tuple[int, int]) -> dict:
    def some(passed: int, failed: int) -> dict:
        return {"success": [f"p{each}" for each in range(passed)], "failure": [f"f{each}" for each in range(failed)]}

    return {"FAIL_TO_PASS": some(*fail), "PASS_TO_PASS": some(*kept)}


@pytest.mark.parametrize(
    ("fail", "kept", "status", "outcome"),
    [
        ((2, 0), (5, 0), "resolved", 1.0),
        ((1, 3), (5, 0), "partial", -0.5),
        ((0, 2), (5, 0), "unresolved", -1.0),
        ((2, 0), (4, 1), "unresolved", -1.0),
        ((1, 1), (0, 5), "unresolved", -1.0),
    ],
)
def test_the_outcome_follows_swebench_three_verdicts(fail, kept, status, outcome):
    report = report_of(_tests(fail, kept))
    assert (report.status, report.outcome) == (status, outcome)
    assert report.fail_to_pass == (fail[0], sum(fail))


def test_without_results_the_outcome_is_the_lowest():
    assert {Report(status).outcome for status in ("no_patch", "bad_patch", "no_report", "timeout")} == {-1.0}


def test_swebench_notes_the_exit_status_and_distrusts_a_log_that_denies_it():
    spec = spec_of(read_task(OWN_TASKS / NAME))
    assert "SWEBENCH_TEST_EXIT_CODE=$?" in spec.eval_script
    log = ">>>>> Start Test Output\nPASSED tests/test_a.py::test_a\n>>>>> End Test Output\n>>>>> Test Exit Code: {}\n"
    assert statuses(spec, log.format(0)) == {"tests/test_a.py::test_a": "PASSED"}
    assert statuses(spec, log.format(1)) == {}


def test_an_unknown_log_parser_is_named(folder: Path):
    text = (folder / "task.yaml").read_text().replace("parse_log_pytest_v2", "parse_log_mine")
    (folder / "task.yaml").write_text(text)
    with pytest.raises(EnvError, match="parse_log_mine"):
        spec_of(read_task(folder))


SOURCE = '''\
def first(rows, most=3):
    """Keep é as it is: offsets count bytes."""
    rows.sort()
    if rows and len(rows) > most:  # é
        return rows[0] + 1
    while rows:
        rows.pop()
    return 0
'''


def test_every_bug_is_one_change_that_python_reads():
    found = list(bugs(SOURCE))
    assert {bug.kind for bug in found} == {"comparison", "operator", "and-or", "condition", "constant", "dropped"}
    for bug in found:
        ast.parse(bug.text)
        assert bug.text != SOURCE
        differing = [
            number
            for number, (old, new) in enumerate(zip(SOURCE.splitlines(), bug.text.splitlines(), strict=True), start=1)
            if old != new
        ]
        assert differing == [bug.line]


def test_bugs_are_drawn_by_their_seed_one_a_line():
    files = {"a.py": SOURCE, "b.py": SOURCE}
    drawn = chosen(files, 6, seed=1)
    assert drawn == chosen(files, 6, seed=1)
    assert len({(name, bug.line) for name, bug in drawn}) == 6
    assert len(chosen(files, 1000, seed=1)) < 1000


def test_a_statement_is_what_the_newer_changelog_adds(tmp_path: Path):
    for name, text in (("old", "# 1.0\nFirst.\n"), ("new", "# 1.1\nFix a crash.\n\n# 1.0\nFirst.\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "CHANGELOG.md").write_text(text)
    statement = told("pkg", "1.1", tmp_path / "old", tmp_path / "new")
    assert "Fix a crash." in statement
    assert "First." not in statement
    with pytest.raises(NoTask, match="no changelog"):
        told("pkg", "1.1", tmp_path / "old", tmp_path / "old")


def test_patches_keep_sources_and_tests_apart_and_leave_the_rest(tmp_path: Path):
    trees = {
        "old": {"a.py": "a = 1\n", "b.py": "", "README": "old", "tests/test_a.py": "", "setup.py": ""},
        "new": {
            "a.py": "a = 2\n",
            "c.py": "c = 1\n",
            "README": "new",
            "tests/test_b.py": "b = 1\n",
            "setup.py": "x = 1\n",
        },
    }
    for tree, files in trees.items():
        for name, text in files.items():
            (tmp_path / tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / tree / name).write_text(text)
    gold, tests = patches(tmp_path / "old", tmp_path / "new")
    assert files_of(gold) == {"a.py", "b.py", "c.py"}
    assert files_of(tests) == {"tests/test_a.py", "tests/test_b.py"}


def test_tests_json_of_own_tasks_is_what_the_harness_reads():
    for task in read_tasks(OWN_TASKS):
        told_tests = json.loads((OWN_TASKS / task.id / "tests.json").read_text())
        assert told_tests["FAIL_TO_PASS"] == spec_of(task).FAIL_TO_PASS
