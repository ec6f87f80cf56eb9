"""Fault injection's own bookkeeping: what counts as acknowledged, what counts as lost or trained twice."""

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from clawrl.journal.store import JournalStore
from clawrl.serving.listener import Listener
from clawrl.testing import ScriptedPolicy
from clawrl.types import VersionEvent, WeightVersion
from jobs.chaos import load as load_module
from jobs.chaos.__main__ import Outcome
from jobs.chaos.audit import audit
from jobs.chaos.load import Load
from jobs.chaos.target import free_port

WHOLE = 'data: {"id": "t1", "choices": [{"delta": {"content": "7"}}]}\n\ndata: [DONE]\n\n'
CUT = 'data: {"id": "t2", "choices": [{"delta": {"content": "7"}}]}\n\n'
ERROR = CUT + 'data: {"error": {"message": "the reply broke off"}}\n\n'


@pytest.mark.parametrize(
    ("reply", "acknowledged", "error"),
    [(WHOLE, ["t1"], None), (CUT, [], "without [DONE]"), (ERROR, [], "broke off"), (None, [], "HTTP 503: ")],
)
async def test_only_a_whole_stream_is_acknowledged(reply, acknowledged, error, monkeypatch):
    monkeypatch.setattr(load_module, "THINKING_S", 5.0)

    async def answer(request):
        if reply is None:
            return JSONResponse({"error": {}}, status_code=503)
        return StreamingResponse(iter([reply]), media_type="text/event-stream")

    port = free_port()
    listener = Listener(Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])]), "127.0.0.1", port)
    async with Load(f"http://127.0.0.1:{port}/v1", users=1) as load:
        while not load.requests:  # noqa: ASYNC110 (the load is a plain list)
            await asyncio.sleep(0.01)
    await listener.close()
    assert load.acknowledged[:1] == acknowledged
    assert (load.requests[0].error or "").find(error or "") >= 0
    assert (load.requests[0].error is None) == (error is None)


def test_the_audit_finds_what_was_lost_and_what_was_trained_twice(tmp_path):
    path = tmp_path / "journal.sqlite"
    turn = ScriptedPolicy(seed=0).turn([{"role": "user", "content": "hello"}], num_tokens=3)
    with closing(JournalStore(f"sqlite:///{path}")) as store:
        store.append(replace(turn, id="kept"))
        for number, samples in ((1, ("a", "b")), (2, ("c",))):
            version = WeightVersion(number, number - 1, "full", None, samples, {}, 1.0)
            store.record_version(version, VersionEvent(number, "candidate", "", 1.0))
    clean = audit(f"sqlite:///{path}", ["kept"])
    assert (clean.acknowledged_lost, clean.trained_twice, clean.consumed_by_none, clean.versions) == (0, 0, 0, 2)
    assert audit(f"sqlite:///{path}", ["kept", "gone"]).acknowledged_lost == 1
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("""UPDATE versions SET samples = '["a"]' WHERE number = 2""")
    broken = audit(f"sqlite:///{path}", [])
    assert broken.trained_twice == 1
    assert broken.consumed_by_none > 0


@pytest.mark.parametrize(
    ("changed", "held"),
    [({}, True), ({"failed_later": 1}, False), ({"failed_later": 1, "survivor": False}, True),
     ({"loop_back_s": None}, False), ({"chat_back_s": None}, False), ({"failed_in_flight": 9}, True)],
)  # fmt: skip
def test_what_a_fault_may_cost(changed, held):
    fine = Outcome("x", 1.0, 2.0, 10, 0, 0, True, 3, 4)
    assert replace(fine, **changed).held is held
