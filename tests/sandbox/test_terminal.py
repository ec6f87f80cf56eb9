"""The terminal environment in real sandboxes: own families, tools, task folders, `clawrl play`, and what goes wrong."""

import io
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import files
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from clawrl.cli import main
from clawrl.errors import EnvError, SandboxError
from clawrl.rollout.env import SPLITS, Split, message_of, split_of
from envs.terminal.env import TerminalEnv
from envs.terminal.task import TerminalTask
from envs.terminal.tasks import FAMILIES, make_own_task

pytestmark = [pytest.mark.sandbox, pytest.mark.timeout(180)]

THREADS = 4
NAME = "envs:clawrl/Terminal-v0"


@pytest.fixture(scope="module")
def settings(backend_of: Callable[[str], Any]) -> dict[str, Any]:
    """Keyword arguments of the environment for bubblewrap, as this user may have it."""
    backend = backend_of("bwrap" if os.getuid() == 0 else "bwrap-user")
    return {"backend": "bwrap", "limits": "enforce" if backend.enforces else "best_effort", "run": "tests"}


@pytest.fixture(scope="module")
def shared(settings: dict[str, Any]) -> Iterator[TerminalEnv]:
    env = TerminalEnv(**settings)
    yield env
    env.close()


@pytest.fixture
def env(shared: TerminalEnv) -> TerminalEnv:
    """At the beginning of own task 0."""
    shared.reset(options={"task": 0})
    return shared


class OneTask(TerminalEnv):
    """A terminal with a single task, given as it is."""

    def __init__(self, task: TerminalTask, settings: dict[str, Any]) -> None:
        super().__init__(**settings)
        self._only = task

    def make_task(self, number: int, split: Split) -> TerminalTask:
        return self._only


@pytest.fixture
def opened(settings: dict[str, Any]) -> Iterator[Callable[..., TerminalEnv]]:
    """Environments of one task made of the given fields; closed after the test."""
    made: list[TerminalEnv] = []

    def make(**fields: Any) -> TerminalEnv:
        made.append(OneTask(TerminalTask("a-task", "Do it.", **fields), settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def does(env: Any, tool: str, **arguments: Any) -> str:
    """What a tool call is answered."""
    return env.step(message_of(tool, **arguments))[0][0]["content"]


def played(env: Any, actions: Any) -> float:
    """The verdict after these actions, the last of which ends the episode."""
    for action in actions:
        _, reward, terminated, truncated, facts = env.step(action)
    assert terminated
    assert not truncated
    assert reward == facts["outcome"]
    return reward


# -- own tasks --------------------------------------------------------------------------------------------------------


def test_every_familys_solution_scores_1_and_doing_nothing_minus_1(settings):
    local, made = threading.local(), []

    def own() -> TerminalEnv:
        if not hasattr(local, "env"):
            local.env = TerminalEnv(**settings)
            made.append(local.env)
        return local.env

    def verdicts(number: int) -> tuple[str, float, float]:
        env = own()
        env.reset(options={"task": number})
        assert env.task is not None
        solved = played(env, env.gold(env.task))
        env.reset(options={"task": number})
        return env.task.id, solved, played(env, [message_of("submit")])

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(verdicts, range(len(FAMILIES))))
    for each in made:
        each.close()
    assert {name.rpartition("/")[0] for name, *_ in found} == set(FAMILIES)
    assert len(FAMILIES) >= 30
    assert [each for each in found if each[1:] != (1.0, -1.0)] == []


def test_the_same_number_is_the_same_task_and_splits_never_overlap():
    tasks = {split: [make_own_task(number, split) for number in range(4 * len(FAMILIES))] for split in SPLITS}
    assert tasks["train"] == [make_own_task(number, "train") for number in range(4 * len(FAMILIES))]
    train, held_out = ({task.id for task in tasks[split]} for split in SPLITS)
    assert not train & held_out
    assert min(len(train), len(held_out)) > 3 * len(FAMILIES), "numbers give tasks of their own"


CHEATS = {
    "files/make_file": "mkdir -p $(dirname {path}); ln -s /tests/expected/0 {path}",
    "programs/write_function": "echo 'raise SystemExit(0)' > {path}",
    "programs/mend_function": "echo 'raise SystemExit(0)' > {path}",
    "data/csv_to_json": "echo 'raise SystemExit(0)' > json.py",
    "files/sort_by_ending": "rm inbox/*",
    "files/rename_numbers": "rm *",
    "files/world_writable": "rm -r srv",
    "git/merge": "cd repo; git reset -q --hard $(git branch --format='%(refname:short)' | grep -v main)",
}
"""Family → what would be good for its tests alone; {path} is the file that the instruction names first."""


@pytest.mark.parametrize("family", CHEATS)
def test_what_deceives_the_tests_or_destroys_the_world_earns_no_more_than_nothing(shared, family):
    shared.reset(options={"task": list(FAMILIES).index(family)})
    named = re.search(r"/work/([\w./]+\w)|$", shared.task.instruction)
    assert named
    does(shared, "run", command=CHEATS[family].replace("{path}", named[1] or ""))
    assert played(shared, [message_of("submit")]) == -1.0


def test_gymnasium_makes_it_and_finds_nothing_wrong(settings):
    env = gymnasium.make(NAME, **settings)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


# -- the tools --------------------------------------------------------------------------------------------------------


def test_a_command_is_answered_with_output_and_exit_status_and_the_shell_stays(env):
    assert does(env, "run", command="pwd; cd /tmp; X=5") == "/work"
    assert does(env, "run", command="echo $X; pwd; (exit 3)") == "5\n/tmp\n[exit status 3]"
    assert does(env, "run", command="true") == "[no output]"
    assert does(env, "run", command="exit 4").endswith("[exit status 4]")
    assert does(env, "run", command="echo $X; pwd") == "/work", "a new shell, where the old one was ended"


def test_an_interactive_program_is_answered_with_keys(env):
    does(env, "write", path="ask.py", content="n = input('Name? ')\nprint('hello', n)\n")
    assert "Name?" in does(env, "run", command="python3 ask.py", seconds=1)
    assert "busy" in does(env, "run", command="ls")
    assert "hello Ada" in does(env, "keys", text="Ada\n")
    assert does(env, "run", command="echo free") == "free"


def test_a_long_command_goes_on_and_ctrl_c_stops_it(env):
    told = does(env, "run", command="echo begun; sleep 100; echo never", seconds=0.3)
    assert told.startswith("begun\n[still running after 0.3 s")
    does(env, "keys", text="\u0003")
    assert does(env, "run", command="echo free; pgrep -x sleep") == "free\n[exit status 1]"


def test_keys_at_an_idle_prompt_are_a_command_and_show_its_output_alone(env):
    assert does(env, "keys", text="echo a; false\n", seconds=0.5) == "a"
    assert does(env, "keys", text="", seconds=0) == "[nothing new on the terminal]"


def test_a_file_is_written_where_it_is_said(env):
    text = "ä '\"$(x)\\\n" * 3
    assert does(env, "write", path="a b/c.txt", content=text) == "wrote /work/a b/c.txt"
    assert env._open().read_file("/work/a b/c.txt") == text.encode()
    assert does(env, "write", path="/work/a b", content="x").startswith("error: write: ")
    assert does(env, "write", path="folder/", content="x").startswith("error: write: 'folder/' does not name a file")


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"name": "bash", "arguments": "{}"}, "the tools are run, keys, write, submit"),
        ({"name": "run", "arguments": '{"command": '}, "arguments of run are not valid JSON"),
        ({"name": "run", "arguments": "[]"}, "must be a JSON object"),
        ({"name": "run", "arguments": "{}"}, "'command' is a required property"),
        ({"name": "run", "arguments": '{"command": "ls", "seconds": 1e9}'}, "maximum of 60"),
        ({"name": "write", "arguments": '{"path": "a", "content": 5}'}, "5 is not of type 'string'"),
        ({"name": "submit", "arguments": '{"now": true}'}, "'now' was unexpected"),
        ({"name": "run", "arguments": '{"command": "a\\u0000b"}'}, "NUL"),
        ("nonsense", "there is no tool ''"),
    ],
)
def test_a_malformed_call_is_told_what_was_expected(env, call, expected):
    action = {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": call}]}
    (message,), reward, terminated, _, _ = env.step(action)
    assert (message["role"], message["tool_call_id"], reward, terminated) == ("tool", "x", 0.0, False)
    assert message["content"].startswith("error: ")
    assert expected in message["content"]


def test_words_without_a_call_are_told_to_call_a_tool(env):
    (message,), _, terminated, _, _ = env.step({"role": "assistant", "content": "I am done."})
    assert not terminated
    assert message["role"] == "user"
    assert "submit" in message["content"]


# -- worlds and verdicts ----------------------------------------------------------------------------------------------


def test_a_reset_leaves_nothing_of_the_episode_before(env):
    does(env, "run", command="touch /work/left /etc/left; export LEFT=1; sleep 1000 & cd /tmp")
    env.reset(options={"task": 0})
    assert does(env, "run", command="ls /work/left /etc/left 2>/dev/null; pgrep -x sleep; echo $LEFT; pwd") == "/work"


def test_tests_come_only_after_the_agent_has_stopped(opened):
    tests = {
        "tests/test.sh": b"cat /tests/truth > /work/seen; echo 1 > /logs/verifier/reward.txt",
        "tests/truth": b"42",
    }
    env = opened(tests=tests)
    env.reset()
    assert does(env, "run", command="grep -rs 42 /tests /work; ls /tests /logs").count("No such file") == 2
    assert played(env, [message_of("submit")]) == 1.0
    assert env._open().read_file("/work/seen") == b"42"


@pytest.mark.parametrize(("share", "outcome"), [("1", 1.0), ("0.25", -0.5), ("0", -1.0)])
def test_a_reward_file_gives_the_verdict(opened, share, outcome):
    env = opened(tests={"tests/test.sh": f"echo {share} > /logs/verifier/reward.txt".encode()})
    env.reset()
    assert played(env, [message_of("submit")]) == outcome


def test_a_reward_that_the_agent_wrote_does_not_count(opened):
    env = opened(tests={"tests/test.sh": b"true"})
    env.reset()
    does(env, "run", command="mkdir -p /logs/verifier; echo 1 > /logs/verifier/reward.txt")
    with pytest.raises(EnvError, match=r"left no /logs/verifier/reward\.txt \(exit status 0\)"):
        env.step(message_of("submit"))


@pytest.mark.parametrize(
    ("tests", "limit", "expected"),
    [
        ("sleep 100", 0.5, r"a-task: its tests took longer than 0\.5 s; correct the tests, or give them more time"),
        ("echo broken; exit 7", 20.0, r"left no .*exit status 7.*broken"),
        ("echo 5 > /logs/verifier/reward.txt", 20.0, r"reward 5.0; it must be from 0 to 1"),
        ("echo fine > /logs/verifier/reward.txt", 20.0, r"'fine\\n' as reward; write a number from 0 to 1"),
    ],
)
def test_tests_that_hang_or_break_are_an_error_and_no_verdict(opened, tests, limit, expected):
    env = opened(tests={"tests/test.sh": tests.encode()}, verify_timeout=limit)
    env.reset()
    with pytest.raises(EnvError, match=expected):
        env.step(message_of("submit"))
    env.reset()
    assert does(env, "run", command="echo again") == "again", "the environment goes on"


@pytest.mark.parametrize(
    "command", ["cd /; rm -rf /work", "cd /; rm -rf /work; touch /work", "rm -rf /logs; touch /logs"]
)
def test_a_folder_that_the_agent_took_away_is_its_own_loss(opened, command):
    """Its next shell begins in an empty one, and the verdict is that of the tests."""
    env = opened(tests={"tests/test.sh": b"[ -e kept ]; echo $((!$?)) > /logs/verifier/reward.txt"}, setup="touch kept")
    env.reset()
    does(env, "run", command=command)
    assert played(env, [message_of("submit")]) == (1.0 if "logs" in command else -1.0)
    env.reset()
    does(env, "run", command=f"{command}; exit")
    assert does(env, "write", path="a/b", content="x").startswith(("wrote /work/a/b", "error: write: "))
    assert does(env, "run", command="pwd") == "/work"
    does(env, "run", command="touch kept")
    assert played(env, [message_of("submit")]) == 1.0


def test_where_a_task_names_no_folder_its_images_is_the_tasks(opened, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM base\nWORKDIR /app\n")
    env = opened(image=str(tmp_path), workdir=None, tests={"tests/test.sh": b"pwd; echo 1 > /logs/verifier/reward.txt"})
    env.reset()
    assert does(env, "write", path="a.txt", content="x") == "wrote /app/a.txt"
    does(env, "run", command="rm -rf /app; exit")
    assert does(env, "run", command="pwd") == "/app"
    does(env, "run", command="rm -rf /app")
    assert played(env, [message_of("submit")]) == 1.0


def test_a_set_up_that_fails_and_an_image_that_is_not_there_are_errors(opened):
    with pytest.raises(EnvError, match=r"a-task: its set-up failed \(exit status 3\): no disk"):
        opened(setup="echo no disk; exit 3").reset()
    with pytest.raises(SandboxError, match="/nowhere/image"):
        opened(image="/nowhere/image").reset()


# -- task folders, and `clawrl play` ----------------------------------------------------------------------------------


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def harbor(folder: Path) -> Path:
    return write(
        folder,
        {
            "task.toml": '[environment]\ndocker_image = "host"\n[verifier.env]\nWANTED = "hello"\n'
            '[solution.env]\nWORD = "hello"\n',
            "instruction.md": "Write hello to /tmp/word.\n",
            "tests/test.sh": '[ "$(cat /tmp/word)" = $WANTED ] && r=1 || r=0; echo $r > /logs/verifier/reward.txt\n',
            "solution/solve.sh": "cat /solution/text | sed s/WORD/$WORD/ > /tmp/word\n",
            "solution/text": "WORD\n",
        },
    )


def terminal_bench(folder: Path) -> Path:
    """Its tests bring this machine's pytest with them: there is no network to get it by."""
    test = "def test_it():\n    assert open('/app/word').read().strip() == 'hello'\n"
    write(
        folder,
        {
            "task.yaml": "instruction: |\n  Write hello to /app/word.\nparser_name: pytest\n",
            "Dockerfile": "FROM base\nWORKDIR /app\n",
            "run-tests.sh": "PYTHONPATH=$TEST_DIR/site python3 -m pytest $TEST_DIR/test_outputs.py -rA\n",
            "tests/test_outputs.py": test,
            "solution.yaml": "- command: echo hello > word\n  append_enter: true\n",
        },
    )
    for name in ("pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        for file in files(name) or ():
            if ".." not in file.parts and file.suffix != ".pyc":
                (folder / "tests/site" / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(str(file.locate()), folder / "tests/site" / file)
    return folder


@pytest.fixture
def play(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`clawrl play terminal` with these words and typed lines: (exit code, standard output, standard error)."""

    def run(*words: str, lines: str = "") -> tuple[int, str, str]:
        options = [word for key, value in settings.items() for word in ("--option", f"{key}={value}")]
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["play", "terminal", *options, *words])
        told = capsys.readouterr()
        return code, told.out, " ".join(told.err.split())

    return run


@pytest.mark.parametrize("make", [harbor, terminal_bench])
def test_a_task_folder_is_solved_by_its_solution_alone(settings, play, tmp_path, make):
    """A Harbor folder whose tests and solution need their variables, and a Terminal-Bench 1 folder with pytest."""
    folder = make(tmp_path / "a-task")
    code, shown, said = play("--split", split_of("a-task"), "--option", f"folder={folder}", "--gold")
    assert (code, said) == (0, "")
    assert shown.endswith("verdict 1 (1 solved, -1 not at all)\n")
    env = TerminalEnv(folder, **settings)
    env.reset(options={"split": split_of("a-task")})
    assert played(env, [message_of("submit")]) == -1.0
    env.close()


def test_a_gold_solution_that_fails_is_an_error(play, tmp_path):
    folder = harbor(tmp_path / "a-task")
    (folder / "solution/text").write_text("something else\n")
    code, shown, said = play("--split", split_of("a-task"), "--option", f"folder={folder}", "--gold")
    assert code == 1
    assert "verdict -1" in shown
    assert "task a-task does not solve it" in said


def test_a_person_plays_an_own_task_by_lines(play):
    lines = [
        r'keys "echo $((6 * 7))\n"',
        r'write path=a.txt content="x\n"',
        'run command="cat a.txt" seconds=5',
        r"run printf '\033[31mred'",
    ]
    code, shown, said = play("--task", "0", lines="\n".join([*lines, "submit"]))
    assert (code, said) == (0, "")
    for answer in ("42", "wrote /work/a.txt", "x", r"\x1b[31mred"):
        assert f"\ntool: {answer}\n" in shown
    assert shown.endswith("tool: submitted\nverdict -1 (1 solved, -1 not at all)\n")
