"""Folders of terminal tasks: what Harbor's and Terminal-Bench 1's say, and what a broken one is told."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from clawrl.errors import EnvError
from clawrl.rollout.env import split_of
from envs.terminal.env import TerminalEnv
from envs.terminal.folders import read_task, read_tasks
from envs.terminal.task import MIB, pass_rate_of

TOML = """version = "1.0"
[metadata]
difficulty = "hard"
[verifier]
timeout_sec = 90
env = { SEED = "7" }
[environment]
cpus = 2
memory_mb = 512
storage = "3G"
env = { MODE = "fast" }
[solution.env]
TOKEN = "a b"
"""
YAML = "instruction: |\n  Do it.\ndifficulty: easy\nparser_name: pytest\nmax_test_timeout_sec: 30\n"


HARBOR = {
    "task.toml": TOML,
    "instruction.md": "\nDo it.\n",
    "environment/Dockerfile": "FROM base\nworkdir /first\nWORKDIR '/app/my dir'\n",
    "tests/test.sh": "exit 0",
    "tests/deep/case.py": "x = 1",
    "solution/solve.sh": "true",
}
TERMINAL_BENCH = {
    "task.yaml": YAML,
    "Dockerfile": "FROM base\nWORKDIR /app\n",
    "run-tests.sh": "pytest -rA",
    "tests/test_outputs.py": "def test(): pass",
    "solution.sh": "echo done",
}


def made(folder: Path, *layers: Mapping[str, str | None]) -> Path:
    """The folder with the files of all layers; None leaves one out."""
    for name, text in {name: text for layer in layers for name, text in layer.items()}.items():
        if text is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
    return folder


def test_a_harbor_folder_is_read_as_it_is(tmp_path):
    task = read_task(made(tmp_path / "greet", HARBOR))
    assert (task.id, task.instruction, task.difficulty) == ("greet", "Do it.", "hard")
    assert (task.image, task.workdir) == (str(tmp_path / "greet/environment"), "/app/my dir")
    assert (task.cpus, task.memory, task.disk, task.verify_timeout) == (2.0, 512 * MIB, 3072 * MIB, 90.0)
    assert (task.env, task.verify_env) == ({"MODE": "fast"}, {"SEED": "7"})
    assert set(task.tests) == {"tests/test.sh", "tests/deep/case.py"}
    assert (task.verify, task.verdict) == ("bash /tests/test.sh", "reward")
    assert task.solution == "export TOKEN='a b'\nbash /solution/solve.sh"
    assert set(task.solution_files) == {"solution/solve.sh"}


def test_a_harbor_folder_may_name_an_image_and_have_no_solution(tmp_path):
    named = {"task.toml": '[environment]\ndocker_image = "host"\n'}
    task = read_task(made(tmp_path, HARBOR, named, {"environment/Dockerfile": None, "solution/solve.sh": None}))
    assert (task.image, task.workdir, task.solution) == ("host", None, "")


def test_a_terminal_bench_folder_becomes_the_same_kind_of_task(tmp_path):
    task = read_task(made(tmp_path / "old", TERMINAL_BENCH))
    assert (task.id, task.instruction, task.difficulty) == ("old", "Do it.", "easy")
    assert (task.image, task.workdir) == (str(tmp_path / "old"), "/app")
    assert set(task.tests) == {"tests/run-tests.sh", "tests/test_outputs.py"}
    assert (task.verify, task.verdict, task.verify_timeout) == ("bash /tests/run-tests.sh", "pytest", 30.0)
    assert (task.verify_env, task.solution) == ({"TEST_DIR": "/tests"}, "echo done")


def test_a_terminal_bench_solution_may_be_a_list_of_commands(tmp_path):
    listed = {"solution.sh": None, "solution.yaml": "- command: cd /app\n- command: touch a\n"}
    assert read_task(made(tmp_path, TERMINAL_BENCH, listed)).solution == "cd /app\ntouch a"


@pytest.mark.parametrize(
    ("layout", "changed", "expected"),
    [
        (HARBOR, {"task.toml": "[verifier"}, r"task\.toml is not valid TOML"),
        (HARBOR, {"instruction.md": None}, r"lacks instruction\.md"),
        (HARBOR, {"environment/Dockerfile": None}, r"environment lacks Dockerfile"),
        (HARBOR, {"tests/test.sh": None}, r"tests lacks test\.sh"),
        (HARBOR, {"task.toml": "environment = 3"}, r"task\.toml: environment = 3 must be a table"),
        (HARBOR, {"task.toml": "[environment]\ncpus = 0"}, r"task\.toml: cpus = 0 must be a number above 0"),
        (HARBOR, {"task.toml": '[environment]\nmemory = "much"'}, r"memory = 'much' is no size; write \"2G\""),
        (HARBOR, {"task.toml": "[verifier]\nenv = 5"}, r"task\.toml: env = 5 must be a table of strings"),
        (HARBOR, {"task.toml": '[verifier.env]\nK = "${KEY}"'}, r"K = '\$\{KEY\}' asks for .* write its value instead"),
        (HARBOR, {"task.toml": '[[steps]]\nname = "a"'}, r"steps are not supported; make each step a task"),
        (HARBOR, {"task.toml": "[environment]\ngpus = 1"}, r"gpus = 1 is not supported"),
        (HARBOR, {"environment/docker-compose.yaml": "a: 1"}, r"docker-compose\.yaml is not supported"),
        (TERMINAL_BENCH, {"task.yaml": "a: [b"}, r"task\.yaml is not valid YAML"),
        (TERMINAL_BENCH, {"task.yaml": "difficulty: easy"}, r"task\.yaml has no instruction; add `instruction: \|`"),
        (TERMINAL_BENCH, {"task.yaml": f"{YAML}parser_name: swebench"}, r"parser_name 'swebench' is not supported"),
        (
            TERMINAL_BENCH,
            {"task.yaml": f"{YAML}max_test_timeout_sec: soon"},
            r"task\.yaml: max_test_timeout_sec = 'soon'",
        ),
        (TERMINAL_BENCH, {"Dockerfile": None}, r"lacks Dockerfile"),
        (TERMINAL_BENCH, {"run-tests.sh": None}, r"lacks run-tests\.sh"),
        (TERMINAL_BENCH, {"solution.sh": None, "solution.yaml": "a: b"}, r"solution\.yaml must be a list with a `comm"),
        ({}, {"notes.txt": "x"}, r"neither task\.toml \(Harbor\) nor task\.yaml"),
    ],
)
def test_a_broken_folder_is_told_what_and_how(tmp_path, layout, changed, expected):
    with pytest.raises(EnvError, match=expected) as caught:
        read_task(made(tmp_path / "broken", layout, changed))
    assert str(tmp_path / "broken") in str(caught.value)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (made(tmp_path, HARBOR) / "instruction.md").write_bytes(b"\xff\xfe")
    with pytest.raises(EnvError, match=r"instruction\.md is not UTF-8"):
        read_task(tmp_path)


def test_a_folder_of_tasks_is_read_by_name_and_other_folders_are_passed_over(tmp_path):
    made(tmp_path / "b", HARBOR)
    made(tmp_path / "a", TERMINAL_BENCH)
    (tmp_path / "notes").mkdir()
    assert [task.id for task in read_tasks(tmp_path)] == ["a", "b"]
    assert [task.id for task in read_tasks(tmp_path / "a")] == ["a"]
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(EnvError, match="holds no task"):
        read_tasks(tmp_path)
    with pytest.raises(EnvError, match="is no folder"):
        read_tasks(tmp_path / "nowhere")


def test_the_tasks_of_a_folder_are_split_once_for_ever(tmp_path):
    for number in range(12):
        made(tmp_path / f"task-{number}", HARBOR)
    env = TerminalEnv(tmp_path)
    train, held_out = ({env.make_task(n, split).id for n in range(24)} for split in ("train", "held_out"))
    assert train | held_out == {f"task-{number}" for number in range(12)}
    assert not train & held_out


def test_a_folder_without_a_task_in_a_split_names_the_other(tmp_path):
    name = next(f"t{number}" for number in range(99) if split_of(f"t{number}") == "train")
    env = TerminalEnv(made(tmp_path / name, HARBOR))
    with pytest.raises(EnvError, match="none of the 1 tasks is in split held_out; use train"):
        env.make_task(0, "held_out")


@pytest.mark.parametrize(
    ("output", "verdict"),
    [
        ("PASSED tests/a.py::x\nFAILED tests/a.py::y - assert 1 == 2\nERROR b.py\nPASSED c.py::z\n", 0.0),
        ("\x1b[32mPASSED\x1b[0m a.py::x\r\n=== 1 passed in 0.01s ===\n", 1.0),
        ("...F\nFAILED a.py::y - no\n=== 1 failed, 3 passed in 1s ===\n", 0.5),
        ("=== 2 passed in 0.1s ===\n=== 4 failed in 0.1s ===\n", -1.0),
        (
            "PASSED a.py::more\nPASSED a.py::x\n=== short test summary info ===\nPASSED a.py::x\nFAILED a.py::y - no\n"
            "=== 1 failed, 1 passed in 1s ===\n",
            0.0,
        ),
    ],
)
def test_the_share_of_passed_tests_is_read_from_pytests_summary(output, verdict):
    assert pass_rate_of("t", output) == verdict


def test_an_output_without_tests_is_no_verdict():
    with pytest.raises(EnvError, match=r"ran none that pytest reports; run pytest with -rA.*no such file"):
        pass_rate_of("t", "python3: no such file")
