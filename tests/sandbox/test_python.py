"""The Python interpreter in a sandbox: what stays, what is lost and said, what it cannot reach."""

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from gymnasium.utils.env_checker import check_env
from lacking import lacking

from clawrl.errors import EnvError
from clawrl.rollout.env import message_of
from envs.sandbox.mapped import missing
from envs.toolcall.python_env import NEITHER, PythonEnv

pytestmark = pytest.mark.sandbox

LOST = "a new one was started, and what was defined before is lost]"
STAYS = "[stopped after 0.5 s; what was defined before is still there]"


def make(**options: Any) -> PythonEnv:
    if why := missing():
        lacking(why)
    limits = "enforce" if os.getuid() == 0 else "best_effort"
    return PythonEnv(limits=limits, run="tests", **{"packages": ("mcp",), **options})  # the image of test_mcp


@pytest.fixture(scope="module")
def env(home) -> Iterator[PythonEnv]:
    made = make(datasets=("gcd", "integers"), cell_seconds=0.5, memory=512 << 20)
    yield made
    made.close()


@pytest.fixture
def begun(env: PythonEnv) -> PythonEnv:
    env.reset(options={"task": 0})
    return env


def run(env: PythonEnv, code: str) -> str:
    (message,), reward, terminated, *_ = env.step(message_of("python", code=code))
    assert (message["role"], reward, terminated) == ("tool", 0.0, False)
    return message["content"]


def answer(env: PythonEnv, text: str) -> float:
    _, reward, terminated, _, facts = env.step({"role": "assistant", "content": text})
    assert terminated
    assert facts["outcome"] == reward
    return reward


def test_gymnasium_finds_nothing_wrong(env):
    check_env(env)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("number", [0, 1])
def test_gold_is_right_and_idleness_is_not(env, split, number):
    env.reset(options={"task": number, "split": split})
    assert env.task is not None
    *calls, last = env.gold(env.task)
    for action in calls:
        assert env.task.answer in env.step(action)[0][0]["content"]
    assert answer(env, last["content"]) == 1.0
    env.reset(options={"task": number, "split": split})
    assert env.grade() == -1.0


def test_only_an_answer_ends_it_and_the_last_one_counts(begun):
    assert begun.step({"role": "assistant", "content": f"I think {begun.task.answer}"})[0][0]["content"] == NEITHER
    assert "there is no tool 'sh'; the tools are python" in begun.step(message_of("sh"))[0][0]["content"]
    assert "'code' is a required property" in begun.step(message_of("python"))[0][0]["content"]
    assert answer(begun, f"<answer>1000003</answer> no, <answer> {begun.task.answer} </answer>") == 1.0


def test_names_stay_and_output_comes_in_order(begun):
    assert run(begun, "x = 2\nprint('a', flush=True)\nimport sys; print('b', file=sys.stderr)\nx + 1") == "a\nb\n3"
    assert run(begun, "x") == "2"
    assert run(begun, "y = 1") == "[no output]"
    assert run(begun, "import os; os.system('echo c')") == "c\n0"
    trace = run(begun, "def f():\n    return 1 / 0\nprint('d')\nf()")
    assert re.match(
        r"d\nTraceback .*\n  File \"<cell \d+>\", line 4, in <module>\n    f\(\)\n.*ZeroDivision", trace, re.S
    )
    assert "cells.py" not in trace
    assert run(begun, "def (").startswith('  File "<cell ')
    assert len(run(begun, "print('z' * 10**7)")) < 70_000
    assert "EOFError" in run(begun, "input()")
    begun.reset(options={"task": 0})
    assert "NameError" in run(begun, "x")


def test_what_is_stopped_or_ends_is_said(begun):
    run(begun, "x = 2")
    started = time.monotonic()
    assert run(begun, "print('so far')\nwhile True: x") == f"so far\n{STAYS}"
    assert run(begun, "import sys; sys.exit(3)") == "[SystemExit(3): the interpreter goes on]"
    assert "MemoryError" in run(begun, "b = bytearray(1 << 30)")
    run(begun, "import sys; sys.stdout.close()")
    assert run(begun, "print(x)") == "2"
    stubborn = "import signal; signal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass"
    assert run(begun, stubborn) == f"[the interpreter did not stop in time and was killed; {LOST}"
    assert "NameError" in run(begun, "x")
    assert run(begun, "import os; os._exit(4)") == f"[the interpreter ended with exit status 4; {LOST}"
    assert run(begun, "import os; os.kill(os.getpid(), 9)") == (f"[the interpreter ended with exit status 137; {LOST}")
    assert time.monotonic() - started < 30


def test_the_code_reaches_neither_grader_nor_network_nor_the_answer(begun):
    for module in ("reasoning_gym", "math_verify", "envs", "clawrl"):
        assert "ModuleNotFoundError" in run(begun, f"import {module}")
    assert "unreachable" in run(begun, "import socket; socket.create_connection(('192.0.2.1', 80), 0.4)")
    found = run(begun, "import os; [p for p in os.listdir('/proc') if p.isdigit()], sorted(os.environ)")
    assert "CLAWRL" not in found
    assert answer(begun, "<answer>no idea</answer>") == -1.0


def test_packages_can_be_imported_and_a_missing_one_is_told(begun):
    assert run(begun, "import pydantic; pydantic.__name__") == "'pydantic'"
    env = make(packages=("nosuch-package",))
    with pytest.raises(EnvError, match=r"nosuch-package is not installed here.*pip install"):
        env.reset()
    env.close()


def test_an_image_without_python_is_told(home, folder):
    (folder / "bare").mkdir(exist_ok=True)
    (folder / "bare/Dockerfile").write_text("FROM base\nRUN rm -f /usr/bin/python*\n")
    env = make(image=str(folder / "bare"))
    with pytest.raises(EnvError, match=r"no interpreter starts in this sandbox .*its image needs python"):
        env.reset()
    env.close()
