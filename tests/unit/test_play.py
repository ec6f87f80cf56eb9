"""`clawrl play`: lines become assistant messages, the environment's answers are shown, and the verdict ends it."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from clawrl.commands.play import _Screen, action_of
from clawrl.rollout.agent import Limits

PLAY = [sys.executable, "-m", "clawrl.cli", "play"]
LS = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
WAIT = {"type": "object", "properties": {"seconds": {"type": "number"}, "why": {"type": "string"}}}
TOOLS = [
    {"type": "function", "function": {"name": "ls", "parameters": LS}},
    {"type": "function", "function": {"name": "wait", "parameters": WAIT}},
]


def play(*words: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PLAY, *words], input=lines, capture_output=True, text=True, timeout=60, check=False)


def test_a_pipe_of_lines_is_played_to_the_verdict():
    """The same task told twice: first its gold solution, then those lines typed, with wrong ones between."""
    gold = play("toolcall", "--task", "3", "--gold")
    assert gold.returncode == 0, gold.stderr
    assert gold.stdout.endswith("verdict 1 (1 solved, -1 not at all)\n")
    solution = [line.removeprefix("> ") for line in gold.stdout.splitlines() if line.startswith("> ")]
    assert len(solution) == 4
    wrong = ["lookup", "lookup item=pears", "lookup {", "", "calc 2 * 3"]
    typed = play("toolcall", "--task", "3", lines="\n".join([*wrong, *solution]))
    assert typed.returncode == 0, typed.stderr
    answers = [line for line in typed.stdout.splitlines() if line.startswith("tool: ")]
    assert "'item' is a required property" in answers[0]
    assert "'place' is a required property" in answers[1]
    assert "not valid JSON" in answers[2]
    assert answers[3].startswith("tool: error")
    assert answers[4:] == [line for line in gold.stdout.splitlines() if line.startswith("tool: ")]
    assert typed.stdout.endswith("verdict 1 (1 solved, -1 not at all)\n")


def test_the_end_of_input_is_said_and_the_task_graded_as_it_stands():
    told = play("toolcall", "--split", "held_out", "--seed", "5", lines="calc 1 + 1\n")
    assert told.returncode == 0, told.stderr
    assert "tool: 2\n" in told.stdout
    assert told.stdout.endswith("it is graded as it stands\nverdict -1 (1 solved, -1 not at all)\n")


def test_a_terminal_is_asked_line_by_line():
    ours, theirs = pty.openpty()
    with subprocess.Popen([*PLAY, "toolcall", "--seed", "5"], stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"> " not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"calc 1 + 1\n")
        while b"> " not in shown.partition(b"tool: 2")[2]:  # a Ctrl-D before that would be none
            shown += os.read(ours, 4096)
        os.write(ours, b"\x04")
        while b"verdict -1" not in shown:
            shown += os.read(ours, 4096)
    os.close(ours)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tool"], "no environment 'tool'; use one of"),
        (["nowhere:clawrl/A-v0"], "environment 'nowhere:clawrl/A-v0' cannot be made: ModuleNotFoundError"),
        (["gymnasium:CartPole-v1"], "is not played by chat messages"),
        (["toolcall", "--option", "sweet=1"], "unexpected keyword argument 'sweet'"),
        (["toolcall", "--split", "test"], "split 'test' is unknown; use one of train, held_out"),
    ],
)
def test_what_cannot_be_played_is_one_message(capsys, words, expected):
    from clawrl.cli import main

    assert main(["play", *words]) == 1
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("line", "name", "arguments"),
    [
        ('ls {"path": "a"}', "ls", {"path": "a"}),
        ("ls path=a", "ls", {"path": "a"}),
        (r'ls path="a b\n"', "ls", {"path": "a b\n"}),
        ("ls a b", "ls", {"path": "a b"}),
        (r'ls "a\u0003"', "ls", {"path": "a\u0003"}),
        ('ls "a" b', "ls", {"path": '"a" b'}),
        ("ls x=1 y", "ls", {"path": "x=1 y"}),
        ("ls depth=2", "ls", {"path": "depth=2"}),
        ("ls path=7", "ls", {"path": "7"}),
        ("wait", "wait", {}),
        ("wait seconds=1.5 why=7", "wait", {"seconds": 1.5, "why": "7"}),
        ("wait seconds=soon", "wait", {"seconds": "soon"}),
    ],
)
def test_a_line_that_begins_with_a_tool_calls_it(line, name, arguments):
    (call,) = action_of(line, TOOLS)["tool_calls"]
    assert call["function"]["name"] == name
    assert json.loads(call["function"]["arguments"]) == arguments


@pytest.mark.parametrize("line", ["wait a while", "wait {", "wait [1]"])
def test_words_that_are_no_arguments_go_to_the_environment_as_they_are(line):
    (call,) = action_of(line, TOOLS)["tool_calls"]
    assert call["function"]["arguments"] == line.removeprefix("wait ")


def test_any_other_line_is_a_message():
    assert action_of(" lsof 5 pears.\n", TOOLS) == {"role": "assistant", "content": "lsof 5 pears."}


def test_pictures_go_to_files_and_control_characters_are_shown_not_obeyed(capsys):
    url = "data:image/png;base64,iVBORw0KGgo="
    parts = [{"type": "text", "text": "a page"}, {"type": "image_url", "image_url": {"url": url}}]
    screen = _Screen()
    screen.show([{"role": "user", "content": parts}, {"role": "tool", "content": "\x1b]0;title\x07\rred"}])
    first, picture, answer = capsys.readouterr().out.splitlines()
    assert first == "user: a page"
    path = Path(picture.removeprefix("[picture: ").removesuffix("]"))
    assert path.read_bytes() == b"\x89PNG\r\n\x1a\n"
    assert answer == r"tool: \x1b]0;title\x07\x0dred"
    path.unlink()
    path.parent.rmdir()


def test_a_long_observation_is_cut_as_the_rollout_cuts_it(capsys):
    most = Limits().observation_chars
    _Screen().show([{"role": "tool", "content": "a" * most + "b" * most}])
    assert f"{most} characters left out" in capsys.readouterr().out
