"""Binds gateway, policy and judge into one Serve application; their names and shares of the machine stand here.

Ignores everything inside them. `main` deploys what `build` returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray import serve

from clawrl.config import Config, EngineSection
from clawrl.serving.admin import Acts
from clawrl.serving.gateway import Gateway
from clawrl.serving.judge import Judge, OutsideJudge, PolicyAndJudge
from clawrl.serving.keys import FILE, KeyRing
from clawrl.serving.policy import Adapters, Policy

APPLICATION = "clawrl"
ADAPTERS = "adapters"
"""Folder of a run for those that engines have loaded; what a killed program leaves there, the next one removes."""
CPU_SHARE = {"gateway": 0.1, "policy": 0.2, "judge": 0.2}


def build(
    config: Config,
    *,
    store: tuple[Any, str] | None,
    journal: Any,
    status: dict[str, tuple[Any, str]],
    admin: Acts,
    here: str,
    run_directory: Path,
) -> Any:
    """The Serve application. `store` is the weight store's handle and name; `status` and `admin` name who tells and
    who does what.

    `here` is the address of the node whose port the gateway opens, as Ray writes it.
    """
    gathers = config.judge.prompts == "tiny"  # other judges read sessions as a whole, and need no hints for it
    hints = config.learning.method != "rl" and (gathers or not config.learning.experience)
    adapters = None if config.lora is None else Adapters(config.lora, run_directory / ADAPTERS)
    if config.judge.engine == "policy":
        deployment = _engine_deployment(PolicyAndJudge, "policy", config.policy)
        policy = judge = deployment.bind(config.policy, store, adapters, config.judge, hints)
    else:
        judge = _judge_deployment(config).bind(config.judge, hints)
        policy = _engine_deployment(Policy, "policy", config.policy).bind(config.policy, store, adapters)
    told = {"policy": (policy, "status"), "judge": (judge, "status"), **status}
    return bind_gateway(config, policy, journal, told, admin, here)


def engines(config: Config) -> str:
    """How many there are, in words."""
    policies, judges = config.policy.replicas, config.judge.replicas
    if config.judge.engine == "policy":
        return f"{policies} engine{'s' * (policies > 1)} for policy and judge"
    return f"{policies} policy and {judges if has_judge_engine(config) else 0} judge engines"


def judge_name(config: Config) -> str:
    """The deployment that judges."""
    return "judge" if config.judge.engine == "own" else "policy"


def bind_gateway(
    config: Config, policy: Any, journal: Any, status: dict[str, tuple[Any, str]], admin: Acts, here: str
) -> Any:
    """The door, on the node `here`, in front of a policy deployment."""
    gateway = serve.deployment(
        serve.ingress()(Gateway),
        name="gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=config.gateway.max_concurrent_requests + config.gateway.max_waiting,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": CPU_SHARE["gateway"], "resources": {f"node:{here}": 0.001}},
    )
    keys = KeyRing(Path(config.run_root).resolve() / FILE)
    return gateway.bind(config.gateway, config.policy, policy, journal, status, admin, config.privacy, keys)


def _judge_deployment(config: Config) -> Any:
    """With an engine, unless questions go elsewhere and there is nothing to score."""
    if has_judge_engine(config):
        return _engine_deployment(Judge, "judge", config.judge)
    return serve.deployment(
        OutsideJudge,
        name="judge",
        num_replicas=config.judge.replicas,
        max_ongoing_requests=1024,
        ray_actor_options={"num_cpus": CPU_SHARE["judge"]},
    )


def has_judge_engine(config: Config) -> bool:
    return config.judge.url is None or config.initial_weights_score


def _engine_deployment(cls: type, name: str, settings: EngineSection) -> Any:
    return serve.deployment(
        cls,
        name=name,
        num_replicas=settings.replicas,
        max_ongoing_requests=max(1024, 4 * settings.max_num_seqs),
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=5,
        ray_actor_options={"num_cpus": CPU_SHARE[name], "num_gpus": settings.gpus_per_replica},
    )
