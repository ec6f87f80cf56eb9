"""Agents of their own: a real program at the real gateway, and how one ends that does not end well."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from echo_door import Pieces, door

from clawrl.config import LearningSection, PoolSection
from clawrl.errors import EnvError
from clawrl.rollout.agent import Caller, Limits, load_agent, run_episode
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.comparing import compare, outcome_advantages
from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, Task
from clawrl.rollout.worker import agent_of
from clawrl.types import Episode, Message
from envs.toolcall.env import ToolCallEnv

PROGRAM = "clawrl.rollout.program:run_program"
BLACK_BOX = Path(__file__).with_name("black_box.py")


class Solver:
    """A policy that plays the stock task as a solution does; `wrong` gives an answer that is not asked for."""

    wrong = False

    def chat(self, body: dict[str, Any], request: str, user: str = "") -> Pieces:
        messages = body["messages"]
        item, first, second = re.findall(r'"(\w+)"', messages[0]["content"])
        sign = "-" if "more" in messages[0]["content"] else "+"
        said = [message["content"] for message in messages if message["role"] == "tool"]
        message: Message = {"role": "assistant", "content": None}
        if len(said) < 2:
            message["tool_calls"] = [called("lookup", item=item, place=(first, second)[len(said)])]
        elif len(said) == 2:
            message["tool_calls"] = [called("calc", expression=f"{said[0]} {sign} {said[1]}")]
        else:
            message["content"] = "I do not know" if self.wrong else f"{said[2]} {item}."
        reason = "tool_calls" if message.get("tool_calls") else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        answer = {"id": f"chatcmpl-{request}", "object": "chat.completion", "model": "m", "choices": [choice]}
        return Pieces(json.dumps(message), [json.dumps(answer)])


def called(name: str, **arguments: str) -> dict[str, Any]:
    return {"id": "call", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


class FolderEnv(AgentEnv[Task]):
    """Solved by a file `answer.txt` with the word `yes` in the folder."""

    name = "folder"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.workdir = str(folder)

    def make_task(self, number: int, split: Split) -> Task:
        return Task(f"{split}-{number}")

    def begin(self, task: Task) -> Opening:
        return Opening(({"role": "user", "content": "Write yes into answer.txt."},))

    def act(self, action: Message) -> Answer:
        if action["content"] == "break":
            raise EnvError("it is broken")
        return Answer(terminated=action["content"] == "over")

    def grade(self) -> float:
        answer = Path(str(self.workdir)) / "answer.txt"
        return 1.0 if answer.exists() and answer.read_text() == "yes" else -1.0

    def gold(self, task: Task) -> list[Message]:
        return []


def attempt(session: str) -> Attempt:
    return Attempt("toolcall", "group", 2, session, "train", 5)


@pytest.fixture
def caller() -> Caller:
    return Caller(openai.AsyncOpenAI(base_url="http://127.0.0.1:1/v1", api_key="key"), "clawrl")


async def play(folder: Path, caller: Caller, *command: str, seconds: float = 20, **environment: str) -> Episode:
    agent = load_agent(PROGRAM, {"command": command, "environment": environment})
    return await run_episode(FolderEnv(folder), attempt("s"), caller, Limits(seconds=seconds), agent)


async def test_a_program_that_knows_a_base_url_solves_a_task_and_its_turns_make_samples(tmp_path):
    policy = Solver()
    async with door(tmp_path, policy=policy) as house:
        port = house._gateways[0]._settings.port
        client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        caller, agent = Caller(client, "clawrl"), load_agent(PROGRAM, {"command": [sys.executable, str(BLACK_BOX)]})
        for session, policy.wrong in (("right", False), ("wrong", True)):
            episode = await run_episode(ToolCallEnv(), attempt(session), caller, Limits(seconds=30), agent)
            assert (episode.status, episode.reason) == ("done", "")
            assert episode.outcome == (-1.0 if policy.wrong else 1.0)
            await house.journal.append(episode)
        await client.close()
        episodes, turns = await house.journal.group("group")
        assert [(turn.session, turn.index, turn.source) for turn in turns] == [
            (session, index, "toolcall") for session in ("right", "wrong") for index in range(4)
        ]
        _, samples = compare(
            episodes, turns, outcome_advantages(episodes, turns), {}, LearningSection(kl_weight=0), time.time()
        )
        assert [sample.id for sample in samples] == [turn.id for turn in turns]
        steps = await house.journal.steps("group")
        assert [state.role for state, _ in steps] == ["tool"] * 6


async def test_a_program_acts_in_the_folder_of_the_environment(tmp_path, caller, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_WORKER", "x")
    script = 'env > told.txt; printf "$WORD" > answer.txt; echo noise; echo "{}"; echo "[1]"'
    episode = await play(tmp_path, caller, "sh", "-c", script, WORD="yes")
    assert (episode.status, episode.outcome, episode.reason) == ("done", 1.0, "")
    told = dict(line.split("=", 1) for line in (tmp_path / "told.txt").read_text().splitlines() if "=" in line)
    url = "http://127.0.0.1:1/session/s/source/toolcall/group/group/turns/main/v1"
    assert (told["OPENAI_BASE_URL"], told["OPENAI_API_BASE"], told["OPENAI_API_KEY"]) == (url, url, "key")
    assert (told["MODEL"], told["TASK"]) == ("clawrl", "Write yes into answer.txt.")
    assert "SECRET_OF_THE_WORKER" not in told
    assert not task_files_left(told["TASK_FILE"])


async def test_a_program_that_fails_is_graded_and_says_how(tmp_path, caller):
    script = "printf yes > answer.txt; echo 'first line' >&2; echo 'no more tokens' >&2; exit 3"
    episode = await play(tmp_path, caller, "sh", "-c", script)
    assert (episode.status, episode.outcome) == ("truncated", 1.0)
    assert episode.reason == "exit code 3: first line no more tokens"


async def test_time_ends_a_program_with_all_it_started(tmp_path, caller):
    script = "sleep 300 & echo $! > child; echo $$ > self; printf yes > answer.txt; wait"
    started = time.monotonic()
    episode = await play(tmp_path, caller, "sh", "-c", script, seconds=1)
    assert (episode.status, episode.outcome) == ("timeout", 1.0)
    assert time.monotonic() - started < 100
    assert not any(running(tmp_path / name) for name in ("child", "self"))


async def test_what_a_program_leaves_running_ends_with_it(tmp_path, caller):
    episode = await play(tmp_path, caller, "sh", "-c", "sleep 300 & echo $! > child")
    assert (episode.status, episode.outcome) == ("done", -1.0)
    assert episode.seconds < 100
    assert not running(tmp_path / "child")


def task_files_left(file: str) -> bool:
    return os.path.exists(file)


def running(file: Path) -> bool:
    """Whether the process is alive; one that nobody has reaped yet is not."""
    state = Path(f"/proc/{file.read_text().strip()}/stat")
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            return False
        time.sleep(0.05)
    return True


async def test_an_episode_that_is_over_takes_no_more_steps(tmp_path, caller):
    action = json.dumps({"role": "assistant", "content": "over"})
    script = f"for i in 1 2; do echo '{action}'; read answer; echo \"$answer\" >> answers; done"
    episode = await play(tmp_path, caller, "sh", "-c", script)
    assert (episode.status, episode.outcome) == ("done", -1.0)
    first, second = map(json.loads, (tmp_path / "answers").read_text().splitlines())
    assert first == {"messages": [], "terminated": True}
    assert second == {"error": "the episode is over"}


async def test_an_environment_that_breaks_ends_the_program(tmp_path, caller):
    action = json.dumps({"role": "assistant", "content": "break"})
    episode = await play(tmp_path, caller, "sh", "-c", f"echo $$ > self; echo '{action}'; exec sleep 300")
    assert (episode.status, episode.outcome, episode.reason) == ("error", None, "it is broken")
    assert not running(tmp_path / "self")


async def test_a_flood_of_output_is_no_action_and_fills_nothing(tmp_path, caller):
    flood = "import sys; [out.write('x' * 2**20) for out in (sys.stdout, sys.stderr) for _ in range(30)]; sys.exit(1)"
    episode = await play(tmp_path, caller, sys.executable, "-c", flood)
    assert episode.status == "truncated"
    assert len(episode.reason) < 400


async def test_a_program_that_is_not_there_has_no_outcome(tmp_path, caller):
    episode = await play(tmp_path, caller, "no-such-program")
    assert (episode.status, episode.outcome) == ("error", None)
    assert "there is no such program" in episode.reason


def plain(env, base_url, api_key, model, extra_headers, limits, word="yes") -> None:
    """An agent as `envs` write it: a function."""
    assert extra_headers["X-Session-Id"] in base_url
    assert 0 < limits.seconds <= 5
    (Path(env.workdir) / "answer.txt").write_text(word)
    if word == "raise":
        raise RuntimeError("no quota")


@pytest.mark.parametrize(
    ("word", "status", "outcome"), [("yes", "done", 1.0), ("no", "done", -1.0), ("raise", "error", None)]
)
async def test_an_agent_is_a_plain_function(tmp_path, caller, word, status, outcome):
    pool = PoolSection(name="p", env="envs:clawrl/ToolCall-v0", agent=f"{__name__}:plain", agent_options={"word": word})
    episode = await run_episode(FolderEnv(tmp_path), attempt("s"), caller, Limits(seconds=5), agent_of(pool))
    assert (episode.status, episode.outcome) == (status, outcome)
    assert episode.reason == ("RuntimeError: no quota" if word == "raise" else "")


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        ("no.such:agent", {}, "No module named"),
        (f"{__name__}:missing", {}, "no attribute 'missing'"),
        (PROGRAM, {}, "missing a required argument: 'command'"),
        (PROGRAM, {"command": ["sh"], "comand": 1}, "unexpected keyword argument 'comand'"),
    ],
)
def test_an_agent_that_cannot_be_is_refused_before_anything_starts(agent, options, message):
    with pytest.raises(EnvError, match=re.escape(message)):
        load_agent(agent, options)


async def test_a_file_of_the_command_is_found_from_where_clawrl_was_started(tmp_path, caller, monkeypatch):
    work, here = tmp_path / "work", tmp_path / "here"
    work.mkdir()
    here.mkdir()
    (here / "agent.sh").write_text("printf yes > answer.txt")
    monkeypatch.chdir(here)
    assert (await play(work, caller, "sh", "agent.sh")).outcome == 1.0
