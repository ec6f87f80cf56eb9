"""A model elsewhere: what is insisted on, what is refused, and that nobody ever reads the key."""

from __future__ import annotations

import http.server
import json
import logging
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from clawrl.config import EndpointSection, JudgeSection, load_config, load_heuristics
from clawrl.errors import ConfigError, JudgeError
from clawrl.serving import endpoint
from clawrl.serving.endpoint import Endpoint, RefusedError, key_of
from clawrl.serving.judge import OutsideJudge
from clawrl.testing import ScriptedPolicy, next_state

KEY = "sk-very-secret-word"


class Elsewhere:
    """An HTTP server that gives one scripted answer after the other, the last one for ever."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, dict[str, str], Any]] = []
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        elsewhere = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                elsewhere.asked.append((self.path, self.headers.get("Authorization"), body))
                answers = elsewhere.answers
                status, headers, said = answers.pop(0) if len(answers) > 1 else answers[0]
                if callable(said):
                    said = said(body)
                content = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def settings(self, **more: Any) -> EndpointSection:
        return EndpointSection(url=self.url, served_name="big", **more)


@pytest.fixture
def elsewhere(monkeypatch) -> Iterator[Elsewhere]:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)
    server = Elsewhere()
    yield server
    server.server.shutdown()
    server.server.server_close()


def says(text: str) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}}]}


async def test_what_passes_by_itself_is_asked_again(elsewhere):
    busy = (429, {"Retry-After": "0.05"}, {"error": "slow down"})
    elsewhere.answers = [busy, (503, {}, "starting"), (200, {}, {"fine": True})]
    started = time.monotonic()
    assert await Endpoint(elsewhere.settings(), 10).post(f"{elsewhere.url}/x", {}) == {"fine": True}
    assert time.monotonic() - started > 0.05
    assert len(elsewhere.asked) == 3


async def test_a_refusal_is_not_asked_again(elsewhere):
    elsewhere.answers = [(400, {}, {"error": "context length exceeded"})]
    with pytest.raises(RefusedError, match=r"HTTP 400.*context length"):
        await Endpoint(elsewhere.settings(), 10).post(f"{elsewhere.url}/x", {})
    elsewhere.answers = [(200, {}, "<html>")]
    with pytest.raises(RefusedError, match="no JSON object"):
        await Endpoint(elsewhere.settings(), 10).post(f"{elsewhere.url}/x", {})
    assert len(elsewhere.asked) == 2


async def test_insisting_ends_in_time_and_tells_why(elsewhere):
    elsewhere.answers = [(429, {}, "busy")]
    started = time.monotonic()
    with pytest.raises(JudgeError, match=r"within 1 s \(HTTP 429: busy\)") as caught:
        await Endpoint(elsewhere.settings(), 1).post(f"{elsewhere.url}/x", {})
    assert time.monotonic() - started < 10
    assert not isinstance(caught.value, RefusedError)
    assert len(elsewhere.asked) > 2
    elsewhere.answers = [(200, {}, lambda _: time.sleep(3) or {})]
    with pytest.raises(JudgeError, match=r"within 0\.2 s \(no answer\)"):
        await Endpoint(elsewhere.settings(), 0.2).post(f"{elsewhere.url}/x", {})


async def test_a_server_that_is_not_there_is_waited_for_in_vain():
    with closing(socket.socket()) as bound:  # and not listening
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        with pytest.raises(JudgeError, match="ConnectError"):
            await Endpoint(EndpointSection(url=url, served_name="big"), 1).post(f"{url}/x", {})


async def test_the_key_goes_to_the_server_and_nowhere_else(elsewhere, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    settings = elsewhere.settings(key_env="JUDGE_KEY")
    elsewhere.answers = [(500, {}, f"bad key {KEY}"), (401, {}, f"wrong key {KEY}")]
    with pytest.raises(RefusedError, match=r"wrong key \[key\]") as caught:
        await Endpoint(settings, 10).post(f"{elsewhere.url}/x", {})
    assert {authorization for _, authorization, _ in elsewhere.asked} == {f"Bearer {KEY}"}
    told = (caplog.text, str(caught.value), settings.model_dump_json(), repr(settings), repr(pickle.dumps(settings)))
    assert not any(KEY in text for text in told)


def test_a_named_key_must_be_there(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    settings = EndpointSection(url="http://there/v1", served_name="big", key_env="JUDGE_KEY")
    with pytest.raises(ConfigError, match=r"JUDGE_KEY.* is not set"):
        key_of(settings)
    assert key_of(EndpointSection(url="http://there/v1", served_name="big")) is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["judge.url=there/v1"], "http://HOST:PORT/v1"),
        (["judge.url=http://me:secret@there/v1", "judge.served_name=big"], "without a password"),
        (["judge.url=http://there/v1"], "needs served_name"),
        (["judge.key_env=KEY"], "belong to a url"),
        (["judge.url=http://there/v1", "judge.served_name=big", "judge.model=/a/b"], "judge.url lets another one"),
    ],
)
def test_half_an_endpoint_is_refused(words, told):
    with pytest.raises(ConfigError) as caught:
        load_config(None, words)
    assert told in str(caught.value)


def test_an_engine_remains_where_the_initial_weights_score():
    there = ["judge.url=http://there/v1/", "judge.served_name=big"]
    assert load_config(None, there).judge.url == "http://there/v1"
    assert load_config(None, there).initial_weights_score
    alone = ["learning.teacher=current", "learning.kl_weight=0"]
    assert not load_config(None, [*there, *alone]).initial_weights_score
    assert load_config(None, [*there, "learning.method=rl", "learning.kl_weight=0"]).initial_weights_score is False


def outside(elsewhere: Elsewhere, **more: Any) -> JudgeSection:
    return JudgeSection.model_validate(
        {"url": elsewhere.url, "served_name": "big", "prompts": "full", "votes": 3, "timeout_s": 5.0, **more}
    )


async def test_the_same_questions_are_asked_elsewhere_and_read_alike(elsewhere):
    turn = ScriptedPolicy().turn([{"role": "user", "content": "How many pens?"}])
    hint = "It asks for more. \\boxed{1}\n[HINT_START]Be brief.[HINT_END]"
    elsewhere.answers = [
        (200, {}, lambda body: says(hint if "HINT" in body["messages"][1]["content"] else "Bad. \\boxed{-1}"))
    ]
    judgement = await (await made(outside(elsewhere))).judge(turn, next_state(turn, "Shorter!"))
    assert (judgement.votes, judgement.score, judgement.hints) == ((-1, -1, -1), -1, ("Be brief.",))
    assert len(elsewhere.asked) == 6
    path, _, body = elsewhere.asked[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("big", 0.6, 128)
    assert "How many pens?" in body["messages"][1]["content"]
    step = await (await made(outside(elsewhere))).judge_step(turn, next_state(turn, "Shorter!"))
    assert (step.score, step.hints) == (-1, ())


async def test_what_can_be_read_off_is_not_asked(elsewhere):
    turn = ScriptedPolicy().turn([{"role": "user", "content": "How many pens?"}])
    elsewhere.answers = [(200, {}, lambda body: says("Fine. \\boxed{1}"))]
    judge = await made(outside(elsewhere, heuristics="default"))
    judgement = await judge.judge(turn, next_state(turn, "That's wrong!"))
    assert (judgement.votes, judgement.score) == ((-1,), -1)
    assert all("HINT" in body["messages"][1]["content"] for _, _, body in elsewhere.asked), "for hints alone"
    assert (await judge.judge(turn, next_state(turn, "And how many ink pots?"))).votes == (1, 1, 1)
    broken = await made(outside(elsewhere, heuristics="builtins:id"))
    with pytest.raises(JudgeError, match=r"judge\.heuristics='builtins:id'"):
        await broken.judge(turn, next_state(turn, "Shorter!"))


def test_heuristics_that_are_not_there_are_refused_at_the_start():
    with pytest.raises(ConfigError, match=r"judge\.heuristics='nowhere:rule' cannot be imported"):
        load_heuristics(JudgeSection(heuristics="nowhere:rule"))


async def test_a_judge_that_is_refused_abstains_and_one_that_is_late_raises(elsewhere):
    turn = ScriptedPolicy().turn([{"role": "user", "content": "How many pens?"}])
    elsewhere.answers = [(404, {}, {"error": "no model big"})]
    judgement = await (await made(outside(elsewhere))).judge(turn, next_state(turn, "Shorter!"))
    assert (judgement.score, judgement.votes) == (None, ())
    assert "no model big" in str(judgement.error)
    elsewhere.answers = [(200, {}, {"choices": []})]
    judgement = await (await made(outside(elsewhere))).judge(turn, next_state(turn, "Shorter!"))
    assert "no chat completion; check judge.url" in str(judgement.error)
    elsewhere.answers = [(503, {}, "down")]
    with pytest.raises(JudgeError, match="HTTP 503"):  # the collector asks again until judge.timeout_s is over
        await (await made(outside(elsewhere, timeout_s=1.0))).judge(turn, next_state(turn, "Shorter!"))


async def made(settings: JudgeSection) -> OutsideJudge:
    judge = OutsideJudge.__new__(OutsideJudge)
    await judge.__init__(settings, hints=True)  # an actor's constructor may be a coroutine
    return judge
