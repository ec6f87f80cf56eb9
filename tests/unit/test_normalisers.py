"""What was really said, however a client writes it: the same digest, the same next state, side requests known."""

import pytest

from clawrl.serving.normalisers import said, session_marker, side_marker
from clawrl.serving.sessions import continuation, digest, identify


def user(text):
    return {"role": "user", "content": text}


def reply(text, **more):
    return {"role": "assistant", "content": text, **more}


def context(text="time, place"):
    return {
        "role": "user",
        "content": [
            {
                "type": "text",
                "text": f"<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>\n{text}\n<<<END_OPENCLAW_INTERNAL_CONTEXT>>>",
            }
        ],
    }


ASKED = user("[Wed 2026-09-02 10:00 UTC] two plus two?")
HEARTBEAT = user("Read HEARTBEAT.md if it exists. If nothing needs attention, reply HEARTBEAT_OK.")
SUMMARY = user("The conversation history before this point was compacted into the following summary:\n\n<summary>…")
POLL = user("[OpenClaw heartbeat poll]")
FLUSH = user("Pre-compaction memory flush. Store durable memories now.")
CALL = {
    "role": "assistant", "content": None,
    "tool_calls": [{"id": "call_000002", "type": "function", "function": {"name": "exec", "arguments": '{"a": 1}'}}],
}  # fmt: skip


@pytest.mark.parametrize(
    "replayed",
    [
        [user("q"), reply("<think>hm</think>\n\nfour")],
        [user("q"), reply("hm</think>four")],
        [user("q"), reply("four", reasoning_content="hm")],
        [user("q"), reply("four", provider_specific_fields={"refusal": None})],
        [user("q"), context(), reply("four")],
        [{"role": "system", "content": "you are"}, user("q"), reply([{"type": "text", "text": "four"}])],
    ],
)
def test_a_conversation_is_known_however_it_is_sent(replayed):
    assert digest(replayed) == digest([user("q"), reply("four")])


def test_openclaw_s_replay_of_a_tool_call():
    call = {"id": "call000002", "type": "function", "function": {"name": "exec", "arguments": '{"a":1}'}}
    replayed = [user("q"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert digest(replayed) == digest([user("q"), context(), CALL])


def test_the_next_state_is_what_was_said_not_what_the_client_added():
    results = [{"role": "tool", "tool_call_id": str(i), "content": "4"} for i in range(2)]
    seen = continuation([user("q"), CALL, *results, context()])
    assert (seen.fresh, seen.role) == (tuple(results), "tool")
    mixed = user(f"no, five\n{context()['content'][0]['text']}")
    seen = continuation([user("q"), reply("four"), mixed])
    assert [message["content"] for message in seen.fresh] == ["no, five"]


def test_all_earlier_replies_can_be_gone_on_with():
    talk = [user("q"), reply("four"), user("sure?"), reply("yes"), user("ok")]
    seen = continuation(talk)
    assert seen.histories == (digest(talk[:4]), digest(talk[:2]))
    assert continuation(talk[:1]).histories == ()


@pytest.mark.parametrize("poll", [HEARTBEAT, POLL, FLUSH])
def test_a_poll_that_nobody_noticed_leaves_no_trace(poll):
    silent = [ASKED, reply("four"), poll, CALL, {"role": "tool", "content": "ok"}, reply("HEARTBEAT_OK")]
    assert digest(silent) == digest([ASKED, reply("four")])
    seen = continuation([*silent, user("thanks")])
    assert seen.history == digest([ASKED, reply("four")])
    assert [message["content"] for message in seen.fresh] == ["thanks"]
    noticed = [ASKED, reply("four"), poll, reply("Your build is red!")]
    assert digest(noticed) != digest([ASKED, reply("four")]), "the user answers to it"


@pytest.mark.parametrize(
    ("messages", "tools", "marker"),
    [
        ([user("Generate a concise session title for: hi")], False, "title"),
        ([{"role": "system", "content": "You are a context summarization assistant."}, user("x")], False, "compaction"),
        ([ASKED, reply("four"), FLUSH], True, "memory flush"),
        ([ASKED, reply("four"), POLL], True, "heartbeat"),
        ([ASKED, reply("four"), HEARTBEAT, context()], True, "heartbeat"),
        ([ASKED, reply("four"), user("check the mail")], True, "heartbeat"),
        ([SUMMARY, reply("four"), user("check the mail")], True, "heartbeat"),
        ([user("[cron:123 daily] sum up"), CALL, {"role": "tool", "content": "4"}], True, "cron"),
        ([user("[Subagent Context] You are a subagent")], True, "subagent"),
        ([ASKED, reply("four"), user("A background task completed. Result: 4")], True, "subagent's completion"),
        ([user("hi\n\nRuntime: agent=main | session=agent:main:cron:7 | sessionId=c7 | x")], True, "cron"),
    ],
)
def test_side_requests_of_openclaw(messages, tools, marker):
    assert side_marker(messages, tools) == f"OpenClaw: {marker}"
    assert identify({}, {"messages": messages, "tools": [{}] if tools else []}).kind == "side"
    assert identify({"x-turn-type": "main"}, {"messages": messages}).kind == "main", "headers come first"


@pytest.mark.parametrize(
    "messages",
    [
        [ASKED],
        [ASKED, context()],
        [ASKED, CALL, {"role": "tool", "content": "4"}, context()],
        [user("what is a heartbeat? a cron job? a session title?")],
        [user("hi"), reply("hello"), user("how are you")],
        [ASKED, reply("four"), user("[Thu 2026-09-03 10:00 UTC] thanks")],
    ],
)
def test_turns_of_people_are_main(messages):
    assert side_marker(messages, True) is None
    assert identify({}, {"messages": messages}).kind == "main"


def test_what_cannot_be_told_is_side():
    for body in (
        {"messages": [user("hi"), reply("I think")]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [context()]},
        {"messages": [user("hi")], "n": 2},
    ):
        identity = identify({}, body)
        assert identity.kind == "side"
        assert identity.reason


def test_the_runtime_line_names_the_session():
    line = "Runtime: agent=main | session=agent:main:main | sessionId=7f3a-9 | host=x"
    assert session_marker([user(f"hi\n\n{line}"), reply("hello"), user("again")]) == "7f3a-9"
    assert session_marker([{"role": "system", "content": line}, user("hi")]) == "7f3a-9"
    assert session_marker([user("hi"), reply(line), user(line)]) is None, "only where OpenClaw puts it"


@pytest.mark.parametrize(
    ("headers", "body", "session", "by"),
    [
        ({"x-session-id": "a", "x-session-affinity": "b"}, {}, "a", "X-Session-Id"),
        ({"x-session-affinity": "b", "session_id": "c"}, {}, "b", "x-session-affinity"),
        ({"session_id": "c"}, {"prompt_cache_key": "d"}, "c", "session_id"),
        ({}, {"prompt_cache_key": "d"}, "d", "prompt_cache_key"),
        ({}, {}, None, ""),
    ],
)
def test_who_names_the_session(headers, body, session, by):
    identity = identify(headers, body)
    assert (identity.session, identity.named_by, identity.explicit) == (session, by, by == "X-Session-Id")


def test_a_trace_is_one_run():
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert identify({"traceparent": trace}, {}).run == "run-0af7651916cd43dd8448eb211c80319c"
    assert identify({"traceparent": "nonsense"}, {}).run is None


def test_positions_point_into_the_request():
    messages = [{"role": "system", "content": "x"}, context(), user("hi")]
    assert [each.position for each in said(messages)] == [2]
