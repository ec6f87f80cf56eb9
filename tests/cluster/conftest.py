"""A small Ray cluster of this process's own, on CPUs, for all tests of this folder."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handles import Here

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Ray is up; other clusters of this machine are left alone."""
    here = Path(__file__).resolve().parent
    os.environ.update(
        QUIET, PYTHONPATH=f"{here.parent.parent}:{here.parent}:{here}"
    )  # so that workers can import test modules
    import ray

    ray.init(
        address="local",
        num_cpus=8,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture
def actors(request: pytest.FixtureRequest, cluster: None) -> Iterator[Callable[..., Any]]:
    """Starts actors, in processes of their own if the test is marked so, and ends them with the test."""
    if request.node.get_closest_marker("processes") is None:
        here = Here()
        yield here.start
        here.end()
        return
    import ray

    started = []

    def start(kind: type, *given: Any, **options: Any) -> Any:
        started.append(ray.remote(kind).options(num_cpus=0, **options).remote(*given))
        return started[-1]

    yield start
    for actor in started:
        ray.kill(actor)
