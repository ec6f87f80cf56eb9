"""A real clawrl as a separate program, started with `clawrl serve`, seen through HTTP and its run directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from clawrl.journal.store import JournalReader
from jobs import free_port

ON_CPU = [
    *("policy.model=clawrl:tiny", "policy.dtype=float32", "policy.gpus_per_replica=0", "policy.enforce_eager=true"),
    *("policy.max_model_len=2048", "policy.max_reply_tokens=512", "policy.temperature=1.0", "policy.replicas=1"),
    *("policy.reasoning_parser=null", "policy.tool_parser=hermes"),
    *("judge.gpus_per_replica=0", "judge.dtype=float32", "judge.prompts=tiny", "judge.max_verdict_tokens=128"),
    *("trainer.workers=2", "trainer.gpus_per_worker=0", "trainer.dtype=float32", "trainer.learning_rate=3e-3"),
    *("trainer.pack_tokens=4096", "buffer.batch_size=32", "versions.canary_tolerance=0.02"),
]
"""What makes a configuration for GPUs one for this machine and the built-in model; all else is as the file has it."""

READY_S = 240.0
STOP_S = 15.0


@dataclass(frozen=True)
class Server:
    """A running clawrl, seen from outside: its address, its run directory, its journal file."""

    url: str
    run_root: Path
    process: subprocess.Popen

    @property
    def run_directory(self) -> Path:
        return (self.run_root / "latest").resolve()

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/status", timeout=30).raise_for_status().json()

    def journal(self) -> JournalReader:
        """The journal read from its file, beside the process that writes it."""
        return JournalReader(f"sqlite:///{self.run_directory / 'journal.sqlite'}")

    def wait_for(self, what: str, condition: Any, timeout_s: float = 240.0) -> Any:
        """Poll until `condition()` is true; the last status is in the failure."""
        deadline = time.monotonic() + timeout_s
        while not (held := condition()):
            assert self.process.poll() is None, f"clawrl ended while waiting for {what}"
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s: {self.status()}"
            time.sleep(0.3)
        return held


def start_server(run_root: Path, *words: str) -> Server:
    """`clawrl serve` with these words, options first, on a free port; returns when /healthz answers."""
    port = free_port()
    command = [sys.executable, "-m", "clawrl.cli", "serve", *words, f"gateway.port={port}", f"run_root={run_root}"]
    log = (run_root / "serve.log").open("w")
    environment = {**os.environ, "CLAWRL_RAY_LOGS": "1"}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    server = Server(f"http://127.0.0.1:{port}", run_root, process)
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200:
                return server
        except httpx.HTTPError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            stop_server(server)
            pytest.fail(f"clawrl serve did not come up:\n{(run_root / 'serve.log').read_text()[-4000:]}")
        time.sleep(1)


def stop_server(server: Server) -> tuple[int, float]:
    """Ctrl-C; (exit code, seconds it took)."""
    started = time.monotonic()
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGINT)
    try:
        code = server.process.wait(4 * STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(server.process.pid, signal.SIGKILL)
        raise
    return code, time.monotonic() - started
