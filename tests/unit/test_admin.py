"""Who may act on a running system, and what the command line makes of its answers."""

import http.server
import json
import threading

import pytest
from starlette.datastructures import Headers

from clawrl.commands import client
from clawrl.errors import ClawrlError, GatewayError
from clawrl.serving.admin import require_local


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_may(host):
    require_local(host)


@pytest.mark.parametrize("host", ["10.0.0.7", "8.8.8.8", "0.0.0.0", "::", "::ffff:10.0.0.7", "localhost", "", None])
def test_others_may_not(host):
    with pytest.raises(GatewayError, match="this machine only") as caught:
        require_local(host)
    assert caught.value.status == 403
    assert caught.value.body()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:30000", "127.0.0.1", "127.0.0.1:30000", "[::1]", "[::1]:30000"]
)
def test_this_machine_is_asked_by_its_name(host):
    require_local("127.0.0.1", Headers({"Host": host}))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:30000", "localhost.evil.example", "10.0.0.7", "", "[", "::1"]
)
def test_a_page_whose_name_points_here_may_not(host):
    with pytest.raises(GatewayError, match="this machine only") as caught:
        require_local("127.0.0.1", Headers({"Host": host}))
    assert caught.value.status == 403


def test_a_request_without_a_host_may_not():
    with pytest.raises(GatewayError, match="this machine only"):
        require_local("127.0.0.1", Headers({}))


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Real-IP", "Via"])
def test_who_asks_through_a_proxy_of_this_machine_may_not(header):
    with pytest.raises(GatewayError, match="through a proxy") as caught:
        require_local("127.0.0.1", Headers({"Host": "localhost", header: "127.0.0.1"}))
    assert caught.value.status == 403


@pytest.fixture
def answer():
    """An HTTP server on loopback; `answer(status, body)` says what it answers and gives its address."""
    told: dict = {"asked": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            told["asked"].append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(told["status"])
            self.end_headers()
            self.wfile.write(told["body"])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def say(status: int, body: bytes) -> tuple[str, list]:
        told.update(status=status, body=body)
        return f"http://127.0.0.1:{server.server_port}", told["asked"]

    yield say
    server.shutdown()
    server.server_close()


def test_an_act_travels_as_keyword_arguments(answer):
    url, asked = answer(200, b'{"serving": 3}')
    assert client.post(url, "rollback", number=3) == {"serving": 3}
    assert asked == [("/admin/rollback", {"number": 3})]


def test_a_refusal_keeps_its_message(answer):
    url, _ = answer(400, json.dumps(GatewayError("version 9 does not exist").body()).encode())
    with pytest.raises(ClawrlError, match=r"^version 9 does not exist$"):
        client.post(url, "rollback", number=9)


@pytest.mark.parametrize("body", [b"<html>", b'{"detail": "Not Found"}', b"[]"])
def test_another_program_is_not_taken_for_clawrl(answer, body):
    url, _ = answer(404, body)
    with pytest.raises(ClawrlError, match=r"no clawrl answers at .* start one with `clawrl serve`"):
        client.post(url, "rollback")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[", "http://127.0.0.1:x"])
def test_nobody_there(url):
    for ask in (lambda: client.get(url, "/status"), lambda: client.post(url, "rollback")):
        with pytest.raises(ClawrlError, match="or give --url"):
            ask()
