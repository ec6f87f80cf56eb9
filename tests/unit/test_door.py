"""Who gets in: keys, users and sessions at a real gateway over a real journal; the policy echoes."""

import pytest
from echo_door import Door, door

from clawrl.serving.keys import add_key, revoke_key

HI = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


async def ask(clawrl: Door, body: dict = HI, *, key: str | None = None, peer: str = "127.0.0.1", **headers: str):
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    async with clawrl.client(0, peer, **headers) as client:
        return await client.post(CHAT, json=body)


async def test_a_key_says_whose_words_they_are(tmp_path):
    async with door(tmp_path) as clawrl:
        made, secret = add_key(tmp_path / "keys.json", "anna")
        answers = [
            await ask(clawrl, key=secret, peer="10.0.0.7"),
            await ask(clawrl, {**HI, "user": "bob"}, key=secret),
            await ask(clawrl),
            await ask(clawrl, key="wrong"),
        ]
        assert [answer.status_code for answer in answers] == [200, 200, 401, 401]
        assert answers[2].headers["www-authenticate"] == "Bearer"
        assert set(answers[3].json()["error"]) == {"message", "type", "param", "code"}
        assert set(clawrl.rows("SELECT user FROM turns")) == {("anna",)}
        revoke_key(tmp_path / "keys.json", made.id)
        assert (await ask(clawrl, key=secret)).status_code == 401
        async with clawrl.client() as client:
            assert (await client.get("/v1/models")).status_code == 401
            assert (await client.get("/healthz")).status_code == 200


async def test_without_keys_others_are_refused(tmp_path):
    async with door(tmp_path) as clawrl:
        assert (await ask(clawrl, peer="10.0.0.7")).status_code == 403
        assert (await ask(clawrl, x_forwarded_for="10.0.0.7")).status_code == 403
        assert (await ask(clawrl, {**HI, "user": "bob"})).status_code == 200
        assert clawrl.rows("SELECT user FROM turns") == [("bob",)]
        async with clawrl.client(peer="10.0.0.7") as client:
            assert (await client.get("/status")).status_code == 403


async def test_whoever_was_told_to_serve_anyone_does(tmp_path):
    async with door(tmp_path, gateway={"anyone": True}) as clawrl:
        assert (await ask(clawrl, peer="10.0.0.7")).status_code == 200


@pytest.mark.parametrize("replicas", [1, 2])
async def test_another_users_session_is_not_there(tmp_path, replicas):
    async with door(tmp_path, replicas) as clawrl:
        annas, bobs = (add_key(tmp_path / "keys.json", user)[1] for user in ("anna", "bob"))
        assert (await ask(clawrl, key=annas, x_session_id="s")).status_code == 200
        assert (await ask(clawrl, key=annas, x_session_id="s")).status_code == 200
        refused = await ask(clawrl, key=bobs, x_session_id="s")
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "session_not_found")
        assert (await ask(clawrl, key=bobs, x_session_id="t")).status_code == 200
        assert clawrl.rows("SELECT user, session FROM turns") == [("anna", "s"), ("anna", "s"), ("bob", "t")]


async def test_one_keys_users_do_not_go_on_with_each_others_words(tmp_path):
    """Both say the same and get the same reply; what follows is whose it is."""
    async with door(tmp_path) as clawrl:
        _, secret = add_key(tmp_path / "keys.json", "team")
        talks = {who: [{"role": "user", "content": "hi"}] for who in ("ann", "bob")}
        for follow in ("thanks", "no"):
            for who, messages in talks.items():
                answer = (await ask(clawrl, {"messages": messages, "user": who}, key=secret)).json()
                reply = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
                messages += [reply, {"role": "user", "content": f"{who} says {follow}"}]
        rows = clawrl.rows("SELECT session, parent FROM turns")
        assert len({session for session, _ in rows}) == 2
        assert rows[2][0] == rows[0][0]
        assert rows[3][0] == rows[1][0]
