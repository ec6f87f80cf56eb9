"""A program that is killed in a cluster leaves its Serve application there; the next one removes it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import ray
from ray import serve

from clawrl import main
from clawrl.config import Config
from clawrl.errors import ConfigError
from jobs import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("cluster"), pytest.mark.timeout(600)]

PROGRAM = """
import sys, time
import ray
from ray import serve
from starlette.applications import Starlette
from clawrl import main
from clawrl.serving import app
from clawrl.serving.listener import Listener

class Journal:
    def ping(self): pass

class Door:
    async def __init__(self, port): self.listener = Listener(Starlette(), "127.0.0.1", port)

assert not main.join_ray()
journal = ray.remote(Journal).options(name=f"{main.NAMESPACE}-journal", num_cpus=0).remote()
ray.get(journal.ping.remote())
main.start_serve()
serve.run(serve.deployment(Door).bind(int(sys.argv[1])), name=app.APPLICATION)
print("up", flush=True)
time.sleep(600)
"""


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def program(cluster, port) -> Iterator[subprocess.Popen]:
    """As much of a clawrl as outlives it, or tells that it lives."""
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    running = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(port)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n"
    yield running
    running.kill()
    running.wait()
    serve.shutdown()


def test_what_a_killed_program_left_is_removed(program, port, monkeypatch):
    config, said = Config.model_validate({"gateway": {"port": port}}), []
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    with monkeypatch.context() as patched:
        patched.setattr(main, "LEFT_S", 1.0)
        with pytest.raises(ConfigError, match=r"another clawrl runs in the Ray cluster .*; stop it, or"):
            main.clear_cluster(said.append)
    assert said == []
    program.send_signal(signal.SIGKILL)
    program.wait()
    with pytest.raises(ConfigError, match=f"gateway.port={port} .* cannot be bound"):
        main.require_port(config)
    main.clear_cluster(said.append)
    assert said == ["removing the gateway, policy and judge of a clawrl that was killed"]
    main.require_port(config)
    main.clear_cluster(said.append)
    assert len(said) == 1
