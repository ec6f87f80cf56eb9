"""As Ray's users expect: `ray start`, `ray job submit`, readable names, metrics, and the cluster outlives the job."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from jobs import free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

REPOSITORY = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
NAMES = {"clawrl-journal", "clawrl-weights", "clawrl-buffer", "clawrl-collector"}


class Head:
    """A Ray head node of this test's own, in a temporary folder, and the address of its job server."""

    def __init__(self, folder: Path) -> None:
        self.port, self.dashboard, self.metrics, self.agent = (free_port() for _ in range(4))
        self.environment = {
            **os.environ,
            "RAY_ADDRESS": f"127.0.0.1:{self.port}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_AUTH_MODE": "disabled",  # whether this machine has a token yet must not matter here
        }
        self.temporary = folder

    def ray(self, *arguments: str, timeout_s: float = 120) -> str:
        environment = dict(self.environment)
        if arguments[0] == "start":
            environment.pop("RAY_ADDRESS")
        done = subprocess.run(
            [*RAY, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s, cwd=REPOSITORY
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def python(self, code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    head = Head(tmp_path_factory.mktemp("ray"))
    head.ray(
        "start", "--head", f"--port={head.port}", f"--dashboard-port={head.dashboard}", "--num-cpus=2",
        f"--metrics-export-port={head.metrics}", f"--dashboard-agent-listen-port={head.agent}", "--disable-usage-stats",
    )  # fmt: skip
    try:
        yield head
    finally:
        _end_session(head.port)


def _end_session(port: int) -> None:
    """End the processes of this Ray session alone; `ray stop` would end every cluster of the machine."""
    import psutil

    (gcs,) = [line for line in map(_command, psutil.process_iter()) if f"--gcs_server_port={port}" in line]
    (session,) = set(re.findall(r"session_[\d_-]+", " ".join(gcs)))
    mine = [process for process in psutil.process_iter() if session in " ".join(_command(process))]
    for process in mine:
        process.terminate()
    _, alive = psutil.wait_procs(mine, timeout=10)
    for process in alive:
        process.kill()


def _command(process) -> list[str]:
    import psutil

    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_pools_of_environments_train_as_a_ray_job(head: Head, tmp_path: Path):
    port = free_port()
    submitted = _when_the_agent_is_up(
        head, "job", "submit", "--no-wait", "--working-dir", ".", "--",
        sys.executable, "-m", "jobs.train", "--config", "configs/toolcall.toml", "--versions", "1", "--tasks", "4",
        f"gateway.port={port}", f"run_root={tmp_path}", "buffer.batch_size=16",
    )  # fmt: skip
    job = re.findall(r"raysubmit_\w+", submitted)[0]
    url = f"http://127.0.0.1:{port}"
    _wait_until_healthy(head, url, job)

    reply = httpx.post(
        f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "2 + 3?"}]}, timeout=60
    )
    assert reply.status_code == 200, reply.text
    alive = _alive_actors(head)
    for deployment in ("gateway", "policy", "judge"):
        assert any(f"clawrl:{deployment}" in kind for _, kind in alive), alive
    assert not _missing_metrics(head, "gateway_requests_num", "versions_latest_num", "buffer_size_num")

    deadline = time.monotonic() + 600
    while "succeeded" not in (status := head.ray("job", "status", job)):
        assert "failed" not in status, head.ray("job", "logs", job)[-4000:]
        assert time.monotonic() < deadline, head.ray("job", "logs", job)[-4000:]
        time.sleep(2)
    report = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert report["versions"] >= 1
    assert report["samples"] >= 16
    (pool,) = report["pools"]
    assert (pool["before"]["attempts"], pool["before"]["failed"]) == (4, 0)
    assert (tmp_path / "latest" / "learning_curve.png").stat().st_size > 1000
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{url}/healthz", timeout=5).raise_for_status()
    assert "Active" in head.ray("status"), "the cluster is not ours to stop"


def _alive_actors(head: Head) -> set[tuple[str, str]]:
    """(name, class) of every living actor, once ours are all there: the gateway answers before the collector is up."""
    deadline = time.monotonic() + 180
    alive: set[tuple[str, str]] = set()
    while time.monotonic() < deadline and not {name for name, _ in alive} >= NAMES:
        listed = head.python(
            "import ray, json; ray.init(logging_level=40); from ray.util.state import list_actors;"
            "print(json.dumps([[a.name, a.class_name, a.state] for a in list_actors(limit=500)]))"
        )
        alive = {(name, kind) for name, kind, state in json.loads(listed.splitlines()[-1]) if state == "ALIVE"}
    assert {name for name, _ in alive} >= NAMES
    return alive


def _when_the_agent_is_up(head: Head, *arguments: str) -> str:
    """`ray start` returns some seconds before the node's job agent has registered."""
    deadline = time.monotonic() + 180
    while True:
        try:
            return head.ray(*arguments)
        except AssertionError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(2)


def _missing_metrics(head: Head, *names: str) -> set[str]:
    """Those that Prometheus would not read, after Ray's agent has had a minute to collect what each process reports."""
    deadline = time.monotonic() + 180
    missing = set(names)
    while missing and time.monotonic() < deadline:
        time.sleep(2)
        exported = httpx.get(f"http://127.0.0.1:{head.metrics}/metrics", timeout=10).text
        missing -= {name for name in missing if f"clawrl_{name}" in exported}
    return missing


def _wait_until_healthy(head: Head, url: str, job: str) -> None:
    deadline = time.monotonic() + 480
    while True:
        try:
            if httpx.get(f"{url}/healthz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline:
            pytest.fail(f"not up:\n{head.ray('job', 'logs', job)[-4000:]}")
        time.sleep(2)
