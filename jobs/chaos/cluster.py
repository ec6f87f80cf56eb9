"""A Ray cluster of several nodes on this machine, as `ray start` makes them, each with an address of its own.

Knows Ray's command line. Every node runs in the foreground below this process, so that it can be lost or ended alone;
`ray stop` would end every cluster of the machine.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from jobs import free_port

START_S = 180.0
_OBJECTS = 256 * 2**20
_CPUS = 4


@contextmanager
def local_cluster(nodes: int, log: Path) -> Iterator[Cluster]:
    """A cluster that has all its nodes; what they say goes to `log`."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: paths of sockets are
    cluster = Cluster(folder, log)
    try:
        for _ in range(nodes):
            cluster.add_node()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """Nodes 127.0.0.2 (the head), 127.0.0.3, …; who is started with `environment` joins it."""

    def __init__(self, folder: Path, log: Path) -> None:
        self._folder, self._log, self._port = folder, log, free_port()
        self._nodes: list[subprocess.Popen] = []
        self.environment: Mapping[str, str] = {
            "RAY_ADDRESS": f"127.0.0.2:{self._port}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "RAY_raylet_start_wait_time_s": f"{START_S:.0f}",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def add_node(self) -> None:
        """Start one more node, the head first; returns when it is part of the cluster. Raises RuntimeError if not."""
        number = len(self._nodes)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [
            f"--node-ip-address=127.0.0.{number + 2}",
            f"--num-cpus={_CPUS}",
            f"--object-store-memory={_OBJECTS}",
        ]
        command += ["--min-worker-port=0", "--max-worker-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        if number == 0:
            command += ["--head", f"--port={self._port}", f"--temp-dir={self._folder}", "--include-dashboard=true"]
            command += [f"--ray-client-server-port={free_port()}", f"--dashboard-port={free_port()}"]
        else:
            command += [f"--address={self.environment['RAY_ADDRESS']}"]
        environment = {**os.environ, **self.environment}
        del environment["RAY_ADDRESS"]
        with self._log.open("a") as out:
            node = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
        self._nodes.append(node)
        deadline = time.monotonic() + START_S
        while self._log.read_text().count("This command will now block") <= number:
            if node.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`ray start` failed; {self._log} ends with:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.5)

    def processes(self) -> list[psutil.Process]:
        """`ray start` of each node that lives, of which all its processes descend."""
        return [psutil.Process(node.pid) for node in self._nodes if node.poll() is None]

    def node(self, number: int) -> list[psutil.Process]:
        """All processes of a node, the raylet before its workers."""
        start = psutil.Process(self._nodes[number].pid)
        return [start, *start.children(recursive=True)]

    def stop(self) -> None:
        """End what is left, the head last."""
        for number in reversed(range(len(self._nodes))):
            if self._nodes[number].poll() is None:
                for process in self.node(number):
                    process.kill()
            self._nodes[number].wait(10)
