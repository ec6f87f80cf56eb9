"""One real clawrl for all end-to-end tests: real engines, real training, started once.

CLAWRL_E2E_CONFIG=configs/one_gpu.toml runs them with another file's settings, on this machine's CPU and the built-in
model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from running import ON_CPU, Server, start_server, stop_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shared system, with the embedded default configuration or the file asked for."""
    run_root = tmp_path_factory.mktemp("runs")
    file = os.environ.get("CLAWRL_E2E_CONFIG")
    server = start_server(run_root, *(["--config", file, *ON_CPU] if file else []))
    yield server
    if server.process.poll() is None:
        stop_server(server)
