"""Who continues whom, told from headers and content."""

import pytest

from clawrl.errors import GatewayError
from clawrl.serving.sessions import NAME_BYTES, continuation, digest, identify, request_digest

USER = {"role": "user", "content": "two plus two?"}
REPLY = {"role": "assistant", "content": "four"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "calc", "arguments": '{"a": 2, "b": 2}'}}],
}


def test_a_first_message_continues_nothing():
    seen = continuation([{"role": "system", "content": "be brief"}, USER])
    assert seen.history is None


def test_what_follows_the_last_reply_is_fresh():
    complaint = {"role": "user", "content": "no, five"}
    seen = continuation([USER, REPLY, complaint])
    assert seen.history == digest([USER, REPLY])
    assert seen.fresh == (complaint,)
    assert seen.role == "user"


def test_parallel_tool_results_are_one_next_state_of_role_tool():
    results = [{"role": "tool", "tool_call_id": str(i), "content": "4"} for i in range(2)]
    seen = continuation([USER, CALL, *results])
    assert seen.role == "tool"
    assert seen.fresh == tuple(results)


def test_a_user_message_after_a_tool_result_is_the_users():
    seen = continuation([USER, CALL, {"role": "tool", "content": "4"}, USER])
    assert seen.role == "user"


@pytest.mark.parametrize(
    "replayed",
    [
        [{"role": "system", "content": "a new system prompt"}, USER, REPLY],
        [{"role": "user", "content": [{"type": "text", "text": "two plus two?"}]}, REPLY],
        [USER, {**REPLY, "reasoning": "2 + 2"}],
        [USER, {"role": "assistant", "content": " four\n"}],
    ],
)
def test_a_digest_is_the_same_however_a_client_replays(replayed):
    assert digest(replayed) == digest([USER, REPLY])


def test_tool_calls_are_compared_by_value_not_by_id():
    function = {"name": "calc", "arguments": '{"b":2,"a":2}'}
    replayed = {"role": "assistant", "tool_calls": [{"id": "call1", "type": "function", "function": function}]}
    assert digest([USER, replayed]) == digest([USER, CALL])
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "calc", "arguments": '{"a": 3, "b": 2}'}}]}
    assert digest([USER, other]) != digest([USER, CALL])


def test_different_replies_differ():
    assert digest([USER, REPLY]) != digest([USER, {"role": "assistant", "content": "five"}])


def test_identity_from_headers_and_body():
    said = identify({"x-session-id": "s1", "x-turn-type": "side", "x-group": "g"}, {"user": "ada"})
    assert (said.user, said.session, said.kind, said.group, said.source) == ("ada", "s1", "side", "g", "chat")
    assert identify({}, {}).session is None


def test_an_unknown_turn_type_is_refused():
    with pytest.raises(GatewayError, match="X-Turn-Type: 'maine' is unknown; use main or side"):
        identify({"x-turn-type": "maine"}, {})


@pytest.mark.parametrize("user", ["a\x00b", "\ud83d", "Grüße \udc00"])
def test_a_user_that_cannot_be_stored_is_refused(user):
    with pytest.raises(GatewayError, match="NUL or half a surrogate pair") as caught:
        identify({}, {"user": user})
    assert (caught.value.status, caught.value.param) == (400, "user")
    assert str(caught.value).encode()
    assert identify({}, {"user": "Grüße \U0001f600"}).user == "Grüße \U0001f600"


def test_a_retry_says_so():
    assert not identify({}, {}).retried
    assert not identify({"x-stainless-retry-count": "0"}, {}).retried
    assert identify({"x-stainless-retry-count": "2"}, {}).retried


def test_an_idempotency_key_belongs_to_its_user():
    assert identify({}, {}).key is None
    mine, yours = (identify({"idempotency-key": "k"}, {"user": user}).key for user in ("ann", "bob"))
    assert mine != yours
    assert (
        identify({"idempotency-key": "c"}, {"user": "a:b"}).key
        != identify({"idempotency-key": "b:c"}, {"user": "a"}).key
    )


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "system", "content": "be brief"}, USER]},
        {"messages": [{"role": "user", "content": " two plus two?"}]},
        {"messages": [USER], "tools": [{"type": "function", "function": {"name": "calc"}}]},
        {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_a_request_is_the_same_if_all_of_its_prompt_is(other):
    assert request_digest(other) != request_digest({"messages": [USER]})
    assert request_digest({"messages": [dict(reversed(USER.items()))], "tools": [], "stream": True}) == request_digest(
        {"messages": [USER]}
    )


def test_half_a_surrogate_pair_has_a_digest():
    half = [{"role": "user", "content": "\ud83d"}]
    assert digest(half) != digest([{"role": "user", "content": "\ud83c"}])
    assert request_digest({"messages": half})


def test_a_long_key_fits_an_index_and_is_still_its_users():
    keys = [
        identify({"idempotency-key": "k" * 9000 + end}, {"user": user}).key
        for user, end in (("ann", "1"), ("ann", "2"), ("bob", "1"), ("ann", "1"))
    ]
    assert all(len(key or "") <= NAME_BYTES for key in keys)
    assert len(set(keys)) == 3
    assert keys[0] == keys[3]


@pytest.mark.parametrize(
    ("headers", "body", "named"),
    [({}, {"user": "ü" * 501}, "user has 1002 bytes"), ({"x-session-id": "s" * 1001}, {}, "X-Session-Id has 1001 b")],
)
def test_a_name_that_no_index_takes_is_refused(headers, body, named):
    with pytest.raises(GatewayError, match=f"{named}.*at most 1000"):
        identify(headers, body)
