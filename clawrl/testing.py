"""A policy and a judge small enough to follow by hand, with the methods of the real deployments.

Knows records only: a byte-level bigram language model whose every log-probability is a true log-softmax, and a judge
that reads its verdict from the next state. Ignores vLLM, templates and GPUs. They are deterministic, need no model
file, and run as plain objects or as Ray actors (`ray.remote(ScriptedJudge).remote()`): for tests of whatever stands
around a model, in this repository and in its users'.

    policy = ScriptedPolicy(seed=0)
    turn = policy.turn([{"role": "user", "content": "hello"}], num_tokens=12)
    judge = ScriptedJudge()
    await judge.judge(turn, NextState(turn.id, "user", ({"role": "user", "content": "-1 hint: be brief"},), False, 0.0))
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from clawrl.errors import JudgeError, PolicyError
from clawrl.types import Capture, Judgement, Message, NextState, Scores, ScoringWeights, Tool, Turn, VersionSpan

VOCABULARY = 256
"""Tokens are UTF-8 bytes."""

_SCORES = {"+1": 1, "1": 1, "-1": -1, "0": 0}


class ScriptedModel:
    """Bigram logits plus a pull from the bag of prompt tokens, so that a hint in the prompt changes every reply token.

    Each weight version moves the bigram table a little; version 0 is the initial model.
    """

    def __init__(self, seed: int = 0, version: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.version = version
        self._context = rng.normal(size=(VOCABULARY, VOCABULARY))
        self._bigram = rng.normal(size=(VOCABULARY, VOCABULARY))
        if version:
            self._bigram = self._bigram + 0.1 * np.random.default_rng((seed, version)).normal(size=self._bigram.shape)

    def logprobs(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
        """f64[T, V]: the log-softmax at every reply position, given prompt i32[P] and reply i32[T]."""
        bag = np.bincount(prompt_ids, minlength=VOCABULARY) / max(1, len(prompt_ids))
        before = np.concatenate([prompt_ids[-1:], completion_ids[:-1]]) if len(completion_ids) else completion_ids
        logits = self._bigram[before] + 8.0 * (bag @ self._context)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def score(self, prompt_ids: np.ndarray, completion_ids: np.ndarray, top: int) -> Scores:
        """The reply's log-probabilities and the `top` likeliest tokens of every position."""
        table = self.logprobs(prompt_ids, completion_ids)
        ids = np.argsort(-table, axis=-1, kind="stable")[:, :top].astype(np.int32)
        return Scores(
            logprobs=np.take_along_axis(table, completion_ids[:, None], -1)[:, 0].astype(np.float32),
            top_ids=ids,
            top_logprobs=np.take_along_axis(table, ids, -1).astype(np.float32),
            version=self.version,
        )

    def sample(self, prompt_ids: np.ndarray, num_tokens: int, rng: np.random.Generator) -> np.ndarray:
        """i32[num_tokens] drawn at temperature 1."""
        reply = np.zeros(0, np.int32)
        for _ in range(num_tokens):
            probabilities = np.exp(self.logprobs(prompt_ids, np.append(reply, 0).astype(np.int32))[-1])
            reply = np.append(reply, rng.choice(VOCABULARY, p=probabilities / probabilities.sum())).astype(np.int32)
        return reply


class ScriptedPolicy:
    """The policy deployment's scoring methods over a ScriptedModel, and turns that it sampled itself."""

    def __init__(self, seed: int = 0, version: int = 0, max_model_len: int = 4096) -> None:
        self._seed = seed
        self._model = ScriptedModel(seed, version)
        self._max_model_len = max_model_len
        self._num_turns = 0

    async def score_ids(
        self, prompt_ids: np.ndarray, completion_ids: np.ndarray, top: int, *, weights: ScoringWeights = "current"
    ) -> Scores:
        """Log-probabilities of exact reply ids after exact prompt ids. Raises PolicyError beyond the context."""
        if len(prompt_ids) + len(completion_ids) > self._max_model_len:
            raise PolicyError(
                f"{len(prompt_ids)} prompt and {len(completion_ids)} reply tokens exceed "
                f"max_model_len={self._max_model_len}; raise it or shorten the prompt"
            )
        model = ScriptedModel(self._seed, 0) if weights == "frozen" else self._model
        return model.score(prompt_ids, completion_ids, top)

    async def score_messages(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template: dict[str, Any],
        completion_ids: np.ndarray,
        top: int,
        *,
        weights: ScoringWeights = "current",
        user: str = "",
    ) -> Scores:
        """Log-probabilities of exact reply ids after rendered messages, the same for every user."""
        return await self.score_ids(render(messages, tools, template), completion_ids, top, weights=weights)

    def turn(
        self,
        messages: Sequence[Message],
        num_tokens: int = 8,
        *,
        user: str = "user",
        session: str = "session",
        index: int = 0,
        support: int = 4,
        finish_reason: str = "stop",
    ) -> Turn:
        """A main turn with a sampled reply of `num_tokens`; equal policies give equal turns in equal order."""
        self._num_turns += 1
        prompt_ids = render(messages, (), {})
        completion_ids = self._model.sample(
            prompt_ids, num_tokens, np.random.default_rng((self._seed, self._num_turns))
        )
        scores = self._model.score(prompt_ids, completion_ids, support)
        version = self._model.version
        reply = {"role": "assistant", "content": bytes(completion_ids.tolist()).decode("latin-1")}
        conversation = hashlib.sha256(json.dumps([*messages, reply]).encode()).hexdigest()
        return Turn(
            id=f"scripted-{self._seed}-{self._num_turns}",
            user=user,
            session=session,
            index=index,
            kind="main",
            source="chat",
            group=None,
            messages=tuple(messages),
            tools=(),
            template={},
            reply=reply,
            finish_reason=finish_reason,
            conversation=conversation,
            capture=Capture(
                prompt_ids=prompt_ids,
                completion_ids=completion_ids,
                logprobs=scores.logprobs,
                top_ids=scores.top_ids,
                top_logprobs=scores.top_logprobs,
                versions=(VersionSpan(version, 0, num_tokens),) if num_tokens else (),
            ),
            started=0.0,
            ended=0.0,
        )


class ScriptedJudge(ScriptedPolicy):
    """The judge deployment's methods: verdicts are read from the next state, scores come from version 0.

    The next state's last message is a line of words: `+1`, `-1`, `0` or `?` (abstains), then optionally
    `wait:<seconds>`, then optionally `hint: <hint>; <hint>`, as in `-1 wait:0.2 hint: be brief`.
    """

    def __init__(self, seed: int = 0, max_model_len: int = 4096, votes: int = 3) -> None:
        super().__init__(seed, 0, max_model_len)
        self._votes = votes
        self._at_once = self._most_at_once = 0

    async def judge(self, turn: Turn, next_state: NextState) -> Judgement:
        """The scripted verdict. Raises JudgeError where the next state is not in the script's form."""
        started = time.time()
        verdict, _, hints = str(next_state.messages[-1].get("content", "")).partition("hint:")
        word, *rest = verdict.split() or [""]
        if word != "?" and word not in _SCORES:
            raise JudgeError(f"a scripted next state starts with one of {', '.join(_SCORES)} or ?, not {word!r}")
        self._at_once += 1
        self._most_at_once = max(self._most_at_once, self._at_once)
        for part in rest:
            await asyncio.sleep(float(part.removeprefix("wait:")))
        self._at_once -= 1
        score = _SCORES.get(word)
        return Judgement(
            turn=turn.id,
            votes=(score,) * self._votes,
            score=score,
            hints=tuple(sorted((hint.strip() for hint in hints.split(";") if hint.strip()), key=len)),
            judge_version=0,
            seconds=time.time() - started,
            error=None,
            at=time.time(),
        )

    async def judge_step(self, turn: Turn, next_state: NextState) -> Judgement:
        """The scripted verdict, without hints."""
        return replace(await self.judge(turn, next_state), hints=())

    async def lesson(
        self, exchanges: Sequence[tuple[Turn, NextState | None]], hints: tuple[tuple[str, ...], ...]
    ) -> str | None:
        """Every hint of the session. Raises JudgeError where one of them is `fail`."""
        every = [hint for of_turn in hints for hint in of_turn]
        if "fail" in every:
            raise JudgeError("the script says so")
        return "; ".join(every) or None

    async def most_at_once(self) -> int:
        """The largest number of turns judged side by side so far."""
        return self._most_at_once


def next_state(turn: Turn, script: str, at: float = 0.0) -> NextState:
    """What follows a turn: one user message in the form a ScriptedJudge reads."""
    return NextState(turn.id, "user", ({"role": "user", "content": script},), done=False, at=at)


def render(messages: Sequence[Message], tools: Sequence[Tool], template: dict[str, Any]) -> np.ndarray:
    """i32[P]: the bytes of messages, tools and template arguments as JSON; any change of them changes the ids."""
    text = json.dumps([list(messages), list(tools), template], sort_keys=True, ensure_ascii=False)
    return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
