"""The judge: a frozen model that votes on replies, writes hints, and scores tokens as the teacher.

Knows the engine and the questions of `judging`. Ignores the journal, baselines and samples: the collector asks,
a `Judgement` comes back. It holds the initial weights for good, so it is also the frozen teacher and the reference.
It has an engine of its own (`Judge`), or the policy's, whose versions are adapters (`PolicyAndJudge`). With `judge.url`
another model answers the questions, beside such an engine, or alone where no token is scored (`OutsideJudge`).
With `judge.reward_model` a model trained on thumbs votes on replies in the place of those questions' answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clawrl.config import JudgeSection, PolicySection, load_heuristics
from clawrl.errors import JudgeError, boundary
from clawrl.observe import metric
from clawrl.serving import judging
from clawrl.serving.endpoint import Endpoint, RefusedError
from clawrl.serving.engine import Engine, Scorer, start_engine
from clawrl.serving.policy import Adapters, Policy
from clawrl.serving.reward_model import RewardModel
from clawrl.types import Judgement, Message, NextState, Turn

log = logging.getLogger(__name__)

INITIAL = 0
"""The version that judges."""
SHORTEST_VERDICT = 8  # tokens; a question that leaves less room cannot be answered

Votes = tuple[int | None, ...]


class Judging:
    """The questions, whoever answers them."""

    _engine: Engine
    _reward: RewardModel | None = None

    def _judge_with(self, settings: JudgeSection, hints: bool) -> None:
        """`hints` false asks for votes only (a method that distils nothing needs no hints)."""
        self._judging = settings
        self._hints = hints
        self._prompts = judging.load_prompts(settings.prompts)
        self._outside = None if settings.url is None else Endpoint(settings, settings.timeout_s)
        self._heuristics = load_heuristics(settings)

    def _load_reward_model(self, base: str, gpus: float) -> None:
        """The one of judge.reward_model, if there is one: on the replica's GPU if it has one."""
        if self._judging.reward_model is not None:
            self._reward = RewardModel.load(self._judging.reward_model, base, "cuda" if gpus else "cpu")
            self._reading = ThreadPoolExecutor(1, "reward-model")  # one reply at a time, beside the loop

    async def judge(self, turn: Turn, next_state: NextState) -> Judgement:
        """Votes and hints for one turn, m of each, asked side by side; by heuristics or a reward model one vote.

        Raises JudgeError when the engine fails, or the model elsewhere is not reached. An answer that cannot be read is
        a vote of None; a question that does not fit into the context, or is refused, abstains.
        """
        evidence = (self._prompts, turn.messages, turn.reply, next_state)
        if (said := self._read_off(turn, next_state)) is not None:
            votes = _one(said)
        else:
            votes = self._votes(judging.evaluative(*evidence)) if self._reward is None else self._reward_vote(turn)
        return await self._judgement(turn, votes, judging.directive(*evidence) if self._hints else None)

    def _read_off(self, turn: Turn, next_state: NextState) -> int | None:
        """What the heuristics say, if there are any. Raises JudgeError for one that breaks, or says something else."""
        if self._heuristics is None:
            return None
        with boundary(JudgeError, f"judge.heuristics={self._judging.heuristics!r} on turn {turn.id}"):
            said = self._heuristics(turn, next_state)
        if said not in (-1, 0, 1, None):
            raise JudgeError(f"judge.heuristics={self._judging.heuristics!r} says {said!r}, not -1, 0, 1 or None")
        return said

    async def judge_step(self, turn: Turn, next_state: NextState) -> Judgement:
        """Votes on one step of an episode, in the light of its task and history, whoever votes on replies."""
        question = judging.step(self._prompts, turn.messages, turn.reply, next_state)
        return await self._judgement(turn, self._votes(question), None)

    def _voting(self) -> dict[str, str]:
        """For the status: who votes, if not who is asked."""
        return {} if self._judging.reward_model is None else {"reward_model": self._judging.reward_model}

    async def lesson(
        self, exchanges: Sequence[tuple[Turn, NextState | None]], hints: tuple[tuple[str, ...], ...]
    ) -> str | None:
        """What a whole session teaches, as short rules; None: nothing. `hints` are those found at each turn.

        Raises JudgeError when the engine fails, or the model elsewhere is not reached or refuses.
        """
        if self._prompts.lesson is None:
            return judging.gather_hints(hints)
        with boundary(JudgeError, "reading a session"):
            [answer] = await self._ask(judging.lesson(self._prompts, exchanges), votes=1)
        return judging.parse_list(answer)

    async def _judgement(self, turn: Turn, votes: Awaitable[Votes], directive: list[Message] | None) -> Judgement:
        """The judgement by votes that are on their way, and by the answers to a question for hints, if it is asked."""
        started = time.perf_counter()
        try:
            with boundary(JudgeError, f"judging turn {turn.id}"):
                cast, hints = await asyncio.gather(votes, self._found_hints(directive))
        except RefusedError as refusal:
            seconds = time.perf_counter() - started
            return Judgement(turn.id, (), None, (), INITIAL, seconds, str(refusal), time.time())
        seconds = time.perf_counter() - started
        metric("judge/latency_s").observe(seconds)
        score = judging.plurality(cast)
        return Judgement(turn.id, cast, score, hints, INITIAL, seconds, None, time.time())

    async def _votes(self, question: list[Message]) -> Votes:
        return tuple(judging.parse_vote(text) for text in await self._ask(question, self._judging.votes))

    async def _reward_vote(self, turn: Turn) -> Votes:
        """The reward model's verdict on the reply's exact tokens."""
        assert self._reward is not None
        ids = turn.capture.prompt_ids, turn.capture.completion_ids
        return (await asyncio.get_running_loop().run_in_executor(self._reading, self._reward.verdict, *ids),)

    async def _found_hints(self, directive: list[Message] | None) -> tuple[str, ...]:
        if directive is None:
            return ()
        return judging.dedupe_hints(map(judging.parse_hint, await self._ask(directive, self._judging.votes)))

    async def _ask(self, question: list[Message], votes: int) -> list[str]:
        """So many sampled answers to one question. Raises RefusedError for a question that cannot be answered."""
        if self._outside is None:
            return await self._ask_engine(await self._engine.render(question, (), {}), votes)
        asked = [self._ask_outside(self._outside, question) for _ in range(votes)]
        return await asyncio.gather(*asked)  # not one request with n: few servers know it

    async def _ask_outside(self, outside: Endpoint, question: list[Message]) -> str:
        settings = self._judging
        body = {
            "model": settings.served_name,
            "messages": question,
            "temperature": settings.temperature,
            "max_tokens": settings.max_verdict_tokens,
        }
        answer = await outside.post(f"{outside.url}/chat/completions", body)
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise RefusedError(f"{outside.url} answers no chat completion; check judge.url") from None

    async def _ask_engine(self, prompt_ids: list[int], votes: int) -> list[str]:
        """The prompt is read once."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        settings = self._judging
        limit = self._engine.max_model_len
        if len(prompt_ids) + SHORTEST_VERDICT > limit:
            section = "judge" if settings.engine == "own" else "policy"
            raise RefusedError(f"the question has {len(prompt_ids)} tokens; raise {section}.max_model_len={limit}")
        params = SamplingParams(
            n=votes,
            temperature=settings.temperature,
            max_tokens=min(settings.max_verdict_tokens, limit - len(prompt_ids)),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        texts: dict[int, str] = {}
        prompt = {"prompt_token_ids": prompt_ids}
        async for output in self._engine.generate_initial(prompt, params, f"judge-{uuid.uuid4().hex}"):
            texts.update((completion.index, completion.text) for completion in output.outputs)
        return [texts[index] for index in sorted(texts)]


async def _one(vote: int) -> Votes:
    return (vote,)


class Judge(Judging, Scorer):
    """One replica with an engine of its own."""

    async def __init__(self, settings: JudgeSection, hints: bool) -> None:
        self._judge_with(settings, hints)
        await self._adopt(await start_engine(settings))
        self._load_reward_model(settings.model, settings.gpus_per_replica)

    async def status(self) -> dict[str, Any]:
        asked = {} if self._outside is None else {"asked": self._outside.url}
        return {"model": self._judging.model, **asked, **self._voting(), "streams": self._engine.streams}


class PolicyAndJudge(Judging, Policy):
    """One replica of both: the policy's engine, and the judge in it without the policy's adapter."""

    async def __init__(
        self, settings: PolicySection, store: tuple[Any, str], adapters: Adapters, judging: JudgeSection, hints: bool
    ) -> None:
        self._judge_with(judging, hints)
        await Policy.__init__(self, settings, store, adapters)
        self._load_reward_model(settings.model, settings.gpus_per_replica)


class OutsideJudge(Judging):
    """One replica without an engine: it asks, and can score nothing."""

    async def __init__(self, settings: JudgeSection, hints: bool) -> None:
        self._judge_with(settings, hints)
        self._load_reward_model(settings.model, gpus=0)

    async def status(self) -> dict[str, Any]:
        return {"model": self._judging.served_name, "asked": self._judging.url, **self._voting()}
