"""How requests become turns of sessions: a real gateway over a real journal; the policy echoes."""

import asyncio
import json
from typing import Any

from echo_door import Door, door

from clawrl.cli import main

FLUSH = "Pre-compaction memory flush. Store durable memories now."


async def say(clawrl: Door, messages: list, text: str | None, *, body: dict[str, Any] | None = None, **headers: str):
    """Append a user's text and the reply; the reply's id."""
    if text is not None:
        messages.append({"role": "user", "content": text})
    async with clawrl.client(0, **headers) as client:
        answer = (await client.post("/v1/chat/completions", json={"messages": messages, **(body or {})})).json()
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
    return answer["id"]


def turns(clawrl: Door) -> list[dict[str, Any]]:
    names = ("id", "session", "index", "kind", "parent", "reason")
    rows = clawrl.rows('SELECT id, session, "index", kind, parent, reason FROM turns')
    return [dict(zip(names, row, strict=True)) for row in rows]


def followed(clawrl: Door) -> list[tuple[str, bool]]:
    return [(turn, bool(done)) for turn, done in clawrl.rows("SELECT turn, done FROM next_states")]


async def test_a_conversation_is_a_line(tmp_path):
    async with door(tmp_path) as clawrl:
        talk: list = []
        ids = [await say(clawrl, talk, text) for text in ("one", "two", "three")]
        rows = turns(clawrl)
        assert [row["parent"] for row in rows] == [None, *ids[:2]]
        assert [row["index"] for row in rows] == [0, 1, 2]
        assert len({row["session"] for row in rows}) == 1
        assert [row["reason"] for row in rows] == ["a first message", *["goes on with its words"] * 2]
        assert followed(clawrl) == [(ids[0], False), (ids[1], False)]


async def test_an_edited_message_is_a_branch(tmp_path):
    async with door(tmp_path) as clawrl:
        talk: list = []
        first = await say(clawrl, talk, "one")
        branch = list(talk)
        await say(clawrl, talk, "two")
        edited = await say(clawrl, branch, "two, better said")
        after = await say(clawrl, branch, "three")
        rows = {row["id"]: row for row in turns(clawrl)}
        assert rows[edited]["parent"] == first
        assert rows[after]["parent"] == edited
        assert len({row["session"] for row in rows.values()}) == 1
        assert [turn for turn, _ in followed(clawrl)] == [first, edited], "the first to follow is the next state"


async def test_parallel_calls_keep_apart(tmp_path):
    async with door(tmp_path) as clawrl:
        talks: list[list] = [[] for _ in range(4)]
        await asyncio.gather(*(say(clawrl, talk, f"task {i}", x_session_id="s") for i, talk in enumerate(talks)))
        first = {row["id"] for row in turns(clawrl)}
        await asyncio.gather(*(say(clawrl, talk, f"more {i}", x_session_id="s") for i, talk in enumerate(talks)))
        assert {row["parent"] for row in turns(clawrl)[4:]} == first
        pairs = clawrl.rows(
            "SELECT t.messages, n.messages, n.seq AS seq FROM turns t JOIN next_states n ON t.id = n.turn"
        )
        tasks = [(json.loads(asked)[-1]["content"], json.loads(told)[-1]["content"]) for asked, told, _ in pairs]
        assert sorted(tasks) == [(f"task {i}", f"more {i}") for i in range(4)]


async def test_a_rewritten_history_in_a_named_session(tmp_path):
    """Compaction puts a summary before the last exchange: the last reply still gets its next state."""
    async with door(tmp_path) as clawrl:
        talk: list = []
        await say(clawrl, talk, "one", x_session_affinity="s")
        second = await say(clawrl, talk, "two", x_session_affinity="s")
        compacted = [{"role": "user", "content": "Summary: one was said."}, *talk[-2:]]
        third = await say(clawrl, compacted, "three", x_session_affinity="s")
        foreign = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "not ours"}]
        fourth = await say(clawrl, foreign, "four", x_session_affinity="s")
        rows = {row["id"]: row for row in turns(clawrl)}
        assert (rows[third]["parent"], rows[third]["index"]) == (second, 2)
        assert "rewritten history" in rows[third]["reason"]
        assert (rows[fourth]["parent"], rows[fourth]["index"]) == (None, 3)
        assert third not in [turn for turn, _ in followed(clawrl)], "what answers another's reply is no next state"


async def test_a_compaction_that_renames_the_session(tmp_path):
    """OpenClaw's affinity header counts compactions and `/new`: only what has a history goes on."""
    async with door(tmp_path) as clawrl:
        talk: list = []
        before = await say(clawrl, talk, "one", x_session_affinity="s:3")
        compacted = [{"role": "user", "content": "Summary: one was said."}, *talk[-1:]]
        after = await say(clawrl, compacted, "two", x_session_affinity="s:4")
        anew = await say(clawrl, [], "three", x_session_affinity="s:5")
        rows = {row["id"]: row for row in turns(clawrl)}
        assert (rows[after]["parent"], rows[after]["index"]) == (before, 1)
        assert "before a compaction" in rows[after]["reason"]
        assert (rows[anew]["parent"], rows[anew]["index"]) == (None, 0)
        assert [turn for turn, _ in followed(clawrl)] == [before]


async def test_a_compaction_does_not_record_who_opted_out(tmp_path):
    async with door(tmp_path) as clawrl:
        talk = [{"role": "user", "content": "one"}]
        assert await clawrl.say(talk, x_session_affinity="s:0", x_train="no")
        compacted = [{"role": "user", "content": "Summary."}, *talk[-1:], {"role": "user", "content": "two"}]
        assert await clawrl.say(compacted, x_session_affinity="s:1")
        assert clawrl.recorded() == []


async def test_a_history_rewritten_in_its_midst(tmp_path):
    """Old images are left out of long conversations: what was before them is known, and the last reply all the same."""
    async with door(tmp_path) as clawrl:
        talk: list = []
        first = await say(clawrl, talk, "one", x_session_id="s")
        second = await say(clawrl, talk, "two, with an image", x_session_id="s")
        trimmed = [*talk[:2], {"role": "user", "content": "two, [an earlier image]"}, talk[-1]]
        third = await say(clawrl, trimmed, "three", x_session_id="s")
        rows = {row["id"]: row for row in turns(clawrl)}
        assert (rows[third]["parent"], rows[third]["index"]) == (second, 2)
        assert followed(clawrl) == [(first, False), (second, False)]


async def test_replies_of_others_in_between(tmp_path):
    async with door(tmp_path) as clawrl:
        talk: list = []
        first = await say(clawrl, talk, "one")
        talk += [{"role": "user", "content": "elsewhere"}, {"role": "assistant", "content": "another model"}]
        await say(clawrl, talk, "two")
        row = turns(clawrl)[1]
        assert (row["parent"], row["index"]) == (first, 1)
        assert "1 replies ago" in row["reason"]
        assert followed(clawrl) == []


async def test_side_requests_are_no_next_states(tmp_path):
    async with door(tmp_path) as clawrl:
        talk: list = []
        first = await say(clawrl, talk, "one")
        await say(clawrl, [*talk], FLUSH)
        title: list = []
        await say(clawrl, title, "Generate a concise session title for: one")
        assert followed(clawrl) == []
        assert [row["kind"] for row in turns(clawrl)] == ["main", "side", "side"]
        await say(clawrl, talk, "two")
        assert followed(clawrl) == [(first, False)]


async def test_a_session_that_is_done(tmp_path):
    async with door(tmp_path) as clawrl:
        talk: list = []
        first = await say(clawrl, talk, "one", x_session_id="s")
        last = await say(clawrl, talk, "two", x_session_id="s", x_session_done="true")
        assert followed(clawrl) == [(first, False), (last, True)]
        await say(clawrl, talk, "after all", x_session_id="s")
        assert followed(clawrl) == [(first, False), (last, True)]


async def test_a_session_ends_without_another_request(tmp_path):
    async with door(tmp_path) as clawrl:
        last = await say(clawrl, [], "one", x_session_id="s")
        async with clawrl.client() as client:
            assert (await client.post("/v1/sessions/s/done")).json() == {"session": "s", "turn": last, "done": True}
            assert (await client.post("/v1/sessions/nothing/done")).status_code == 404
        assert followed(clawrl) == [(last, True)]


async def test_one_trace_is_one_session_until_words_say_more(tmp_path):
    async with door(tmp_path) as clawrl:
        traces = [f"00-{digit * 32}-{'b' * 16}-01" for digit in "12"]
        talk: list = []
        await say(clawrl, talk, "one", traceparent=traces[0])
        await say(clawrl, [], "another beside it", traceparent=traces[0])
        await say(clawrl, talk, "two", traceparent=traces[1])
        assert {row["session"] for row in turns(clawrl)} == {"run-" + "1" * 32}


async def test_the_command_shows_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    async with door(tmp_path) as clawrl:
        talk: list = []
        await say(clawrl, talk, "secret words", x_session_id="s")
        await say(clawrl, talk, "more", x_session_id="s")
        assert main(["sessions", "--run", str(tmp_path)]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "session by X-Session-Id" in shown
        assert "secret" not in shown
        assert main(["sessions", "--run", str(tmp_path), "--json", "--user", "nobody"]) == 0
        assert capsys.readouterr().out == "[]\n"
