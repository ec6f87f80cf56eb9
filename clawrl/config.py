"""Settings: one pydantic section per component, read from TOML, overridden by dotted `section.key=value` words.

Knows every key, its default and its bounds. Ignores what components do with them. A component is handed its own
section, never the root.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from clawrl.errors import ConfigError
from clawrl.types import PolicyScope


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _share_or_whole(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError("give 0 (CPU), a share of one GPU below 1, or a whole number of GPUs")
    return gpus


GpuShare = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_share_or_whole)]
"""GPUs of one process: 0 runs on the CPU, below 1 shares a GPU with others, above 1 is a whole number."""


def _whole_path(path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve())
    except RuntimeError as error:  # ~nobody
        raise ValueError(str(error)) from None


def lasting_name(model: str) -> str:
    """A model's name that stands for it in every process, whatever folder that works in."""
    is_path = model.startswith((".", "/", "~")) or (Path(model) / "config.json").is_file()
    return _whole_path(model) if is_path else model


class EngineSection(Section):
    """What policy and judge share: one vLLM engine per replica."""

    model: Annotated[str, AfterValidator(lasting_name)] = Field(
        default="clawrl:tiny", description="Hugging Face folder or name; `clawrl:tiny` is the built-in model."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    replicas: int = Field(default=1, ge=1)
    gpus_per_replica: GpuShare = Field(default=0, description="0: CPU; below 1: a share; above 1: tensor parallelism.")
    max_model_len: int = Field(default=2048, ge=64, description="Context length in tokens, prompt and reply together.")
    max_num_seqs: int = Field(default=64, ge=1, description="Sequences decoded side by side in one engine.")
    kv_cache_gib: float = Field(default=0.25, gt=0, description="Key-value cache on the CPU, GiB.")
    gpu_memory_utilization: float = Field(
        default=0.85, gt=0, le=1, description="Part of each GPU's memory the engine takes."
    )
    enforce_eager: bool = True
    threads: int = Field(default=1, ge=1, description="OpenMP threads of one CPU engine.")
    nice: int = Field(default=0, ge=0, le=19, description="Added niceness of the engine's processes.")


def _plain_url(url: str) -> str:
    if not re.fullmatch(r"https?://[^\s@?#]+", url):
        raise ValueError("give http://HOST:PORT/v1 or https://HOST/v1, without a password (key_env names the key)")
    return url.rstrip("/")


class EndpointSection(Section):
    """A model that others serve behind an OpenAI-compatible API."""

    url: Annotated[str, AfterValidator(_plain_url)] | None = Field(
        default=None, description="Its address, with the path before /chat/completions, as in http://host:8000/v1."
    )
    served_name: str | None = Field(default=None, description="The model's name there.")
    key_env: str | None = Field(
        default=None, description="Name of the environment variable that holds its API key; the key is kept nowhere."
    )

    @model_validator(mode="after")
    def _whole(self) -> EndpointSection:
        if self.url is not None and not self.served_name:
            raise ValueError(f"url={self.url!r} needs served_name: the model's name there")
        if self.url is None and (self.served_name or self.key_env):
            raise ValueError("served_name and key_env belong to a url; set it too")
        return self


class GatewaySection(Section):
    """The limits hold for each gateway replica by itself."""

    host: str = "127.0.0.1"
    port: int = Field(default=30000, ge=1, le=65535)
    replicas: int = Field(default=1, ge=1)
    anyone: bool = Field(default=False, description="Without API keys, serve others than this machine too.")
    max_body_mib: int = Field(default=10, ge=1, description="Larger request bodies are refused with 413.")
    max_concurrent_requests: int = Field(default=1024, ge=1, description="Others are held until one has ended.")
    max_waiting: int = Field(default=4096, ge=0, description="Held so at most; beyond, 429 with Retry-After.")
    key_concurrent: int | None = Field(default=None, ge=1, description="Requests of one API key answered at a time.")
    key_waiting: int = Field(default=256, ge=0, description="Requests of one API key held at most; beyond, 429.")
    key_tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Prompt and reply tokens of one API key; beyond, its requests are held."
    )
    keep_alive_s: float = Field(default=15.0, gt=0, description="A silent stream gets an empty delta this often.")
    hold_s: float = Field(default=600.0, gt=0, description="How long a request waits for a policy replica that lives.")


class JournalSection(Section):
    url: str = Field(
        default="sqlite",
        description="`sqlite` puts journal.sqlite in the run directory; else sqlite:////folder/journal.sqlite or "
        "postgresql+psycopg://user@host/database.",
    )
    keep_days: float | None = Field(
        default=None,
        gt=0,
        description="Turns that ended longer ago are deleted with their next states, feedback, judgements and samples, "
        "once neither judge nor trainer waits for them; versions stay. null keeps all.",
    )


def _regular_expressions(shapes: Any) -> Any:
    if shapes == "default":
        return shapes
    if not isinstance(shapes, (list, tuple)) or not all(isinstance(shape, str) for shape in shapes):
        raise ValueError('give "default", or a list of regular expressions ([] redacts nothing)')
    for shape in shapes:
        try:
            re.compile(shape)
        except re.error as error:
            raise ValueError(f"{shape!r} is no regular expression: {error}") from None
    return shapes


def _dotted_path(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", path):
        raise ValueError("name a function as package.module:function")
    return path


def _method(method: str) -> str:
    if method in ("rl", "opd", "hybrid"):
        return method
    if ":" not in method:
        raise ValueError("choose 'rl', 'opd' or 'hybrid', or name a function of yours as package.module:function")
    return _dotted_path(method)


DottedPath = Annotated[str, AfterValidator(_dotted_path)]
"""A function of the user's own."""


class PrivacySection(Section):
    opt_out_users: tuple[str, ...] = Field(default=(), description="Served as always, never recorded or trained on.")
    redact: Annotated[Literal["default"] | tuple[str, ...], BeforeValidator(_regular_expressions)] = Field(
        default="default", description="Regular expressions taken out before anything is written; default: credentials."
    )
    redactor: DottedPath | None = Field(
        default=None, description="package.module:function, text -> text, applied after the patterns."
    )


class PolicySection(EngineSection):
    served_name: str = Field(default="clawrl", description="The model's name in the API.")
    support: int = Field(default=4, ge=0, le=20, description="Top-k tokens captured at every reply position (0: none).")
    temperature: float = Field(default=1.0, ge=0, le=2, description="Used where a request does not say.")
    max_reply_tokens: int = Field(default=512, ge=1, description="Used where a request does not say.")
    tool_parser: str | None = Field(default="hermes", description="vLLM tool-call parser; none if null.")
    reasoning_parser: str | None = None
    max_choices: int = Field(default=8, ge=1, description="Largest n of a request; more than one is a side turn.")


class LoraSection(Section):
    """Versions are adapters (LoRA, arXiv:2106.09685): the base stays as it is, W = W0 + alpha/rank · B·A."""

    rank: Literal[1, 8, 16, 32, 64, 128, 256] = Field(default=16, description="Of A and B; the engine knows these.")
    alpha: float = Field(default=32.0, gt=0, description="Scale of the update, over rank.")
    targets: tuple[str, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="Linear layers that are adapted, by the last part of their name.",
    )
    in_batch: int = Field(default=16, ge=2, description="Adapters that one step of the engine can serve.")
    in_memory: int = Field(default=32, ge=2, description="Adapters it keeps in memory; others are on the disk.")
    policy_scope: PolicyScope = Field(
        default="group",
        description="group: everyone has one policy together. user: each user their own. hierarchy: both; a user's "
        "begins with everyone's and is held near to it.",
    )
    anchor: float = Field(
        default=5.0,
        ge=0,
        description="Of a hierarchy: a step of a user's adapter takes this · learning_rate of the way to everyone's.",
    )

    @model_validator(mode="after")
    def _holds(self) -> LoraSection:
        if self.in_memory < self.in_batch:
            raise ValueError(f"in_memory={self.in_memory} is less than in_batch={self.in_batch}; raise it")
        return self


class JudgeSection(EngineSection, EndpointSection):
    """With a url its questions are asked there; then its own engine, if needed at all, only scores tokens."""

    engine: Literal["own", "policy"] = Field(
        default="own", description="`policy`: the policy's engine without its adapter; then the engine's keys are its."
    )
    prompts: Literal["tiny", "full"] = "tiny"
    votes: int = Field(default=3, ge=1, le=16)
    temperature: float = Field(default=0.6, ge=0, le=2)
    max_verdict_tokens: int = Field(default=128, ge=8)
    heuristics: str | None = Field(
        default=None,
        description="`default`, or package.module:function from a turn and what followed it to -1, 0, 1 or None, which "
        "is the vote; where it is None, the reward model or the judge is asked.",
    )
    reward_model: Annotated[str, AfterValidator(_whole_path)] | None = Field(
        default=None,
        description="Folder of `clawrl train-judge`, whose verdict is then the vote on a reply; "
        "hints, and votes on steps of environments, are asked for as ever.",
    )
    timeout_s: float = Field(default=60.0, gt=0, description="A later judgement abstains.")
    concurrency: int = Field(default=16, ge=1, description="Turns judged side by side.")
    feedback_wait_s: float = Field(
        default=60.0,
        ge=0,
        description="So long a turn with explicit feedback waits for a next message.",
    )
    session_idle_s: float = Field(
        default=600.0,
        gt=0,
        description="A session in which nothing is said for so long has ended (learning.experience).",
    )
    nice: int = Field(default=5, ge=0, le=19)


class ClipSection(Section):
    low: float = Field(default=0.2, ge=0, lt=1)
    high: float = Field(default=0.28, ge=0)


class LearningSection(Section):
    """Objective: L = rl_weight·L_RL + opd_weight·L_OPD + kl_weight·L_KL (shared by collector and trainer)."""

    method: Annotated[str, AfterValidator(_method)] = Field(
        default="hybrid", description="Or package.module:function, from a turn's evidence to its targets."
    )
    rl_weight: float = Field(default=1.0, ge=0)
    opd_weight: float = Field(default=1.0, ge=0)
    kl_weight: float = Field(default=0.05, ge=0)
    clip: ClipSection = ClipSection()
    baseline: Literal["none", "ema"] = "ema"
    baseline_decay: float = Field(default=0.9, ge=0, lt=1)
    distillation: Literal["topk", "token", "kl"] = "topk"
    distillation_support: Literal["student", "teacher", "overlap"] = Field(
        default="student", description="Whose k likeliest tokens top-k distillation is over, or those of both."
    )
    support: int = Field(default=4, ge=1, le=20, description="k of top-k distillation; at most policy.support.")
    difference_clip: float = Field(
        default=1.0, gt=0, description="C: bound on teacher - behaviour log-probability (topk and token)."
    )
    teacher: Literal["frozen", "current", "ema", "external"] = Field(
        default="frozen",
        description="Who scores with the hint: the model as it began; as it is; the moving average of its versions, "
        "which are adapters then; or a server, see [teacher].",
    )
    ema_decay: float = Field(default=0.95, ge=0, lt=1, description="Of the moving average, a step: teacher = ema.")
    teacher_top: int = Field(default=20, ge=1, le=100, description="Teacher's tokens scored per position.")
    hint_rule: Literal["sequence", "token", "shortest", "longest", "random"] = "sequence"
    max_hints: int = Field(default=3, ge=1)
    experience: bool = Field(
        default=False, description="Distil what a whole session teaches when it has ended, instead of hints by turn."
    )
    process_weight: float = Field(
        default=0.0,
        ge=0,
        description="c: an environment's step is worth its outcome + c times the judge's mean vote (0: outcome alone).",
    )
    importance_cap: float = Field(default=2.0, ge=1, description="What a token's probability ratio counts at most.")
    policy_loss: Literal["ppo", "gspo", "cispo"] = Field(default="ppo", description="Form of the policy-gradient term.")
    normalise: Literal["sample", "token", "constant"] = "sample"
    normalise_length: int = Field(default=512, ge=1, description="Tokens that every reply is divided by if constant.")

    @model_validator(mode="after")
    def _supported(self) -> LearningSection:
        if self.distillation_support == "student":
            return self
        if self.distillation != "topk":
            raise ValueError(
                f"distillation_support={self.distillation_support} is one of distillation=topk, which "
                f"distillation={self.distillation} is not; set distillation=topk or distillation_support=student"
            )
        if self.support > self.teacher_top:
            raise ValueError(
                f"support={self.support} of distillation_support={self.distillation_support} needs as many tokens "
                f"named by the teacher, but teacher_top={self.teacher_top}; raise teacher_top"
            )
        return self


class BufferSection(Section):
    batch_size: int = Field(default=32, ge=1, description="Samples per optimizer step.")
    min_batch: int | None = Field(
        default=None, ge=1, description="As few are a batch too, once the oldest has waited max_wait_s. Unset: never."
    )
    max_wait_s: float = Field(default=10.0, ge=0, description="How long, while no batch is full.")
    max_lag: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="Samples more versions old than this are dropped and counted, or kept for replay.",
    )
    replay_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="Largest share of a batch that such samples make up, newest first."
    )
    replay_size: int = Field(
        default=1024, ge=1, description="So many of them are kept at most; the oldest are dropped."
    )
    user_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="What samples of a user count in a batch of everyone's; 1 where it does not say."
    )
    user_quota: int | None = Field(
        default=None, ge=1, description="Samples of one user in a batch of everyone's, at most. Unset: without bound."
    )

    @model_validator(mode="after")
    def _smaller(self) -> BufferSection:
        if self.min_batch is not None and self.min_batch > self.batch_size:
            raise ValueError(f"min_batch={self.min_batch} is above batch_size={self.batch_size}; lower it")
        if self.user_quota is not None and self.min_batch is None:
            raise ValueError(
                f"user_quota={self.user_quota} may leave a batch of few users for ever incomplete; set min_batch too"
            )
        if 0 < self.replay_fraction * self.batch_size < 1:
            raise ValueError(
                f"replay_fraction={self.replay_fraction:g} of batch_size={self.batch_size} is less than one sample; "
                f"set replay_fraction >= {1 / self.batch_size:g}, or 0"
            )
        return self


class TrainerSection(Section):
    workers: int = Field(default=2, ge=1)
    gpus_per_worker: GpuShare = Field(default=0, le=1, description="0: CPU (gloo); 1: NCCL; below 1: shares a GPU.")
    threads: int = Field(default=1, ge=1, description="Torch threads of one CPU worker.")
    nice: int = Field(default=10, ge=0, le=19)
    learning_rate: float = Field(default=5e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    pack_tokens: int = Field(default=4096, ge=64, description="Tokens per packed forward pass of one worker.")
    logit_chunk: int = Field(default=1024, ge=1, description="Positions whose full-vocabulary logits exist at once.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Compute type; master weights are float32."
    )
    activation_checkpointing: bool = False
    max_failures: int = Field(default=3, ge=0, description="Restarts by a controller, and of controllers in a row.")
    checkpoint_every: int = Field(
        default=1, ge=0, description="Optimizer state is kept with every so many versions (0: never)."
    )
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_worker_per_gpu(self) -> TrainerSection:
        if 0 < self.gpus_per_worker < 1 and self.workers > 1:
            raise ValueError(
                f"gpus_per_worker={self.gpus_per_worker:g} with workers={self.workers} may put two workers on one GPU, "
                "which NCCL refuses; set workers=1 or gpus_per_worker=1"
            )
        return self


class VersionsSection(Section):
    keep: int = Field(default=5, ge=1, description="Checkpoints kept on disk, beside the pinned ones.")
    keep_in_memory: int = Field(default=2, ge=1, description="Versions kept in the object store.")
    bucket_mib: int = Field(default=256, ge=1, description="Size of one transfer bucket.")
    canary_tolerance: float = Field(
        default=2e-2, gt=0, description="Largest |engine - trainer| canary log-probability."
    )


class GateSection(Section):
    """What a candidate must show before it serves, and what a version must keep while it serves."""

    enabled: bool = True
    held_out_share: float = Field(default=0.1, ge=0, lt=1, description="Sessions that measure and never train.")
    size: int = Field(default=64, ge=1, description="Newest held-out turns that a candidate is measured on.")
    max_seconds: float = Field(default=10.0, gt=0, description="Measuring stops here, with the turns it has.")
    min_turns: int = Field(default=8, ge=2, description="Approved (and refused) turns without which none are compared.")
    confidence: float = Field(default=0.99, gt=0.5, lt=1, description="Of each bound of a bootstrap interval.")
    recent_versions: int = Field(default=8, ge=1, description="How far back small steps are added up.")
    max_update: float = Field(default=0.2, gt=0, description="Norm of one step over the norm of the weights.")
    max_kl: float = Field(default=0.1, gt=0, description="From the parent, nats per token.")
    max_reference_kl: float = Field(default=1.0, gt=0, description="From version 0, nats per token.")
    max_approved_loss: float = Field(
        default=0.07, gt=0, description="Probability that approved tokens lose in a step, of what was left open."
    )
    max_approved_loss_recent: float = Field(default=0.15, gt=0, description="The same, since the turn was sampled.")
    max_length_ratio: float = Field(default=2.0, gt=1, description="Replies this much longer or shorter are refused.")
    max_repetition: float = Field(default=0.2, gt=0, le=1, description="Rise of the share of repeated 4-grams.")
    tolerance: float = Field(default=0.1, ge=0, description="Fall of the mean score (on -1..1) that is let pass.")
    false_alarm_turns: float = Field(default=2000, gt=1, description="Judged turns to a false rollback, in the mean.")

    @property
    def share(self) -> float:
        """Of the sessions that measure; none where there is no gate."""
        return self.held_out_share if self.enabled else 0.0


class PoolSection(Section):
    """One pool of environments; a config may have several, each as `[[pools]]`."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$", description="In the dashboard, and the user of its turns.")
    env: str = Field(description="gymnasium's name, `package:clawrl/Name-v0`; the package registers it.")
    options: dict[str, Any] = Field(default={}, description="Keyword arguments of the environment.")
    agent: Annotated[str, AfterValidator(lambda path: path and _dotted_path(path))] = Field(
        default="", description="package.module:function that acts and asks the model itself; empty: the turn loop."
    )
    agent_options: dict[str, Any] = Field(default={}, description="Keyword arguments of the agent.")
    evaluate_only: bool = Field(
        default=False, description="Held-out tasks are measured, and no attempt is made to train on: BFCL."
    )
    group_size: int = Field(default=8, ge=2, description="Attempts at one task, held against one another.")
    min_envs: int = Field(default=1, ge=0, description="Room for so many is kept when nothing is asked of the pool.")
    max_envs: int = Field(
        default=32, ge=1, description="Environments that act side by side, once there are processor shares for them."
    )
    envs_per_worker: int = Field(default=32, ge=1, le=512, description="Of them in one process, a worker.")
    spares: int = Field(
        default=0, ge=0, description="Beyond them in each worker: reset ahead, while they wait for a place to act."
    )
    cpus_per_worker: float = Field(default=0.1, ge=0, description="Its share, as Ray counts; 1 in a cluster.")
    batches_ahead: float = Field(
        default=1.0, gt=0, description="No group begins while this many batches wait for the trainer."
    )
    max_turns: int = Field(default=16, ge=1, description="Of one attempt; then it is graded as it stands.")
    max_seconds: float = Field(default=300.0, gt=0, description="Of one attempt; then it is graded as it stands.")
    max_grade_seconds: float = Field(default=120.0, gt=0, description="Of that verdict; then there is none.")
    max_close_seconds: float = Field(
        default=30.0, gt=0, description="An environment that is not closed by then has hung, and its worker with it."
    )
    heartbeat_s: float = Field(default=30.0, gt=0, description="A worker that is silent for so long is replaced.")
    idle_s: float = Field(default=60.0, gt=0, description="One that had nothing to do for so long is given up.")
    max_observation_chars: int = Field(default=16_000, ge=64, description="Longer ones lose their middle.")
    max_reply_tokens: int = Field(default=512, ge=1)
    max_images: int = Field(default=2, ge=0, description="The newest of an attempt; a word stands for each older one.")
    temperature: float = Field(default=1.0, ge=0, le=2)
    seed: int | None = Field(default=None, description="Of the order of its tasks; unset: another in every run.")

    @property
    def min_workers(self) -> int:
        return math.ceil(self.min_envs / self.envs_per_worker)

    @property
    def max_workers(self) -> int:
        return math.ceil(self.max_envs / self.envs_per_worker)

    @property
    def places(self) -> int:
        """Environments that act in one worker, so that all have about as many."""
        return math.ceil(self.max_envs / self.max_workers)

    @model_validator(mode="after")
    def _bounds(self) -> PoolSection:
        if self.min_envs > self.max_envs:
            raise ValueError(f"min_envs={self.min_envs} is above max_envs={self.max_envs}; lower it")
        if self.spares > self.places:
            raise ValueError(f"spares={self.spares} is more than the {self.places} that act in a worker; lower it")
        return self


class ChatSection(Section):
    """The simulated users of `clawrl demo`."""

    persona: Literal["student", "assistant", "teacher", "all"] = "student"
    memory: bool = Field(default=False, description="Their client keeps hints as notes and sends them along.")
    problems: str | None = Field(default=None, description="JSON Lines as GSM8K's; unset: small sums made up.")
    reply_tokens: int = Field(default=192, ge=1, description="Longest reply that they wait for.")
    simulator_url: str | None = Field(default=None, description="Base URL of a model that plays the people.")
    simulator_model: str = "default"
    conversations: int = Field(default=400, ge=1)
    concurrency: int = Field(default=12, ge=1)
    max_turns: int = Field(default=3, ge=1)
    evaluation_problems: int = Field(default=800, ge=1)
    seed: int = 0


class Config(Section):
    run_root: str = Field(default="runs", description="Each run has a folder of its own here.")
    run: str = Field(
        default="latest",
        description="`latest` goes on with the newest run, `new` begins one, else a run's folder name.",
    )
    gateway: GatewaySection = GatewaySection()
    journal: JournalSection = JournalSection()
    privacy: PrivacySection = PrivacySection()
    policy: PolicySection = PolicySection()
    judge: JudgeSection = JudgeSection()
    lora: LoraSection | None = Field(default=None, description="Without this section all weights are trained.")
    teacher: EndpointSection = EndpointSection()
    learning: LearningSection = LearningSection()
    buffer: BufferSection = BufferSection()
    trainer: TrainerSection = TrainerSection()
    versions: VersionsSection = VersionsSection()
    gate: GateSection = GateSection()
    chat: ChatSection = ChatSection()
    pools: tuple[PoolSection, ...] = Field(default=(), description="Environments to train on, each as `[[pools]]`.")

    @property
    def policy_scope(self) -> PolicyScope:
        """Whose policies are trained."""
        return "group" if self.lora is None else self.lora.policy_scope

    @property
    def judge_model(self) -> str:
        """Whose weights the judge's engine holds."""
        return self.judge.model if self.judge.engine == "own" else self.policy.model

    @property
    def initial_weights_score(self) -> bool:
        """Whether an engine with them is needed, beside whoever judges: the frozen teacher, or the KL reference."""
        learning = self.learning
        return learning.kl_weight > 0 or (learning.method != "rl" and learning.teacher == "frozen")

    @model_validator(mode="after")
    def _agree(self) -> Config:
        distils_topk = self.learning.method != "rl" and self.learning.distillation == "topk"
        if distils_topk and self.learning.support > self.policy.support:
            raise ValueError(
                f"learning.support={self.learning.support} needs as many captured tokens, but "
                f"policy.support={self.policy.support}; raise policy.support"
            )
        if self.judge.engine == "own" and self.initial_weights_score and self.judge.model != self.policy.model:
            raise ValueError(
                "the frozen teacher and the KL reference are the judge's engine, which must hold the policy's initial "
                f"weights, but judge.model={self.judge.model!r} and policy.model={self.policy.model!r}; use one model "
                "(judge.url lets another one judge), or set learning.teacher=current and learning.kl_weight=0"
            )
        if self.judge.engine == "policy" and self.lora is None:
            raise ValueError(
                "judge.engine=policy judges with the policy's initial weights, which only adapters leave as they are; "
                "add a [lora] section, or set judge.engine=own"
            )
        if self.policy_scope != "group" and self.trainer.checkpoint_every != 1:
            raise ValueError(
                f"trainer.checkpoint_every={self.trainer.checkpoint_every} with lora.policy_scope={self.policy_scope}: "
                "moments would begin anew whenever the trainer turns to another policy; set trainer.checkpoint_every=1"
            )
        if self.policy_scope == "user" and self.pools:
            raise ValueError(
                "lora.policy_scope=user leaves no policy that learns from environments; "
                "set lora.policy_scope=hierarchy, or remove [[pools]]"
            )
        if self.buffer.replay_fraction > 0 and self.journal.keep_days is not None:
            raise ValueError(
                f"journal.keep_days={self.journal.keep_days:g} deletes samples that training has passed over, which "
                f"buffer.replay_fraction={self.buffer.replay_fraction:g} would still train on; unset one of them"
            )
        if self.learning.teacher == "ema" and self.lora is None:
            raise ValueError(
                "learning.teacher=ema scores with a second adapter in the policy's engine, and there is no [lora] "
                "section; add one (lora.rank=16), or set learning.teacher=frozen or current"
            )
        if self.learning.teacher == "ema" and self.lora is not None and self.lora.in_batch < 4:
            raise ValueError(
                f"lora.in_batch={self.lora.in_batch} is too little for learning.teacher=ema: a version, its average "
                "and those that follow them are asked for at once; set lora.in_batch=4 or more"
            )
        if (self.learning.teacher == "external") != (self.teacher.url is not None):
            raise ValueError(
                f"learning.teacher={self.learning.teacher} and teacher.url={self.teacher.url} do not go together; "
                "set learning.teacher=external and the url of a vLLM server, or neither"
            )
        if self.learning.experience and (
            self.learning.method == "rl" or (self.learning.method != "opd" and self.learning.baseline != "none")
        ):
            raise ValueError(
                f"learning.experience=true with method={self.learning.method}, baseline={self.learning.baseline}: it "
                "distils, and samples are made as sessions end, which is no order for a running baseline; "
                "set learning.method=opd, or hybrid with learning.baseline=none"
            )
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools: {', '.join(names)} are not all different; give each a name of its own")
        if self.policy.max_reply_tokens >= self.policy.max_model_len:
            raise ValueError(
                f"policy.max_reply_tokens={self.policy.max_reply_tokens} leaves no room for a prompt in "
                f"policy.max_model_len={self.policy.max_model_len}; lower it"
            )
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file (or the defaults) and apply `section.key=value` overrides, later ones winning.

    Raises ConfigError naming file, key, value and what is allowed.
    """
    tree: dict[str, Any] = {}
    origin = "the built-in defaults"
    if path is not None:
        origin = str(path)
        try:
            tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"config {origin} cannot be read: {error.strerror}; give an existing TOML file"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"config {origin} is not valid TOML: {error}") from error
    for word in overrides:
        _apply_override(tree, word)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, origin)) from None


def model_path(model: str) -> str:
    """The folder of a model on this machine; `clawrl:tiny` is the one inside the package.

    Raises ConfigError if a path-like name does not exist. Other names are left to the Hugging Face cache.
    """
    if model.startswith("clawrl:"):
        folder = Path(str(resources.files("clawrl"))) / "models" / model.removeprefix("clawrl:")
    else:
        folder = Path(lasting_name(model))
        if not folder.is_absolute():
            return model
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model {model!r} is not a model folder ({folder} has no config.json); check the path")
    return str(folder.resolve())


def load_function(key: str, path: str) -> Callable[..., Any]:
    """The function that `package.module:name` names. Raises ConfigError, naming the key, if there is none."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise ConfigError(
            f"{key}={path!r} cannot be imported ({type(error).__name__}: {error}); "
            "name a function of an importable module as package.module:function"
        ) from error
    if not callable(function):
        raise ConfigError(f"{key}={path!r} is no function but a {type(function).__name__}; name a function")
    return function


def load_heuristics(judge: JudgeSection) -> Callable[..., int | None] | None:
    """What `judge.heuristics` names. Raises ConfigError if it cannot be had."""
    if judge.heuristics is None:
        return None
    own = "clawrl.algorithms.heuristics:read_off"
    return load_function("judge.heuristics", own if judge.heuristics == "default" else judge.heuristics)


def _apply_override(tree: dict[str, Any], word: str) -> None:
    key, separator, text = word.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {word!r} is not of the form section.key=value")
    *sections, name = key.strip().split(".")
    place: Any = tree
    for section in sections:
        if isinstance(place, list):
            place = place[_index(word, place, section)]
        elif isinstance(place, dict):
            place = place.setdefault(section, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"override {word!r}: {section!r} is not a section")
    if isinstance(place, list):
        raise ConfigError(f"override {word!r}: say which key of it, such as {'.'.join(sections)}.0.KEY=value")
    place[name] = _parse_value(text.strip())


def _index(word: str, sections: list[Any], number: str) -> int:
    """Which of several sections of one name (`[[pools]]`), from 0."""
    if not number.isdecimal() or int(number) >= len(sections):
        raise ConfigError(f"override {word!r}: {number!r} is not a number below {len(sections)}")
    return int(number)


def _parse_value(text: str) -> Any:
    """TOML/JSON scalars and lists where they parse, else the plain string."""
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _explain(error: ValidationError, origin: str) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "config"
        if item["type"] == "extra_forbidden":
            lines.append(f"{key} is not a key; allowed here: {', '.join(_allowed(item['loc'][:-1]))}")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            value = "" if isinstance(item["input"], dict) else f" = {_shown(item['input'])}"
            lines.append(f"{key}{value}: {reason}")
    return f"config {origin}: " + "; ".join(lines)


def _allowed(location: tuple[Any, ...]) -> list[str]:
    model: Any = Config
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        annotation = next((each for each in get_args(annotation) if each is not type(None)), annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
