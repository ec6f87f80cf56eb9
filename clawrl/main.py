"""The program on one screen: what is started, in which order, under which names, and how it all ends.

    check ─► run ─► Ray ─► journal ─► weight store, buffer ─► gateway · policy · judge (Serve) ─► collector ─► trainer

Knows every component's constructor and share of the machine; nothing else does. Ignores what they do.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import ray
from ray import serve
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clawrl import observe
from clawrl.algorithms.methods import load_method
from clawrl.config import Config, lasting_name, load_heuristics, model_path
from clawrl.errors import ConfigError, JournalError
from clawrl.journal.actor import Journal
from clawrl.journal.store import JournalStore
from clawrl.rollout.collector import Collector
from clawrl.rollout.pool import Pool
from clawrl.rollout.worker import agent_of, make_env, own_key, start_worker
from clawrl.serving import app
from clawrl.serving.endpoint import key_of
from clawrl.serving.keys import FILE, KeyRing, require_keys_beyond_loopback
from clawrl.serving.local import is_loopback
from clawrl.serving.redaction import Redactor
from clawrl.serving.reward_model import require_reward_model
from clawrl.serving.teacher import OutsideTeacher, require_teacher
from clawrl.training.adapter import require_targets
from clawrl.training.buffer import ReplayBuffer
from clawrl.training.quantized import require_served, require_trained
from clawrl.training.trainer import TrainLoop, run_trainer
from clawrl.training.watch import Watch
from clawrl.training.weights import WeightStore

log = logging.getLogger(__name__)

NAMESPACE = "clawrl"
TRAINER_CPUS = 0.2  # of each trainer worker; an embedded system shares few cores among many processes
FREE_DISK_MIB = 512
STOP_S = 12.0
LEFT_S = 15.0
"""How long the actors of a program that was killed may still be there."""

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # niceness is ours to choose: chat first, training last
    "RAY_worker_maximum_startup_concurrency": "16",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_V2_ENABLED": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_FAST_SERVE = {  # one thread and one loop per replica: a chunk on its way to a client wakes nobody else
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_QUIET_SERVE = {"log_level": "WARNING", "enable_access_log": False}


class System:
    """A running clawrl. Use `System.start`, then `stop`; both may be called from any process of a Ray cluster."""

    collector: type[Collector] = Collector
    """A subclass of System may bring its own."""

    def __init__(self, config: Config, run_directory: Path, owns_ray: bool) -> None:
        self.config = config
        self.run_directory = run_directory
        host = config.gateway.host
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{config.gateway.port}/v1"
        self.actors: dict[str, Any] = {}
        self.training: Any = None  # reference to the trainer's end
        self._owns_ray = owns_ray
        self._lock: TextIO | None = None

    @classmethod
    def start(cls, config: Config, say: Callable[[str], None] = lambda line: None) -> System:
        """Bring everything up and return when chat is served. `say` is told each step.

        Raises ConfigError before any process starts if the config cannot work here; on a later failure everything
        that was started is stopped again.
        """
        check(config)
        run_directory, lock = open_run(config)
        try:
            say("starting Ray")
            owns_ray = join_ray()
            if not owns_ray:
                clear_cluster(say)
                require_port(config)
        except BaseException:
            ray.shutdown()
            lock.close()
            raise
        system = cls(config, run_directory, owns_ray)
        system._lock = lock
        try:
            system._start_components(say)
        except BaseException:
            system.stop()
            raise
        return system

    def _start_components(self, say: Callable[[str], None]) -> None:
        config = self.config
        say("opening the journal")
        journal = self._actor("journal", Journal, journal_url(config, self.run_directory), config.journal.keep_days)
        ray.get([journal.consent.remote(user=user, train=False) for user in config.privacy.opt_out_users])
        store = self._actor(
            "weights", WeightStore, config.versions, journal, str(self.run_directory), config.policy.model, config.lora
        )
        buffer = self._actor("buffer", ReplayBuffer, config.buffer, journal, config.policy_scope)
        shutil.rmtree(self.run_directory / app.ADAPTERS, ignore_errors=True)
        say(f"starting {app.engines(config)} (vLLM)")
        told = {"versions": (store, "status"), "buffer": (buffer, "stats"), "journal": (journal, "counts")}
        admin: dict[str, tuple[Any, str]] = {
            **{name: (store, name) for name in ("versions", "rollback", "pin", "diff", "export", "forget")},
            "consent": (journal, "consent"),
        }
        application = app.build(
            config,
            store=(store, f"{NAMESPACE}-weights"),
            journal=journal,
            status=told,
            admin=admin,
            here=ray.util.get_node_ip_address(),
            run_directory=self.run_directory,
        )
        start_serve()
        serve.run(application, name=app.APPLICATION, logging_config=_QUIET_SERVE)
        judge = serve.get_deployment_handle(app.judge_name(config), app.APPLICATION)
        teacher = serve.get_deployment_handle("policy", app.APPLICATION)
        if config.learning.teacher == "external":
            teacher = self._actor("teacher", OutsideTeacher, config.teacher, config.judge.timeout_s)
        self._actor(
            "collector",
            self.collector,
            journal,
            judge,
            teacher,
            config.judge,
            config.learning,
            config.gate.share,
            config.policy_scope,
        )
        self._actor("watch", Watch, config.gate, journal, store, config.policy_scope)
        loop = TrainLoop(
            config.trainer,
            config.learning,
            config.versions,
            config.policy.model,
            buffer,
            store,
            journal,
            config.gate,
            config.lora,
        )
        trainer: Any = ray.remote(run_trainer)
        self.training = trainer.options(
            name=f"{NAMESPACE}-trainer",
            num_cpus=0,
            max_retries=-1,
            scheduling_strategy=_here(),
            # Ray Train's actors ask Ray's state API, which must know which of several clusters is meant
            runtime_env={"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}},
        ).remote(loop, str(self.run_directory), cpus_per_worker=TRAINER_CPUS)
        for pool in (each for each in config.pools if not each.evaluate_only):
            say(f"starting the pool {pool.name} ({pool.env})")
            asking = (_url_for_all(config, self.url), config.policy.served_name, own_key())
            start = partial(start_worker, pool, *asking, NAMESPACE, **_reaching(config))
            self._actor(f"pool-{pool.name}", Pool, pool, config.buffer.batch_size, journal, buffer, start)
        say(f"serving {self.url} · run directory {self.run_directory}")

    def _actor(self, name: str, cls: type, *arguments: Any) -> Any:
        """A named actor beside the run directory; Ray restarts it, and it comes back from the journal."""
        actor = (
            ray.remote(cls)
            .options(
                name=f"{NAMESPACE}-{name}",
                num_cpus=0,
                max_restarts=-1,
                max_task_retries=-1,
                max_concurrency=1000,
                scheduling_strategy=_here(),
            )
            .remote(*arguments)
        )
        self.actors[name] = actor
        return actor

    def stop(self) -> None:
        """Stop taking requests, let the trainer end its step, close the journal; within seconds, whatever hangs."""
        deadline = time.monotonic() + STOP_S
        if ray.is_initialized():
            worker = threading.Thread(target=self._close, args=(deadline,), daemon=True)
            worker.start()
            worker.join(STOP_S)
            ray.shutdown()
        if self._lock is not None:
            self._lock.close()

    def _close(self, deadline: float) -> None:
        """The order matters: no new samples, then no new versions, then the log."""
        try:
            serve.delete(app.APPLICATION, _blocking=not self._owns_ray)
            self._close_actors(*(name for name in self.actors if name.startswith("pool-")))
            self._close_actors("collector", "watch", "buffer")
            if self.training is not None:
                ray.wait([self.training], timeout=max(0.1, deadline - time.monotonic() - 4))
            self._close_actors("weights", "journal")
        except Exception as error:
            log.warning("event=unclean_stop error=%s: %s", type(error).__name__, error)
        for actor in self.actors.values():
            ray.kill(actor)

    def _close_actors(self, *names: str) -> None:
        closing = [self.actors[name].close.remote() for name in names if name in self.actors]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=3)


def check(config: Config) -> None:
    """What can be known before anything starts. Raises ConfigError with the value and the remedy."""
    for section, engine in (("policy", config.policy), ("judge", config.judge)):
        try:
            model_path(engine.model)
        except ConfigError as error:
            raise ConfigError(f"{section}.model: {error}") from None
        if section == "policy" or config.judge.engine == "own":
            require_served(section, engine)
    require_trained(config.policy.model, adapters=config.lora is not None)
    if config.lora is not None:
        require_targets(config.lora, config.policy.model)
    for section in (config.judge, config.teacher):
        key_of(section)
    require_reward_model(config.judge.reward_model, config.judge_model, config.policy.model)
    Redactor(config.privacy)
    load_method(config.learning)
    load_heuristics(config.judge)
    for pool in config.pools:
        make_env(pool).close()
        agent_of(pool)
    keys = KeyRing(Path(config.run_root).resolve() / FILE)
    require_keys_beyond_loopback(keys, config.gateway.host, config.gateway.anyone)
    if not os.environ.get("RAY_ADDRESS"):  # in a cluster a dead clawrl's gateway may hold it, see `clear_cluster`
        require_port(config)
    if config.journal.url != "sqlite":
        _known_versions(config.journal.url)
    if config.learning.teacher == "external":
        asyncio.run(require_teacher(config.teacher, config.policy.model, config.learning.teacher_top))
    root = Path(config.run_root).resolve()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free // 2**20
    if free < FREE_DISK_MIB:
        raise ConfigError(
            f"run_root={config.run_root!r} has {free} MiB free, {FREE_DISK_MIB} are needed; free some or move it"
        )


def require_port(config: Config) -> None:
    """Raises ConfigError if the gateway's port is taken."""
    host, port = config.gateway.host, config.gateway.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"gateway.port={port} on {host} cannot be bound: {error.strerror}; stop what uses it or set another"
            ) from error


def open_run(config: Config) -> tuple[Path, TextIO]:
    """The run's folder, new or continued, and the lock on it; `latest` names it from now on.

    Raises ConfigError if it cannot be had or does not go with the model or the journal; then all is as it was.
    """
    try:
        folder, new = observe.open_run(config.run_root, config.run)
    except FileNotFoundError as error:
        raise ConfigError(f"run={config.run!r}: {error.filename} does not exist; set run=new or run=latest") from error
    except OSError as error:
        raise _unwritable(config, error) from error
    lock = None
    try:
        lock = observe.lock_run(folder)
        _require_model(config, folder)
        _require_journal(config, folder)
        observe.point_latest(config.run_root, folder)
    except BaseException as error:
        if lock is not None:
            lock.close()
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"run {folder.name} under run_root={config.run_root!r} is in use by another clawrl; "
                "stop it or set run=new"
            ) from None
        if isinstance(error, OSError):
            raise _unwritable(config, error) from error
        raise
    return folder, lock


def _unwritable(config: Config, error: OSError) -> ConfigError:
    return ConfigError(f"run_root={config.run_root!r} cannot be written: {error.strerror}; choose another")


def _require_model(config: Config, folder: Path) -> None:
    """Raises ConfigError if the run's versions are of another model, or adapters of another form."""
    about = folder / "run.json"
    lora = None if config.lora is None else config.lora.model_dump(mode="json", include={"rank", "alpha", "targets"})
    if not about.exists():
        about.write_text(
            json.dumps({"model": config.policy.model, "lora": lora, "policy_scope": config.policy_scope}) + "\n"
        )
    began_with = {"lora": None, "policy_scope": "group", **json.loads(about.read_text())}
    began_with["model"] = lasting_name(began_with["model"])
    if config.policy_scope == "user" and began_with["policy_scope"] != "user":
        raise ConfigError(
            f"run {folder.name} began with lora.policy_scope={began_with['policy_scope']}: users' policies would begin "
            "with what everyone had said; set run=new for lora.policy_scope=user"
        )
    for key, value, name in (("model", config.policy.model, "policy.model"), ("lora", lora, "lora")):
        if began_with[key] != value:
            raise ConfigError(
                f"run {folder.name} began with {name}={_shown(began_with[key])} and its versions are made so; "
                f"set run=new for {_shown(value)}"
            )


def _shown(value: Any) -> str:
    return "none" if value is None else repr(value)


def _require_journal(config: Config, folder: Path) -> None:
    """Raises ConfigError if the journal cannot be written, or tells of other versions than those in the folder."""
    known, used = _known_versions(journal_url(config, folder))
    versions = folder / "versions"
    if known and not versions.is_dir():
        raise ConfigError(
            f"journal.url holds {known} versions of another run, whose weights are not in {folder}; "
            "set run to that run's folder, or name an empty database"
        )
    names = [path.name for path in versions.iterdir()] if versions.is_dir() else []
    newest = max((int(name) for name in names if name.isdigit()), default=0)
    if newest > known + used:  # a crash may have left one that was not recorded, but not of samples never recorded
        raise ConfigError(
            f"run {folder.name} has version {newest} and journal.url knows {known}, so numbers would be used twice; "
            "import that run's journal first (`clawrl journal import`), or set run=new"
        )


def _known_versions(url: str) -> tuple[int, bool]:
    """How many versions a journal tells of, and whether it tells of anything. ConfigError if it cannot be written."""
    try:
        with closing(JournalStore(url)) as journal:
            counts = journal.counts()
            return counts["versions"], any(counts.values()) or bool(journal.erasures())
    except JournalError as error:
        raise ConfigError(f"journal.url: {error}") from error


def journal_url(config: Config, folder: Path) -> str:
    """SQLAlchemy's URL of a run's journal, which is in its folder unless another is named."""
    return config.journal.url if config.journal.url != "sqlite" else f"sqlite:///{folder / 'journal.sqlite'}"


def join_ray() -> bool:
    """Connect to the cluster named by RAY_ADDRESS, or start one on this machine; true if it was started here."""
    os.environ.update({key: value for key, value in _QUIET.items() if key not in os.environ})
    # Processes find this very package, installed or not.
    environment = {"env_vars": {**_FAST_SERVE, **{key: os.environ[key] for key in _QUIET}}}
    options: dict[str, Any] = {"namespace": NAMESPACE, "runtime_env": environment, "logging_level": logging.ERROR}
    alone = not os.environ.get("RAY_ADDRESS")
    if alone:
        options |= {"address": "local", "log_to_driver": os.environ.get("CLAWRL_RAY_LOGS") == "1"}
    handler = signal.getsignal(signal.SIGTERM)
    ray.init(**options)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in the place of the program's
    return alone


def clear_cluster(say: Callable[[str], None]) -> None:
    """Remove what a clawrl that was killed has left in the cluster: Serve's replicas outlive the program, and hold its
    port. Raises ConfigError if another clawrl is alive there.
    """
    deadline = time.monotonic() + LEFT_S
    while _alive(f"{NAMESPACE}-journal"):  # Ray ends the actors of a program that died, soon
        if time.monotonic() > deadline:
            raise ConfigError(
                f"another clawrl runs in the Ray cluster {os.environ['RAY_ADDRESS']}; stop it, or set RAY_ADDRESS to "
                "another cluster (unset, clawrl starts its own)"
            )
        time.sleep(0.2)
    if app.APPLICATION in serve.status().applications:
        say("removing the gateway, policy and judge of a clawrl that was killed")
        serve.delete(app.APPLICATION)


def _alive(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _here() -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _reaching(config: Config) -> dict[str, Any]:
    """Where workers of a pool can be that are to reach the gateway: anywhere, unless it listens to its machine only."""
    host = config.gateway.host
    return {"scheduling_strategy": _here()} if host == "localhost" or is_loopback(host) else {}


def _url_for_all(config: Config, url: str) -> str:
    """The gateway as other nodes reach it: one that listens everywhere is named by its node's address."""
    if config.gateway.host not in ("0.0.0.0", "::"):
        return url
    return f"http://{ray.util.get_node_ip_address()}:{config.gateway.port}/v1"


def start_serve() -> None:
    """Ray Serve without its HTTP proxy: the gateway's replicas listen themselves (`serving/listener.py`)."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing Serve has set it to INFO
    serve.start(proxy_location="Disabled", logging_config=_QUIET_SERVE)


def serve_until_stopped(config: Config, say: Callable[[str], None]) -> None:
    """`clawrl serve`: start, then wait for Ctrl-C or SIGTERM. Chat goes on even if the trainer has failed for good."""
    stopped = threading.Event()
    _on_signals(stopped.set)
    system = System.start(config, say)
    try:
        while not stopped.wait(0.5):
            done, _ = ray.wait([system.training], timeout=0)
            if done:
                say(f"training has ended ({_reason(done[0])}); chat goes on without it, start again to train")
                stopped.wait()
    finally:
        say("stopping")
        system.stop()
        say("stopped")


def _reason(ended: Any) -> str:
    """What ended the trainer, on one line."""
    try:
        ray.get(ended)
    except Exception as error:
        cause = getattr(error, "cause", None) or error
        return f"{type(cause).__name__}: {next(iter(str(cause).splitlines()), '')}"
    return "its buffer was closed"


def _on_signals(stop: Callable[[], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop())
