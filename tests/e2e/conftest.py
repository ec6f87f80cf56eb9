"""One real clawrl for all end-to-end tests: real engines, real training, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from running import Server, start_server, stop_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The shared system, with the embedded default configuration."""
    run_root = tmp_path_factory.mktemp("runs")
    server = start_server(run_root)
    yield server
    if server.process.poll() is None:
        stop_server(server)
