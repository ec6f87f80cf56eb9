"""The software-engineering environment in real sandboxes: what agents do to a repository, and what it earns them."""

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from lacking import lacking

from clawrl.errors import EnvError
from clawrl.rollout.agent import Limits
from clawrl.rollout.env import SPLITS, message_of
from envs.sandbox.mapped import missing
from envs.swe.building import Draft, NoTask, build
from envs.swe.env import OWN_TASKS, Place, SweEnv

pytestmark = pytest.mark.sandbox

POINTS, TOTALS = "tally-lost-points", "tally-table-totals"
HALF = "sed -i 's/(merged\\[-1\\]\\[0\\], end)/(merged[-1][0], max(end, merged[-1][1]))/' tally/intervals.py"
"""Mends merge and total, two of the three tests of POINTS."""
OTHER_HALF = "sed -i 's/^    for low, .*/&\\n        if low >= end:\\n            break/' tally/intervals.py"


def make_env(**options: Any) -> SweEnv:
    if why := missing():
        lacking(why)
    return SweEnv(limits="enforce" if os.getuid() == 0 else "best_effort", run="tests", **options)


@pytest.fixture(scope="module")
def env(home: Path) -> Iterator[SweEnv]:
    made = make_env()
    yield made
    made.close()


def begin(env: SweEnv, id: str) -> str:
    """Reset to a task by its name; what the agent reads first."""
    for split in SPLITS:
        for number in range(len(env._tasks)):
            if env.make_task(number, split).id == id:
                messages, _ = env.reset(options={"task": number, "split": split})
                return messages[0]["content"]
    raise AssertionError(f"no task {id}")


def bash(env: SweEnv, command: str) -> str:
    messages, _, terminated, *_ = env.step(message_of("bash", command=command))
    assert not terminated
    return messages[0]["content"]


def submit(env: SweEnv) -> tuple[float, dict[str, Any]]:
    _, reward, terminated, _, info = env.step(message_of("submit"))
    assert terminated
    assert info["outcome"] == reward
    return reward, info


@pytest.mark.parametrize("id", [path.name for path in sorted(OWN_TASKS.iterdir())])
def test_gold_resolves_and_nothing_earns_the_lowest(env: SweEnv, id: str):
    begin(env, id)
    assert env.task is not None
    for action in env.gold(env.task):
        _, reward, terminated, _, info = env.step(action)
    assert (terminated, reward, info["status"]) == (True, 1.0, "resolved")
    begin(env, id)
    reward, info = submit(env)
    assert (reward, info["status"]) == (-1.0, "no_patch")


def test_an_agent_that_reads_tries_and_tests_resolves_an_issue(env: SweEnv):
    assert "an interval that contains the next one is cut short" in begin(env, POINTS)
    assert "(merged[-1][0], end)" in bash(env, "cd tally && cat intervals.py")
    assert bash(env, "python3 -c 'from tally import merge; print(merge([(1, 9), (2, 3)]))'").startswith("Traceback")
    assert bash(env, "cd .. && python3 -c 'from tally import merge; print(merge([(1, 9), (2, 3)]))'") == "[(1, 3)]"
    bash(env, HALF)
    assert bash(env, "python3 -c 'from tally import merge; print(merge([(1, 9), (2, 3)]))'") == "[(1, 9)]"
    bash(env, OTHER_HALF)
    assert "passed" in bash(env, "python3 -m pytest -q")
    assert submit(env)[0] == 1.0


def test_part_of_a_solution_earns_its_part(env: SweEnv):
    begin(env, POINTS)
    bash(env, HALF)
    reward, info = submit(env)
    assert (info["status"], info["fail_to_pass"]) == ("partial", (2, 3))
    assert reward == pytest.approx(1 / 3)


def test_what_breaks_a_test_that_passed_earns_the_lowest(env: SweEnv):
    begin(env, POINTS)
    bash(env, f"{HALF}; {OTHER_HALF}; sed -i 's/return sign \\* sum/return sum/' tally/spans.py")
    reward, info = submit(env)
    assert (reward, info["status"], info["fail_to_pass"]) == (-1.0, "unresolved", (3, 3))
    assert info["pass_to_pass"][0] < info["pass_to_pass"][1]


CHEATS = {
    "conftest.py": "import pytest\n@pytest.hookimpl(hookwrapper=True)\ndef pytest_runtest_makereport(item, call):\n"
    "    made = yield\n    made.get_result().outcome = 'passed'\n",
    "pytest.py": "print('PASSED tests/test_intervals.py::test_total')\n",
    "sitecustomize.py": "import os\n",
    "pytest.ini": "[pytest]\naddopts = --co\n",
    "tests/test_intervals.py": "def test_total(): pass\n",
}


def test_tests_and_their_configuration_do_not_count(env: SweEnv):
    begin(env, POINTS)
    for name, text in CHEATS.items():
        env.sandbox.put({f"testbed/{name}": text.encode()})
    bash(env, "git mv tests/test_spans.py tests/test_gone.py; echo '# counts' >> tally/tables.py")
    reward, info = submit(env)
    assert (reward, info["status"], info["fail_to_pass"]) == (-1.0, "unresolved", (0, 3))
    assert set(info["not_counted"]) == {*CHEATS, "tests/test_spans.py", "tests/test_gone.py"}


def test_a_solution_counts_beside_tests_that_do_not(env: SweEnv):
    begin(env, POINTS)
    bash(
        env,
        f"{HALF}; {OTHER_HALF}; echo 'def test_total(): assert False' > tests/test_intervals.py; rm -r tests/test_s*",
    )
    reward, info = submit(env)
    assert (reward, info["status"]) == (1.0, "resolved")
    assert info["not_counted"] == ("tests/test_intervals.py", "tests/test_spans.py")


def test_committed_and_new_files_count_and_caches_are_left_out(env: SweEnv):
    begin(env, TOTALS)
    assert env.task is not None
    bash(env, env.gold(env.task)[0]["tool_calls"][0]["function"]["arguments"]["command"])
    bash(env, "mv tally/tables.py tally/rendering.py && echo 'from tally.rendering import *' > tally/tables.py")
    bash(env, "git add -A && git commit -qm done; PYTHONDONTWRITEBYTECODE= python3 -m pytest -q; touch .git/index.lock")
    patch = env._submission().decode()
    assert "tally/rendering.py" in patch
    assert "cache" not in patch
    assert submit(env)[0] == 1.0


def test_nothing_of_the_future_is_in_the_agents_sandbox(env: SweEnv):
    begin(env, TOTALS)
    assert bash(env, "git rev-list --all --count; git remote; git stash list") == "1"
    places = "$(find / -mindepth 1 -maxdepth 1 -type d | grep -v -e /proc -e /sys -e /usr -e /dev)"
    assert "tests/test_tables.py" in bash(env, f"grep -rls test_columns {places}")
    assert "test_tables" not in bash(env, f"grep -rls test_totals_of_spans {places}")
    assert "/" not in bash(env, f"find {places} -name '*.patch' -o -name eval.sh -o -name tests.json 2>/dev/null")


def test_a_later_commit_in_the_image_is_gone(home: Path, tmp_path: Path):
    folder = Path(shutil.copytree(OWN_TASKS / TOTALS, tmp_path / TOTALS))
    with (folder / "Dockerfile").open("a") as file:
        file.write(
            "RUN echo later > later.txt && git add . && git -c user.name=a -c user.email=a@b commit -qm later \\\n"
        )
        file.write("    && git branch future && git tag v2 && git reset -q --hard HEAD~1\n")
    env = make_env(folder=folder)
    try:
        begin(env, TOTALS)
        assert bash(env, "git rev-list --all --count; git tag; git branch --list future; git fsck --unreachable") == "1"
        assert bash(env, "git reflog | wc -l; git status --short | wc -l") == "1\n0"
        assert env.task is not None
        bash(env, env.gold(env.task)[0]["tool_calls"][0]["function"]["arguments"]["command"])
        assert submit(env)[0] == 1.0
    finally:
        env.close()


@pytest.mark.parametrize(
    ("line", "status"),
    [("while True: pass", "timeout"), ("__import__('os')._exit(0)", "no_report"), ("syntax error", "unresolved")],
)
def test_a_patch_that_ends_the_tests_earns_the_lowest(home: Path, tmp_path: Path, line: str, status: str):
    folder = Path(shutil.copytree(OWN_TASKS / TOTALS, tmp_path / TOTALS))
    text = (folder / "task.yaml").read_text().replace("eval_timeout: 60.0", "eval_timeout: 6.0")
    (folder / "task.yaml").write_text(text)
    env = make_env(folder=folder)
    try:
        begin(env, TOTALS)
        bash(env, f'echo "{line}" >> tally/tables.py')
        reward, info = submit(env)
        assert (reward, info["status"]) == (-1.0, status)
    finally:
        env.close()


@pytest.mark.parametrize("line", ["sleep 100", "exit 1"])
def test_tests_that_fail_their_own_gold_patch_are_the_tasks_fault(home: Path, tmp_path: Path, line: str):
    folder = Path(shutil.copytree(OWN_TASKS / TOTALS, tmp_path / TOTALS))
    text = (folder / "task.yaml").read_text().replace("eval_timeout: 60.0", "eval_timeout: 2.0")
    (folder / "task.yaml").write_text(text)
    script = (folder / "eval.sh").read_text()
    (folder / "eval.sh").write_text(script.replace(": '>>>>> Start", f"{line}\n: '>>>>> Start"))
    env = make_env(folder=folder)
    try:
        begin(env, TOTALS)
        bash(env, "echo >> tally/tables.py")
        with pytest.raises(EnvError, match=r"own gold patch does not pass .*eval\.sh"):
            env.step(message_of("submit"))
    finally:
        env.close()


def test_a_script_that_brings_no_tests_gets_them(home: Path, tmp_path: Path):
    folder = Path(shutil.copytree(OWN_TASKS / TOTALS, tmp_path / TOTALS))
    script = (folder / "eval.sh").read_text()
    (folder / "eval.sh").write_text(script[: script.index("rm -f")] + script[script.index(": '>>>>> Start") :])
    env = make_env(folder=folder)
    try:
        begin(env, TOTALS)
        assert env.task is not None
        assert not env.task.brings_tests
        env.step(env.gold(env.task)[0])
        assert submit(env)[1]["fail_to_pass"] == (4, 4)
    finally:
        env.close()


def test_an_image_without_a_repository_is_named(home: Path, tmp_path: Path):
    folder = Path(shutil.copytree(OWN_TASKS / TOTALS, tmp_path / TOTALS))
    (folder / "Dockerfile").write_text("FROM clawrl-python\nRUN mkdir /testbed\n")
    env = make_env(folder=folder)
    try:
        with pytest.raises(EnvError, match=f"{TOTALS}: its image has no git repository at /testbed"):
            begin(env, TOTALS)
    finally:
        env.close()


def test_malformed_and_unruly_calls_are_answered(env: SweEnv):
    begin(env, POINTS)
    for action in ({"role": "assistant", "content": "Let me think."}, message_of("run", command="ls")):
        messages, reward, terminated, *_ = env.step(action)
        assert (reward, terminated) == (0.0, False)
        assert "error" in messages[0]["content"]
    assert "minimum" in bash_of(env, command="ls", seconds=-1)
    assert bash_of(env, command="sleep 5", seconds=0.3).endswith("[stopped after 0.3 s]")
    assert bash(env, "exit 3") == "[exit status 3]"
    assert bash(env, "pwd") == "/testbed"
    assert "NUL" in bash(env, "ls \0")
    assert len(bash(env, "head -c 10000000 /dev/zero | tr '\\0' x")) < 100_000
    bash(env, "rm -rf .git")
    reward, info = submit(env)
    assert (reward, info["status"]) == (-1.0, "no_patch")


@pytest.mark.parametrize("command", ["rm -rf /testbed", "cd /; rm -rf /testbed; touch /testbed"])
def test_a_repository_that_the_agent_took_away_is_its_own_loss(env: SweEnv, command: str):
    begin(env, POINTS)
    bash(env, f"{command}; exit")
    assert bash(env, "pwd; ls") == "/testbed"
    bash(env, command)
    reward, info = submit(env)
    assert (reward, info["status"]) == (-1.0, "no_patch")


UNTRACKED = ("left.txt", "a b/c d ", "odd [x]*?.txt", "back\\slash", "new\nline", "!not", "#none", "deep/.cfg")


def test_what_the_image_has_untracked_is_no_part_of_the_patch(home: Path, tmp_path: Path):
    folder = Path(shutil.copytree(OWN_TASKS / TOTALS, tmp_path / TOTALS))
    (folder / "left").mkdir()
    for name in UNTRACKED:
        (folder / "left" / name).parent.mkdir(exist_ok=True)
        (folder / "left" / name).write_text("x\n")
    with (folder / "Dockerfile").open("a") as file:
        file.write("COPY left/ /testbed/\n")
    env = make_env(folder=folder)
    try:
        begin(env, TOTALS)
        assert bash(env, "git status --short; cat left.txt") == "x"
        assert env.task is not None
        bash(env, env.gold(env.task)[0]["tool_calls"][0]["function"]["arguments"]["command"])
        bash(env, "echo y > left.txt; echo y > 'odd x.txt'; echo y > 'a b/new'")
        patch = env._submission().decode()
        assert "odd x.txt" in patch
        assert "a b/new" in patch
        assert "left.txt" not in patch
        assert submit(env)[0] == 1.0
    finally:
        env.close()


def bash_of(env: SweEnv, **arguments: Any) -> str:
    return env.step(message_of("bash", **arguments))[0][0]["content"]


def test_it_is_an_environment_to_gymnasium(env: SweEnv):
    check_env(env, skip_render_check=True)


def test_a_task_is_made_of_two_trees_by_running_both(home: Path, tmp_path: Path):
    own, old, new = OWN_TASKS / TOTALS, tmp_path / "old", tmp_path / "new"
    for tree in (old, new):
        shutil.copytree(own / "repo", tree)
    for patch in ("gold.patch", "test.patch"):
        subprocess.run(
            ["git", "apply", str(own / patch)], cwd=new, check=True, env={**os.environ, "GIT_DIR": os.devnull}
        )
    place = Place("auto", "enforce" if os.getuid() == 0 else "best_effort", "tests")
    try:
        made = build(Draft("again", old, new, "Totals are missing.", "own/tally", "0.3"), tmp_path, place)
        for name in ("gold.patch", "test.patch", "eval.sh", "tests.json"):
            assert (tmp_path / "again" / name).read_text() == (own / name).read_text(), name
        assert made.statement == "Totals are missing."
        (new / "tally" / "tables.py").write_text((old / "tally" / "tables.py").read_text() + "# another line\n")
        with pytest.raises(NoTask, match="passes with the old ones"):
            build(Draft("again", old, new, "", "own/tally", "0.3"), tmp_path, place)
        assert not (tmp_path / "again").exists()
    finally:
        place.close()


@contextmanager
def endpoint(commands: list[str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An OpenAI-compatible server whose model calls bash with one command after the other; (base URL, its requests)."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "session": self.headers["X-Session-Id"]})
            function = {"name": "bash", "arguments": json.dumps({"command": commands[len(requests) - 1]})}
            call = {"id": f"call_{len(requests)}", "type": "function", "function": function}
            message = {"role": "assistant", "content": None, "tool_calls": [call]}
            choice = {"index": 0, "finish_reason": "tool_calls", "message": message}
            answer = {"id": "a", "object": "chat.completion", "created": 0, "model": "clawrl", "choices": [choice]}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
        server.shutdown()
        thread.join()


def mini() -> Callable[..., str | None]:
    if find_spec("minisweagent") is None:
        lacking("mini-swe-agent is not installed")
    from envs.swe.mini import play

    return play


def test_mini_swe_agent_plays_an_episode(env: SweEnv):
    play = mini()
    begin(env, POINTS)
    done = "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"
    with endpoint(["cat tally/intervals.py", f"{HALF}; {OTHER_HALF}", "exit 4", done]) as (url, requests):
        assert play(env, url, "key", "clawrl", {"X-Session-Id": "s1"}, Limits(turns=10, seconds=60)) is None
    assert env.grade() == 1.0
    assert [len(request["messages"]) for request in requests] == [2, 4, 6, 8]
    assert {request["session"] for request in requests} == {"s1"}
    assert "an interval that contains the next one" in requests[0]["messages"][1]["content"]
    assert "(merged[-1][0], end)" in requests[1]["messages"][-1]["content"]
    assert "<returncode>4</returncode>" in requests[3]["messages"][-1]["content"]


def test_mini_swe_agent_stops_at_its_turns_and_says_so(env: SweEnv):
    play = mini()
    begin(env, POINTS)
    with endpoint(["rm -rf /testbed", *["ls"] * 9]) as (url, requests):
        assert play(env, url, "key", "clawrl", {}, Limits(turns=3, seconds=60)) == "LimitsExceeded"
    assert len(requests) == 3
    assert "/testbed: No such file" in requests[2]["messages"][-1]["content"]
    assert env.grade() == -1.0
