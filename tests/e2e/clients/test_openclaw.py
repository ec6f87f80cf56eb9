"""OpenClaw, unmodified and headless, before the real gateway and journal; a script answers in the model's place.

One story is played in one OpenClaw: a tool is called by `openclaw agent --local`, then its gateway is up and is spoken
to by its own protocol (`npm.Operator`), and all that it asks for itself is provoked. The tests look at what the journal
has of it.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from echo_door import Door, Echo, serving
from npm import Npm, OpenClaw
from running import Server

from clawrl.journal.store import JournalReader
from clawrl.serving.normalisers import said, side_marker
from clawrl.types import Message, NextState, Turn

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
PLUGIN = ROOT / "clawrl" / "integrations" / "openclaw"
ORDER = re.compile(r"call (\w+) (\{.*?\})!")
LOOK = 'Please look: call exec {"command": "echo claw-was-here"}!'
LONG = "agent:main:long"
"""A session near its limit: a context of 32,768 tokens is flushed into memory from 20,576 on, and compacted from 24,576
on. The script's usage counts four characters as a token."""
BIG = "agent:main:big"
"""A session of which a compaction leaves a summary and the last reply only: no words of a person."""
SPAWN = 'Delegate: call sessions_spawn {"task": "Count to three.", "taskName": "count"}!'


class Obedient(Echo):
    """Calls the tool that a person orders, if the request offers it; is silent on polls; else says `Answer <n>.`"""

    def reply(self, body: dict[str, Any]) -> Message:
        if side_marker(body["messages"], bool(body.get("tools"))) == "OpenClaw: compaction":
            return {"role": "assistant", "content": _summary(said(body["messages"])[-1].text)}
        self._answered += 1
        last = said(body["messages"])[-1]
        offered = {tool["function"]["name"] for tool in body.get("tools") or ()}
        order = ORDER.search(last.text) if last.role == "user" else None
        if order is not None and order[1] in offered:
            function = {"name": order[1], "arguments": order[2]}
            call = {"id": f"call_{self._answered:06d}", "type": "function", "function": function}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        poll = last.role == "user" and "heartbeat" in last.text
        return {"role": "assistant", "content": "NO_REPLY" if poll else f"Answer {self._answered}."}


def _summary(text: str) -> str:
    """As OpenClaw wants one: it checks the sections, and that the last words are in it."""
    sections = {"Decisions": text.replace("#", "")[-4000:], "Open TODOs": "None.", "Constraints/Rules": "None."}
    sections |= {"Pending user asks": "None.", "Exact identifiers": "None."}
    return "\n\n".join(f"## {name}\n{words}" for name, words in sections.items())


class Seen:
    """What a journal has: turns in order, and what followed them."""

    def __init__(self, turns: list[Turn], following: dict[str, NextState]) -> None:
        self.turns, self._following = turns, following

    def asked(self, words: str) -> Turn:
        """The turn whose request ends with these words of a user."""
        return next(turn for turn in self.turns if words in _last_of(turn, "user"))

    def side(self, kind: str) -> Turn:
        turn = next((turn for turn in self.turns if turn.reason.startswith(f"OpenClaw: {kind}")), None)
        assert turn is not None, [each.reason for each in self.turns]
        assert turn.kind == "side"
        assert (turn.parent, self.followed(turn)) == (None, None)
        return turn

    def followed(self, turn: Turn) -> str | None:
        """The words of the turn's next state."""
        state = self._following.get(turn.id)
        return None if state is None else "\n".join(str(message["content"]) for message in state.messages)


def _last_of(turn: Turn, role: str) -> str:
    spoken = [each.text for each in said(turn.messages) if each.role == role]
    return spoken[-1] if spoken else ""


def seen(door: Door) -> Seen:
    with closing(JournalReader(door.url)) as reader:
        turns = [reader.turn(id) for (id,) in door.rows("SELECT id FROM turns")]
    states = door.rows("SELECT turn, role, messages, done FROM next_states")
    following = {
        turn: NextState(turn, role, tuple(json.loads(told)), bool(done), 0.0) for turn, role, told, done in states
    }
    return Seen([turn for turn in turns if turn is not None], following)


def words(num_characters: int) -> str:
    return " ".join(f"word{at}" for at in range(num_characters // 7))[:num_characters]


def wait_for(what: str, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s} s"
        time.sleep(0.3)


def documented() -> dict[str, Any]:
    """The configuration that the README shows."""
    section = (ROOT / "README.md").read_text().split("\n## OpenClaw\n", 1)[1]
    return json.loads(section.split("```json\n", 1)[1].split("```", 1)[0])


def small(config: dict[str, Any], url: str, *tools: str) -> dict[str, Any]:
    """A configuration for this server, and with a small prompt."""
    defaults = {"skills": [], "skipBootstrap": True, "contextInjection": "never", "heartbeat": {"every": "0m"}}
    config["models"]["providers"]["clawrl"]["baseUrl"] = f"{url}/v1"
    config["agents"]["defaults"] |= defaults
    config["tools"] = {"profile": "minimal", "alsoAllow": ["exec", "read", "write", *tools], "toolSearch": False}
    return config


@pytest.fixture(scope="module")
def story(openclaw: Npm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("openclaw")
    (folder / "journal").mkdir()
    with serving(folder / "journal", Obedient()) as door:
        claw = OpenClaw(openclaw, folder, small(documented(), door.address, "sessions_spawn"))
        assert "Answer 2." in claw.say(LOOK)

        def has(kind: str, num: int = 1) -> Callable[[], bool]:
            return lambda: [turn.reason.split(";")[0] for turn in seen(door).turns].count(f"OpenClaw: {kind}") >= num

        with claw.gateway() as operator:
            assert "Answer 3." in operator.say("Second: are you sure?")
            operator.say("/new")
            operator.say("After new: hello.")
            operator.say(SPAWN)
            wait_for("subagent's completion", has("subagent's completion"))
            operator.call("wake", mode="now", text="Something happened.")
            wait_for("heartbeat", has("heartbeat"))
            operator.say("Fourth: thanks.")
            operator.say("Fifth: go on.")
            operator.call("sessions.compact", key="agent:main:main")
            operator.say("Sixth: and after the compaction?")
            room = {"key": "agent:main:dashboard:rome", "message": "Plan a trip to Rome with two children."}
            operator.call("sessions.create", **room)
            wait_for("title", has("title"))
            soon = {"kind": "at", "at": datetime.now(UTC).isoformat()}
            what = {"payload": {"kind": "agentTurn", "message": "Say hello."}, "delivery": {"mode": "none"}}
            operator.call("cron.add", name="hello", schedule=soon, sessionTarget="isolated", wakeMode="now", **what)
            wait_for("cron job", has("cron"))
            operator.say("Seventh: hello.", LONG)
            operator.say(f"Eighth: {words(78_000)}", LONG)
            wait_for("memory flush", has("memory flush"))
            operator.say(f"Ninth: {words(20_000)}", LONG)
            operator.say("Tenth: what was it about?", LONG)
            operator.say("Eleventh: hello.", BIG)
            operator.say(f"Twelfth: {words(60_000)}", BIG)
            operator.call("sessions.compact", key=BIG)
            operator.call("wake", mode="now", text="Something happened.", sessionKey=BIG)
            wait_for("second heartbeat", has("heartbeat", 2))
            operator.say("Thirteenth: go on.", BIG)
        yield seen(door)


def test_a_tool_round_trip_is_two_turns(story: Seen):
    first, second = story.turns[:2]
    assert (first.kind, first.index, first.parent, first.finish_reason) == ("main", 0, None, "tool_calls")
    assert (second.kind, second.index, second.parent, second.finish_reason) == ("main", 1, first.id, "stop")
    assert second.session == first.session
    assert story.followed(first) == "claw-was-here"
    assert second.reply["content"] == "Answer 2."


def test_another_program_goes_on_with_the_session(story: Seen):
    """`openclaw agent --local` began it, OpenClaw's gateway goes on; the next state is what the user really said."""
    before, turn = story.turns[1], story.asked("Second:")
    assert (turn.kind, turn.index, turn.parent, turn.session) == ("main", 2, before.id, before.session)
    words = story.followed(before)
    assert words is not None
    assert words.endswith("Second: are you sure?")
    assert "OPENCLAW_INTERNAL_CONTEXT" not in words
    assert "INTERNAL_CONTEXT" in json.dumps(turn.messages[-1])


def test_new_begins_another_conversation(story: Seen):
    before, turn = story.asked("Second:"), story.asked("After new:")
    assert (turn.kind, turn.index, turn.parent) == ("main", 0, None)
    assert turn.session != before.session
    assert story.followed(before) is None


def test_a_subagent_and_its_completion_are_side(story: Seen):
    asked = story.asked("Delegate:")
    assert asked.parent == story.asked("After new:").id
    assert "accepted" in (story.followed(asked) or "")
    assert story.side("subagent;").session != asked.session
    assert story.side("subagent's completion").session == asked.session


def test_a_heartbeat_is_side_and_leaves_no_trace(story: Seen):
    assert story.side("heartbeat").session == story.asked("Fourth:").session


def test_what_follows_a_subagents_words_is_not_said_of_the_reply_before(story: Seen):
    """OpenClaw joins that reply with the one about the completion: the next message may speak of either."""
    announced = next(turn for turn in story.turns if turn.parent == story.asked("Delegate:").id)
    assert story.followed(announced) is None
    turn = story.asked("Fourth:")
    assert (turn.kind, turn.parent) == ("main", story.asked("Delegate:").id)
    assert story.asked("Fifth:").parent == turn.id


def test_compaction_is_side_and_the_conversation_goes_on(story: Seen):
    story.side("compaction")
    before, turn = story.asked("Fifth:"), story.asked("Sixth:")
    assert (turn.kind, turn.parent) == ("main", before.id)
    assert (story.followed(before) or "").endswith("Sixth: and after the compaction?")


def test_a_memory_flush_and_automatic_compactions_are_side_and_the_conversation_goes_on(story: Seen):
    flush = story.side("memory flush")
    turns = [story.asked(words) for words in ("Seventh:", "Eighth:", "Ninth:", "Tenth:")]
    assert [turn.kind for turn in turns] == ["main"] * 4
    assert [turn.index for turn in turns] == [0, 1, 2, 3]
    assert [turn.parent for turn in turns] == [None, *(turn.id for turn in turns[:3])]
    assert flush.session == turns[1].session
    assert turns[3].session != turns[1].session, "its name counts the compactions"
    assert "was compacted into the following summary" in json.dumps(turns[3].messages)
    assert "Ninth: word0" in (story.followed(turns[1]) or "")
    assert (story.followed(turns[2]) or "").endswith("Tenth: what was it about?")


def test_a_heartbeat_after_a_compaction_of_all_that_was_asked(story: Seen):
    before, turn = story.asked("Twelfth:"), story.asked("Thirteenth:")
    poll = next(each for each in story.turns if each.session == turn.session)
    assert poll.kind == "side"
    assert poll.reason.startswith("OpenClaw: heartbeat")
    assert "Twelfth:" not in json.dumps([each for each in poll.messages if "<summary>" not in json.dumps(each)])
    assert (turn.kind, turn.parent) == ("main", before.id)
    assert (story.followed(before) or "").endswith("Thirteenth: go on.")


def test_titles_and_cron_jobs_are_side(story: Seen):
    assert "Rome" in _last_of(story.side("title"), "user")
    assert story.asked("Plan a trip to Rome").kind == "side"
    assert [turn.kind for turn in story.turns if "Plan a trip to Rome" in _last_of(turn, "user")] == ["side", "main"]
    story.side("cron")


def test_the_plugin_says_it_by_headers(openclaw: Npm, tmp_path: Path):
    (tmp_path / "journal").mkdir()
    config = json.loads((PLUGIN / "openclaw.json").read_text())
    config["plugins"]["load"]["paths"] = [str(shutil.copytree(PLUGIN, tmp_path / "plugin"))]
    with serving(tmp_path / "journal", Obedient()) as door:
        claw = OpenClaw(openclaw, tmp_path, small(config, door.address, "sessions_spawn"))
        with claw.gateway() as operator:
            operator.say("One: hello.")
            operator.say("Two: still there?")
            operator.say("/new")
            operator.say(SPAWN)
            wait_for("completion", lambda: len(seen(door).turns) == 6)
            states = door.rows("SELECT turn, done FROM next_states")
        story = seen(door)
    one, two, three = story.asked("One:"), story.asked("Two:"), story.asked("Delegate:")
    assert all(turn.reason.startswith("X-Turn-Type; session by X-Session-Id") for turn in story.turns)
    assert [turn.kind for turn in story.turns].count("main") == 4
    assert (two.parent, three.parent) == (one.id, None)
    assert len({one.session, two.session, three.session}) == 1
    assert [bool(done) for turn, done in states if turn == two.id] == [True]


def test_a_turn_of_the_real_engine(openclaw: Npm, server: Server, tmp_path: Path):
    """The built-in model's context holds no prompt of OpenClaw's own, so a plugin gives a short one; no tools."""
    plugin = tmp_path / "short"
    plugin.mkdir()
    (plugin / "package.json").write_text((PLUGIN / "package.json").read_text())
    about = {"id": "short", "name": "short", "description": "A short prompt", "activation": {"onStartup": True}}
    (plugin / "openclaw.plugin.json").write_text(json.dumps({**about, "configSchema": {"type": "object"}}))
    (plugin / "index.js").write_text(
        'export default { id: "short", name: "short", description: "A short prompt", register(api) {\n'
        '  api.on("before_prompt_build", () => ({ systemPrompt: "You are a helpful assistant." })); } };\n'
    )
    config = small(documented(), server.url)
    del config["tools"]
    config["plugins"] = {
        "slots": {"memory": "none"},
        "load": {"paths": [str(plugin)]},
        "entries": {
            "short": {"enabled": True, "hooks": {"allowConversationAccess": True, "allowPromptInjection": True}}
        },
    }
    config["models"]["providers"]["clawrl"]["models"][0] |= {
        "maxTokens": 128,
        "compat": {"sendSessionAffinityHeaders": True, "supportsTools": False},
    }
    claw = OpenClaw(openclaw, tmp_path / "claw", config)
    claw.say("OpenClaw: Tom has 3 apples and buys 4 more. How many has he?")
    claw.say("OpenClaw: are you sure?")
    with closing(server.journal()) as journal, journal.database.reader.connect() as connection:
        ids = connection.exec_driver_sql("SELECT id, messages FROM turns ORDER BY seq").fetchall()
        first, second = (journal.turn(id) for id, messages in ids if "OpenClaw: " in messages)
    assert first is not None
    assert second is not None
    assert (first.kind, second.kind, second.parent) == ("main", "main", first.id)
    assert len(first.capture.completion_ids) == len(first.capture.logprobs) > 0
