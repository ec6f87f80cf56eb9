"""What `clawrl versions` and its family ask for and show, against an HTTP server that answers like a gateway."""

import http.server
import json
import threading
from typing import Any

import pytest

from clawrl.cli import main

ENTRY = {
    "number": 3, "parent": 2, "scope": "", "state": "serving", "at": 1.7e9, "samples": 32,
    "metrics": {"loss": 0.123456, "kl": 0.02},
    "pinned": True, "on_disk": True, "reason": "canary error 1e-05 [ok]", "decision": None,
}  # fmt: skip
DECISION = {"version": 4, "stage": "before", "passed": False, "reason": "replies got worse", "checks": [], "at": 1.0}
REJECTED = ENTRY | {"number": 4, "parent": 3, "scope": "ann", "state": "rejected", "pinned": False, "on_disk": False}
TAKEN_BACK = ENTRY | {"number": 2, "decision": DECISION | {"stage": "after", "reason": "mean score fell"}}
REJECTED |= {"metrics": {"loss": 0.2, "new": 1.0}, "reason": "gate", "decision": DECISION}
ANSWERS: dict[str, Any] = {
    "versions": [TAKEN_BACK, ENTRY, REJECTED],
    "rollback": {"serving": 3, "rejected": [4, 5], "next": 6},
    "pin": {"number": 3, "pinned": True},
    "diff": {
        "versions": [ENTRY, REJECTED],
        "between": [4],
        "users": {"ann": 20, "(erased)": 5},
        "turns": [{"turn": f"chatcmpl-{i}", "user": "ann", "session": "s", "version": 4} for i in range(25)],
    },
    "export": {"number": 3, "folder": "/tmp/three"},
}


@pytest.fixture(scope="module")
def system():
    """(url, what was asked): answers every act as ANSWERS has it."""
    asked: list[tuple[str, dict[str, Any]]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            name = self.path.removeprefix("/admin/")
            asked.append((name, json.loads(self.rfile.read(int(self.headers["content-length"])))))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(ANSWERS[name]).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("words", "asked", "shown"),
    [
        (["versions"], {"last": 20}, ["serving", "0.1235", "pinned", "1e-05 [ok]", "gate; gate: replies got worse"]),
        (["versions"], {"last": 20}, ["; watch: mean score fell"]),
        (["versions", "--last", "2"], {"last": 2}, ["rejected", "everyone", "ann"]),
        (
            ["rollback"],
            {"number": None, "reason": None, "user": None},
            ["3 serves; rejected: 4 5; the next version will be 6"],
        ),
        (
            ["rollback", "3", "--reason", "rude", "--user", "ann"],
            {"number": 3, "reason": "rude", "user": "ann"},
            ["version 3"],
        ),
        (["pin", "3"], {"number": 3, "pinned": True}, ["version 3 is pinned"]),
        (["pin", "3", "--remove"], {"number": 3, "pinned": False}, ["version 3"]),
        (["diff", "3", "4"], {"one": 3, "other": 4}, ["new", "ann 20, (erased) 5", "chatcmpl-19", "5 more turns"]),
        (["export", "3", "/tmp/three"], {"number": 3, "folder": "/tmp/three"}, ["version 3 is in /tmp/three"]),
    ],
)
def test_each_command_asks_and_shows(system, capsys, monkeypatch, words, asked, shown):
    monkeypatch.setenv("COLUMNS", "200")
    url, seen = system
    assert main([*words, "--url", url]) == 0
    assert seen[-1] == (words[0], asked)
    out = capsys.readouterr().out
    for part in shown:
        assert part in out


@pytest.mark.parametrize("words", [["versions"], ["diff", "3", "4"]])
def test_answers_as_json(system, capsys, words):
    assert main([*words, "--json", "--url", system[0]]) == 0
    assert json.loads(capsys.readouterr().out) == ANSWERS[words[0]]


def test_a_relative_export_folder_is_the_callers(system, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "3", "here", "--url", system[0]]) == 0
    assert system[1][-1][1]["folder"] == str(tmp_path / "here")


def test_nobody_there_is_one_line(capsys):
    assert main(["rollback", "--url", "http://127.0.0.1:9"]) == 1
    assert "start one with" in capsys.readouterr().err
