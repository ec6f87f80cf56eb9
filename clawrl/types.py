"""The records that travel between components: frozen, compared by value of their fields, free of behaviour.

Knows only the standard library and numpy. Ignores how records are stored (`journal`), transported (Ray) or
made. Arrays are numpy arrays with the shape and type written beside each field; P counts prompt tokens, T reply
tokens, L = P + T, k entries per position. Absence is None, never a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Message = dict[str, Any]
"""One OpenAI chat message, as it stood on the wire."""

Tool = dict[str, Any]
"""One OpenAI tool definition, as it stood on the wire."""

TurnKind = Literal["main", "side"]
Role = Literal["user", "tool", "env"]
EpisodeStatus = Literal["done", "truncated", "timeout", "error", "lost"]
"""Ended by itself; cut short by a limit, or its agent broke off; out of time; something broke; its worker died."""
VersionState = Literal["candidate", "serving", "retired", "rejected"]
PolicyScope = Literal["group", "user", "hierarchy"]
"""Who has a policy of their own: everyone one together, each user, or both."""
ScoringWeights = Literal["frozen", "current", "ema"]
"""Whose log-probabilities: the model as configured, the version of the moment, or the moving average beside it."""
EMA = "ema/"
"""So begin the names of a version's tensors that are its moving average, which teaches, and answers nobody."""

GROUP = ""
"""The scope of the policy that everyone has together; any other is the name of the user who alone has it."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Reply tokens [start, end) were sampled under one weight version."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """What the engine sampled for one reply, exactly as it sampled it.

    `logprobs` and `top_logprobs` are log-softmax of the raw logits (temperature 1, before any truncation), so that
    ratios, teachers and references are compared in one space.
    """

    prompt_ids: np.ndarray  # i32[P]
    completion_ids: np.ndarray  # i32[T]
    logprobs: np.ndarray  # f32[T]
    top_ids: np.ndarray  # i32[T, k], most likely first
    top_logprobs: np.ndarray  # f32[T, k]
    versions: tuple[VersionSpan, ...]

    def __post_init__(self) -> None:
        num_tokens = len(self.completion_ids)
        _require_rows("Capture", num_tokens, logprobs=self.logprobs, top_ids=self.top_ids)
        _require_shape("Capture", "top_logprobs", self.top_logprobs, self.top_ids.shape)
        covered = sum(span.end - span.start for span in self.versions)
        if covered != num_tokens:
            raise ValueError(f"Capture.versions cover {covered} tokens of {num_tokens}")


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One language-model call of a session: request, reply and the tokens that made it."""

    id: str  # the OpenAI response id
    user: str
    session: str
    index: int  # 0-based position in the session
    kind: TurnKind
    source: str  # "chat", or the environment's name
    group: str | None  # rollouts of one task share a group
    messages: tuple[Message, ...]  # the request's messages
    tools: tuple[Tool, ...]
    template: dict[str, Any]  # the request's chat_template_kwargs
    reply: Message
    finish_reason: str
    conversation: str  # digest of messages + reply: what the history of a continuation digests to
    capture: Capture
    started: float  # seconds since the epoch
    ended: float
    request: str = ""  # digest of the request's prompt: the same request again is the same turn
    key: str | None = None  # the client's idempotency key, by user; None too if another turn had it before
    reason: str = ""  # why it is main or side, and in this session
    parent: str | None = None  # the turn whose conversation it goes on with: turns of a session are a tree


@dataclass(frozen=True, slots=True)
class NextState:
    """What followed a turn's reply in its session: all new messages, parallel tool results too."""

    turn: str
    role: Role
    messages: tuple[Message, ...]
    done: bool  # the session ended here
    at: float


@dataclass(frozen=True, slots=True)
class Feedback:
    """Explicit feedback on a turn: thumbs (score) or a correction (text); at least one of them."""

    id: str
    turn: str
    user: str
    score: Literal[-1, 0, 1] | None
    text: str | None
    at: float

    def __post_init__(self) -> None:
        if self.score is None and self.text is None:
            raise ValueError("Feedback needs a score or a text")


@dataclass(frozen=True, slots=True)
class Episode:
    """How one attempt at a task ended; its turns are those of its session. Whatever happened, it is data."""

    session: str  # X-Session-Id of its turns
    source: str  # the environment's name
    group: str  # attempts that are compared with one another: the same task under the same versions
    task: str
    group_size: int  # attempts the group was given; it is complete when so many have ended
    status: EpisodeStatus
    outcome: float | None  # verdict in [-1, 1]; None: there is none, the attempt says nothing of the policy
    rewards: tuple[float, ...]  # of each step, without the outcome
    reason: str  # what cut it short or broke it; empty where it ended by itself
    seconds: float
    at: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """All attempts of a group have ended and were held against one another; it is done once."""

    group: str
    source: str
    task: str
    outcomes: tuple[float, ...]  # of the attempts that have one
    samples: int  # made of their turns; 0 where all went alike
    at: float
    reward: float | None = None  # mean of their steps', with the judge's votes; None: the outcome alone counts


@dataclass(frozen=True, slots=True)
class Judgement:
    """The judge's view of a turn, or of a step of an episode, in the light of its next state."""

    turn: str
    votes: tuple[int | None, ...]  # -1, 0, +1, or None where a vote could not be read
    score: int | None  # plurality; tie = 0; no valid vote = None (abstains)
    hints: tuple[str, ...]  # all accepted hints, without duplicates, shortest first
    judge_version: int
    seconds: float
    error: str | None  # why the judge abstained altogether (timeout, engine failure)
    at: float
    deferred: bool = False  # the turn's sample waits for what its whole session teaches, see Lesson


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a session that has ended teaches one of its turns: rules in words, which the teacher reads."""

    turn: str
    text: str | None  # None: it teaches nothing
    error: str | None  # why the judge wrote nothing (timeout, engine failure)
    at: float


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """A model's log-probabilities of given reply tokens (teacher, reference, canary)."""

    logprobs: np.ndarray  # f32[T]
    top_ids: np.ndarray  # i32[T, K], most likely first
    top_logprobs: np.ndarray  # f32[T, K]
    version: int

    def __post_init__(self) -> None:
        _require_rows("Scores", len(self.logprobs), top_ids=self.top_ids)
        _require_shape("Scores", "top_logprobs", self.top_logprobs, self.top_ids.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Distillation:
    """Token-level target over a support of k tokens per position; `valid` marks the entries that count."""

    support: np.ndarray  # i32[L, k]
    behaviour_logprobs: np.ndarray  # f32[L, k]
    advantages: np.ndarray  # f32[L, k]
    valid: np.ndarray  # bool[L, k]

    def __post_init__(self) -> None:
        for name in ("behaviour_logprobs", "advantages", "valid"):
            _require_shape("Distillation", name, getattr(self, name), self.support.shape)


@dataclass(frozen=True, slots=True, eq=False)
class TeacherTop:
    """The teacher's likeliest tokens at every position, for the divergence from it; the others are one bin."""

    ids: np.ndarray  # i32[L, K]
    logprobs: np.ndarray  # f32[L, K], -inf where no token was named
    weights: np.ndarray  # f32[L], what the position's divergence counts in the loss; 0: not at all

    def __post_init__(self) -> None:
        _require_shape("TeacherTop", "logprobs", self.logprobs, self.ids.shape)
        _require_rows("TeacherTop", len(self.ids), weights=self.weights)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One turn as the trainer sees it: tokens and token-level targets, no algorithm.

    Position t holds the target of token t itself (its log-probability given tokens < t); `loss_mask` is true on
    reply tokens only.
    """

    id: str  # the turn's id: one turn makes at most one sample
    user: str
    source: str
    token_ids: np.ndarray  # i32[L]
    loss_mask: np.ndarray  # bool[L]
    logprobs: np.ndarray  # f32[L], behaviour; 0 outside the mask
    advantages: np.ndarray | None  # f32[L]; None: no policy-gradient term
    distillation: Distillation | None
    reference_logprobs: np.ndarray | None  # f32[L]; None: no KL term
    oldest_version: int
    newest_version: int
    weight: float
    at: float
    held_out: bool = False  # never trained on: the gate measures candidates with it
    teacher_top: TeacherTop | None = None  # None: no divergence from a teacher
    policy_scope: PolicyScope = "group"  # whose policies learn from it, each once: everyone's, the user's, or both

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        _require_rows("Sample", length, loss_mask=self.loss_mask, logprobs=self.logprobs)
        if self.advantages is not None:
            _require_rows("Sample", length, advantages=self.advantages)
        if self.reference_logprobs is not None:
            _require_rows("Sample", length, reference_logprobs=self.reference_logprobs)
        if self.distillation is not None:
            _require_rows("Sample", length, distillation=self.distillation.support)
        if self.teacher_top is not None:
            _require_rows("Sample", length, teacher_top=self.teacher_top.ids)
        if not self.loss_mask.any():
            raise ValueError(f"Sample {self.id} has no trained token")


@dataclass(frozen=True, slots=True, eq=False)
class Canary:
    """Fixed token sequences and the log-probabilities the trainer gives each token after the first."""

    token_ids: tuple[np.ndarray, ...]  # i32[Lᵢ]
    logprobs: tuple[np.ndarray, ...]  # f32[Lᵢ - 1]


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Some tensors of a version as they travel: row-major arrays under the checkpoint's names.

    numpy has no bfloat16: such a tensor travels as u16 bits, and `dtypes` says what the bits mean.
    """

    names: tuple[str, ...]
    dtypes: tuple[str, ...]  # "float32" | "bfloat16" | "float16"
    shapes: tuple[tuple[int, ...], ...]
    arrays: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        rows = len(self.names)
        _require_rows("Bucket", rows, dtypes=self.dtypes, shapes=self.shapes, arrays=self.arrays)  # type: ignore[arg-type]
        for name, shape, array in zip(self.names, self.shapes, self.arrays, strict=True):
            _require_shape("Bucket", name, array, shape)


@dataclass(frozen=True, slots=True, eq=False)
class Publication:
    """What a serving replica is told about the version it should take over: everything but the tensors."""

    number: int
    num_buckets: int
    canary: Canary
    adapter: dict[str, Any] | None = None  # PEFT's description, where the tensors are an adapter's
    scope: str = GROUP  # whose requests it is for


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """What a serving replica is told of a user who has no policy of their own any more: they get everyone's."""

    scope: str


@dataclass(frozen=True, slots=True, eq=False)
class WeightVersion:
    """A numbered set of weights. Version 0 is the model as configured, before any training."""

    number: int
    parent: int | None
    kind: Literal["full", "lora"]
    checkpoint: str | None  # folder with safetensors, on the weight store's machine
    samples: tuple[str, ...]  # ids of the samples that made it
    metrics: dict[str, float]
    at: float
    scope: str = GROUP  # whose policy it is


@dataclass(frozen=True, slots=True)
class VersionEvent:
    """A version entered a state; the latest event holds."""

    version: int
    state: VersionState
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Swap:
    """One replica took over one version."""

    version: int
    replica: str
    stall_ms: float  # how long the engine stood paused
    canary_error: float | None  # largest |engine - trainer| log-probability over the canary
    canary_moved: float | None  # largest change of the engine's own canary log-probabilities
    at: float


@dataclass(frozen=True, slots=True)
class Pin:
    """A version's checkpoint is kept for good (or no longer); the latest pin of a version holds."""

    version: int
    pinned: bool
    at: float


@dataclass(frozen=True, slots=True)
class GateCheck:
    """One measurement of the gate; an unbounded side, or an interval that was not needed, is None."""

    name: str
    value: float
    low: float | None  # bootstrap interval
    high: float | None
    bound: str  # what was asked of it, in words
    passed: bool


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Why a version may serve, or no longer: before it served anybody, or by what people said to it after."""

    version: int
    stage: Literal["before", "after"]
    passed: bool
    reason: str
    checks: tuple[GateCheck, ...]
    seconds: float
    at: float


@dataclass(frozen=True, slots=True)
class Consent:
    """Whether a user (session None) or one session of theirs is recorded and trained on; the latest word of each holds.

    With a conversation it is no word of the user's but a mark: this conversation was served unrecorded.
    """

    user: str
    session: str | None
    train: bool
    at: float
    conversation: str | None = None  # digest of its messages and reply, see Turn.conversation


@dataclass(frozen=True, slots=True)
class Erasure:
    """The content of a user or a session was deleted. What is kept says nothing of what was said."""

    user: str
    session: str | None  # None: all of the user's
    turns: int
    versions: tuple[int, ...]  # those that had learnt from it
    restored: int | None  # the version training went back to; None: none was rejected
    at: float


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples leased for one optimizer step."""

    step: int
    samples: tuple[Sample, ...] = field(default_factory=tuple)
    scope: str = GROUP  # whose policy learns from it


def _require_rows(record: str, rows: int, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        if len(array) != rows:
            raise ValueError(f"{record}.{name} has {len(array)} rows, expected {rows}")


def _require_shape(record: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{record}.{name} has shape {array.shape}, expected {shape}")


NOT_KEPT = Capture(
    prompt_ids=np.empty(0, np.int32),
    completion_ids=np.empty(0, np.int32),
    logprobs=np.empty(0, np.float32),
    top_ids=np.empty((0, 0), np.int32),
    top_logprobs=np.empty((0, 0), np.float32),
    versions=(),
)
"""The capture of a turn whose tokens are not kept: they would spell what was redacted. Any other has prompt tokens."""
