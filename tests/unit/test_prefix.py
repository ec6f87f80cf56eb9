"""A session in the URL: what is read of a path, and what the gateway makes of it."""

import pytest
from echo_door import door

from clawrl.errors import GatewayError
from clawrl.serving.keys import add_key
from clawrl.serving.prefix import read_prefix

BODY = {"messages": [{"role": "user", "content": "hi"}]}


def test_a_path_names_session_source_group_and_kind():
    path, headers = read_prefix(b"/session/g-1/source/toolcall/group/g/turns/side/v1/chat/completions")
    assert path == "/v1/chat/completions"
    assert headers == [
        (b"x-session-id", b"g-1"), (b"x-source", b"toolcall"), (b"x-group", b"g"), (b"x-turn-type", b"side"),
    ]  # fmt: skip
    assert read_prefix(b"/session/a/v1/models") == ("/v1/models", [(b"x-session-id", b"a")])


HOSTILE = [
    ("/session/", 404),
    ("/session/a", 404),
    ("/session/a/status", 404),
    ("/session/a/admin/rollback", 404),
    ("/session/a/healthz/v1/models", 404),
    ("/session/a/session/b/v1/models", 404),
    ("/session/a/user/root/v1/models", 404),
    ("/session//v1/models", 400),
    ("/session/../v1/models", 400),
    ("/session/a%2fb/v1/models", 400),
    ("/session/%2e%2e/v1/models", 400),
    ("/session/a%0d%0aX-Train:no/v1/models", 400),
    ("/session/a%00/v1/models", 400),
    ("/session/%ff%fe/v1/models", 400),
    ("/session/" + "a" * 201 + "/v1/models", 400),
    ("/session/a/source/$(id)/v1/models", 400),
]


@pytest.mark.parametrize(("path", "status"), HOSTILE)
def test_any_other_path_is_refused(path, status):
    with pytest.raises(GatewayError) as caught:
        read_prefix(path.encode())
    assert caught.value.status == status


async def test_the_gateway_records_under_the_session_of_the_path_whatever_the_client_says(tmp_path):
    async with door(tmp_path) as house, house.client(X_Session_Id="mine", X_Group="other") as client:
        answer = await client.post("/session/e-1/source/toolcall/group/e/v1/chat/completions", json=BODY)
        assert answer.status_code == 200
        assert (await client.post("/v1/chat/completions", json=BODY)).status_code == 200
        rows = house.rows('SELECT session, source, "group", kind FROM turns')
        assert rows == [("e-1", "toolcall", "e", "main"), ("mine", "chat", "other", "main")]
        assert (await client.get("/session/e-1/v1/models")).json()["object"] == "list"


async def test_the_gateway_refuses_hostile_paths_in_openais_shape(tmp_path):
    async with door(tmp_path) as house, house.client() as client:
        for path, status in HOSTILE:
            if "/../" in path:  # which this client takes out by itself
                continue
            answer = await client.post(path, json=BODY)
            assert (path, answer.status_code) == (path, status)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        for path in (
            "/session/a/v1/../admin/rollback",
            "/session/a/v1/nothing",
            "/session/a/turns/both/v1/completions",
        ):
            assert 400 <= (await client.post(path, json={**BODY, "prompt": "x"})).status_code < 500
        assert house.rows("SELECT session FROM turns") == []


async def test_a_path_opens_no_door_that_was_closed(tmp_path):
    """Keys and loopback hold as without a prefix."""
    path = "/session/a/v1/chat/completions"
    async with door(tmp_path) as house:
        async with house.client(peer="192.0.2.1") as client:
            assert (await client.post(path, json=BODY)).status_code == 403
        add_key(tmp_path / "keys.json", "ann")
        async with house.client() as client:
            assert (await client.post(path, json=BODY)).status_code == 401
