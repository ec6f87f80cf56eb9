"""A stage for the benchmarks: gateway, policy and journal as they are in the product, judge and trainer absent.

Knows how they are put together (see `serving/app.py`). A weight store comes along where versions are swapped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve

from clawrl import main
from clawrl.config import Config
from clawrl.journal.actor import Journal
from clawrl.serving import app
from clawrl.serving.policy import Policy
from clawrl.training.weights import WeightStore

STORE = f"{main.NAMESPACE}-weights"
APPLICATION = "bench"


@dataclass(frozen=True, slots=True)
class Stage:
    url: str
    policy: Any  # handles
    journal: Any
    store: Any  # None: the weights never change


@contextmanager
def stage(config: Config, policy: type[Policy] = Policy, *, with_store: bool = False) -> Iterator[Stage]:
    """Bring the stage up in a Ray cluster of its own (or the one named by RAY_ADDRESS), and take it down after."""
    main.check(config)
    Path(config.run_root).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=config.run_root, ignore_cleanup_errors=True) as folder:
        folder = str(Path(folder).resolve())
        main.join_ray()
        try:
            yield _up(config, policy, folder, with_store)
        finally:
            serve.shutdown()
            ray.shutdown()


def _up(config: Config, policy: type[Policy], folder: str, with_store: bool) -> Stage:
    journal: Any = _actor(Journal, "journal").remote(f"sqlite:///{folder}/journal.sqlite")
    store: Any = None
    if with_store:
        store = _actor(WeightStore, "weights").remote(config.versions, journal, folder, config.policy.model)
    served = serve.deployment(policy, name="policy", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.2})
    engine = served.bind(config.policy, None if store is None else (store, STORE))
    main.start_serve()
    gateway = app.bind_gateway(config, engine, journal, {}, {}, ray.util.get_node_ip_address())
    serve.run(gateway, name=APPLICATION)
    url = f"http://{config.gateway.host}:{config.gateway.port}/v1"
    return Stage(url, serve.get_deployment_handle("policy", APPLICATION), journal, store)


def _actor(cls: type, name: str) -> Any:
    return ray.remote(cls).options(name=f"{main.NAMESPACE}-{name}", num_cpus=0, max_concurrency=1000)
