"""Fault injection's own bookkeeping: what counts as acknowledged, what counts as lost or trained twice."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import pytest
from lacking import lacking
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from clawrl.errors import JournalError
from clawrl.journal.store import JournalStore
from clawrl.serving.listener import Listener
from clawrl.testing import ScriptedPolicy
from clawrl.types import VersionEvent, WeightVersion
from jobs import free_port
from jobs.chaos import load as load_module
from jobs.chaos.__main__ import Outcome, journals, main, possible
from jobs.chaos.audit import audit, newest_ahead
from jobs.chaos.clock import Clock, wait_until_seen
from jobs.chaos.faults import FAULTS
from jobs.chaos.load import Load

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
    assert clean.clean
    assert audit(f"sqlite:///{path}", ["kept", "gone"]).acknowledged_lost == 1
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("""UPDATE versions SET samples = '["a"]' WHERE number = 2""")
    broken = audit(f"sqlite:///{path}", [])
    assert (broken.trained_twice, broken.consumed_by_none, broken.clean) == (1, 1, False)
    assert len(broken.contradictions) == 2


@pytest.mark.parametrize(
    ("changed", "held"),
    [({}, True), ({"failed_later": 1}, False), ({"failed_later": 1, "survivor": False}, True),
     ({"loop_back_s": None}, False), ({"chat_back_s": None}, False), ({"failed_in_flight": 9}, True)],
)  # fmt: skip
def test_what_a_fault_may_cost(changed, held):
    fine = Outcome("x", 1.0, 2.0, 10, 0, 0, True, 3, 4)
    assert replace(fine, **changed).held is held


def test_a_named_database_is_left_as_it_was(postgres):
    with journals(postgres.fresh()) as database:
        assert database is not None
        urls = [database.fresh(), database.fresh()]
        for url in urls:
            JournalStore(url).close()  # two empty ones
        assert len(set(urls)) == 2
    for url in urls:
        with pytest.raises(JournalError):
            JournalStore(url)


def test_each_journal_has_the_faults_that_can_be_done_to_it(postgres, capsys):
    everything = list(FAULTS.values())
    with journals("sqlite") as files, journals(postgres.fresh()) as named:
        left = {where: set(FAULTS) - {fault.name for fault in possible(everything, database)}
                for where, database in (("files", files), ("private", postgres), ("named", named))}  # fmt: skip
    assert left["files"] == {"database restart"}
    assert left["private"] == {"torn last page", "disk full"}
    assert left["named"] == left["files"] | left["private"]
    assert "'disk full' is left out, it needs --journal sqlite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "told"),
    [("sqlite:////somewhere/journal.sqlite", "say sqlite"), ("mysql://h/d", "cannot hold a journal"),
     ("postgresql://u@127.0.0.1:1/d", "start PostgreSQL")],
)  # fmt: skip
def test_a_journal_that_cannot_be_used_is_told(where, told, capsys, tmp_path):
    assert main(["--journal", where, "--folder", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_a_clock_of_its_own_jumps_for_a_process_that_runs(tmp_path):
    try:
        clock = Clock(tmp_path)
    except FileNotFoundError as missing:
        lacking(missing)
    watch = "import time\nwhile True: input(); print(time.time(), time.monotonic(), flush=True)"
    environment = {**os.environ, **clock.environment}
    with subprocess.Popen([sys.executable, "-c", watch], env=environment, stdin=-1, stdout=-1, text=True) as process:

        def seen() -> tuple[float, float]:
            assert process.stdin
            assert process.stdout
            print(file=process.stdin, flush=True)
            wall, monotonic = map(float, process.stdout.readline().split())
            return wall - time.time(), monotonic - time.monotonic()

        try:
            assert abs(seen()[0]) < 1
            for hours in (1, -1):
                clock.set(3600 * hours)
                wait_until_seen(lambda: seen()[0], 3600 * hours)
                assert abs(seen()[1]) < 1  # only the wall clock jumps
        finally:
            process.kill()


def test_how_far_a_journals_clock_is_ahead(tmp_path):
    url = f"sqlite:///{tmp_path / 'journal.sqlite'}"
    turn = ScriptedPolicy(seed=0).turn([{"role": "user", "content": "hello"}], num_tokens=3)
    with closing(JournalStore(url)) as store:
        assert newest_ahead(url) is None
        store.append(replace(turn, id="now", ended=time.time()), replace(turn, id="later", ended=time.time() + 3600))
        assert newest_ahead(url) == pytest.approx(3600, abs=5)
