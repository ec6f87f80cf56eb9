"""API keys: made, kept as hashes, found, revoked at once; and who is served without any."""

import json
import os
import stat

import pytest
from starlette.datastructures import Headers

from clawrl.cli import main
from clawrl.config import load_config
from clawrl.errors import ConfigError, GatewayError
from clawrl.main import check
from clawrl.serving.keys import KeyRing, add_key, admit, read_keys, require_keys_beyond_loopback, revoke_key

HERE = Headers({"host": "localhost"})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "keys.json"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_names_its_user_and_is_kept_nowhere(path):
    made, secret = add_key(path, "anna")
    add_key(path, "bob")
    assert KeyRing(path, {}).find(bearer(secret)) == made
    assert KeyRing(path, {}).find(f"bearer  {secret} ").user == "anna"
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("sent", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer wrong", "Bearer \udc80"])
def test_any_other_is_refused(path, sent):
    add_key(path, "anna")
    with pytest.raises(GatewayError, match="API key") as caught:
        KeyRing(path, {}).find(sent)
    assert caught.value.status == 401
    assert caught.value.body()["error"] == {
        "message": str(caught.value), "type": "authentication_error", "param": None, "code": "invalid_api_key",
    }  # fmt: skip


def test_what_is_kept_opens_nothing(path):
    made, _ = add_key(path, "anna")
    for sent in (made.sha256, made.id):
        with pytest.raises(GatewayError):
            KeyRing(path, {}).find(bearer(sent))


def test_a_running_server_hears_of_new_and_revoked_keys_at_once(path):
    ring = KeyRing(path, {})
    assert not ring.required
    made, secret = add_key(path, "anna")
    assert ring.required
    assert ring.find(bearer(secret)).user == "anna"
    revoke_key(path, made.id)
    with pytest.raises(GatewayError, match="revoked"):
        ring.find(bearer(secret))
    assert ring.required, "whoever revokes the last key does not open the door"


def test_keys_of_the_environment(path):
    ring = KeyRing(path, {"CLAWRL_API_KEYS": "anna=0123456789abcdef, bob=fedcba9876543210"})
    assert [ring.find(bearer(key)).user for key in ("0123456789abcdef", "fedcba9876543210")] == ["anna", "bob"]


@pytest.mark.parametrize("text", ["anna", "anna=short", "an/na=0123456789abcdef"])
def test_an_environment_that_cannot_be_read_is_an_error(path, text):
    with pytest.raises(ConfigError):
        KeyRing(path, {"CLAWRL_API_KEYS": text})


def test_a_broken_file_lets_nobody_in(path):
    ring = KeyRing(path, {})
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(ConfigError, match="mend it, or delete it"):
        admit(ring, False, "127.0.0.1", HERE)
    with pytest.raises(ConfigError, match="mend it"):
        add_key(path, "anna")


def test_without_keys_this_machine_alone_is_served(path):
    ring = KeyRing(path, {})
    assert admit(ring, False, "127.0.0.1", HERE) is None
    assert admit(ring, True, "10.0.0.7", Headers({"host": "x"})) is None
    for peer, headers in (
        ("10.0.0.7", HERE),
        ("127.0.0.1", Headers({"host": "evil.example"})),
        ("127.0.0.1", Headers({"host": "localhost", "x-forwarded-for": "10.0.0.7"})),
    ):
        with pytest.raises(GatewayError, match="this machine alone is served") as caught:
            admit(ring, False, peer, headers)
        assert caught.value.status == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org"])
def test_a_network_is_not_served_without_keys_unless_told_so(path, host):
    ring = KeyRing(path, {})
    with pytest.raises(ConfigError, match=r"gateway\.anyone=true"):
        require_keys_beyond_loopback(ring, host, anyone=False)
    require_keys_beyond_loopback(ring, host, anyone=True)
    require_keys_beyond_loopback(ring, "127.0.0.1", anyone=False)
    add_key(path, "anna")
    require_keys_beyond_loopback(ring, host, anyone=False)


def test_the_server_does_not_start_so(tmp_path):
    with pytest.raises(ConfigError, match=r"gateway.host=0.0.0.0 opens the port .* `clawrl keys add USER`"):
        check(load_config(None, [f"run_root={tmp_path}", "gateway.host=0.0.0.0", "gateway.port=30987"]))


def test_commands(tmp_path, capsys):
    root = ["--run-root", str(tmp_path)]
    assert main(["keys", "add", "anna", *root]) == 0
    secret = capsys.readouterr().out.strip()
    [kept] = read_keys(tmp_path / "keys.json")
    assert KeyRing(tmp_path / "keys.json", {}).find(bearer(secret)).user == "anna"
    assert main(["keys", "list", *root]) == 0
    shown = capsys.readouterr().out
    assert kept.id in shown
    assert "anna" in shown
    assert secret not in shown
    assert main(["keys", "revoke", kept.id, *root]) == 0
    assert read_keys(tmp_path / "keys.json")[0].revoked
    assert main(["keys", "revoke", "nothing", *root]) == 2
    assert main(["keys", "add", "an na", *root]) == 2


def test_a_reader_never_sees_half_a_file(path):
    for user in ("anna", "bob", "carla"):
        add_key(path, user)
        assert json.loads(path.read_text())["keys"][-1]["user"] == user
    assert sorted(os.listdir(path.parent)) == ["keys.json", "keys.lock"]
