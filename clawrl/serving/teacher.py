"""The teacher elsewhere: log-probabilities of a reply's exact tokens, from a vLLM server that others run.

Knows what vLLM's OpenAI server adds to the protocol: `/tokenize`, which renders a conversation as its chat would, and
`prompt_logprobs` of a completion whose prompt is token ids. Ignores hints and what is learnt from them.

    messages ─ /tokenize ─► prompt ids + the reply's ids ─ /v1/completions, prompt_logprobs ─► the reply's rows

Student and teacher are compared token id by token id, so both must have one tokenizer and one chat template: a server
that renders other ids than the policy's is refused before anything starts (`require_teacher`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clawrl.config import EndpointSection, model_path
from clawrl.errors import ConfigError, JudgeError
from clawrl.serving.endpoint import Endpoint, RefusedError
from clawrl.types import GROUP, Message, Scores, ScoringWeights, Tool

START_S = 30.0
"""How long a server is waited for before a start is refused."""
VERSION = 0
"""Its weights never change."""

_TOOL: Tool = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "What is known of a thing.",
        "parameters": {"type": "object", "properties": {"thing": {"type": "string"}}, "required": ["thing"]},
    },
}
PROBES: tuple[tuple[list[Message], list[Tool]], ...] = (
    ([{"role": "user", "content": "Tom has 3 apples and buys 1,024 more. How many?"}], []),
    (
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "def f(x):\n\treturn x ** 2  # naïve, 数, 🙂"},
            {"role": "assistant", "content": "It squares x."},
            {"role": "user", "content": "  And  this? "},
        ],
        [],
    ),
    ([{"role": "user", "content": "Look up pens."}], [_TOOL]),
)
"""Conversations whose tokens show how a server renders: figures, code, other scripts, a system message, tools."""


class OutsideTeacher:
    """Actor. `settings` must have a url."""

    def __init__(self, settings: EndpointSection, timeout_s: float) -> None:
        self._endpoint = Endpoint(settings, timeout_s)
        self._model = settings.served_name

    async def score_messages(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        template: dict[str, Any],
        completion_ids: np.ndarray,
        top: int,
        *,
        weights: ScoringWeights = "current",
        user: str = GROUP,
    ) -> Scores:
        """Log-probabilities of exact reply ids [T] after the rendered messages, and the `top` best at each position.

        Its weights are its own, which `weights` does not choose, and the same for every user.

        Raises JudgeError if the server refuses, is not reached in time, or answers for other tokens.
        """
        prompt_ids = await self.render(messages, tools, template)
        body = {
            "model": self._model,
            "prompt": [*prompt_ids, *completion_ids.tolist()],
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": top,
        }
        answer = await self._endpoint.post(f"{self._endpoint.url}/completions", body)
        try:
            rows = answer["choices"][0]["prompt_logprobs"][len(prompt_ids) :]
        except (KeyError, IndexError, TypeError):
            raise RefusedError(f"{self._endpoint.url} gives no prompt_logprobs; the teacher must be vLLM's") from None
        return scores_of(rows, completion_ids, top)

    async def render(self, messages: Sequence[Message], tools: Sequence[Tool], template: dict[str, Any]) -> list[int]:
        """Prompt ids of a conversation, ready for the assistant's reply."""
        body = {
            "model": self._model,
            "messages": list(messages),
            "tools": list(tools) or None,
            "chat_template_kwargs": template or None,
        }
        answer = await self._endpoint.post(f"{self._endpoint.url.removesuffix('/v1')}/tokenize", body)
        if not isinstance(answer.get("tokens"), list):
            raise RefusedError(f"{self._endpoint.url} cannot /tokenize a conversation; the teacher must be vLLM's")
        return answer["tokens"]


def scores_of(rows: Sequence[dict[str, dict[str, Any]]], completion_ids: np.ndarray, top: int) -> Scores:
    """vLLM's `prompt_logprobs` of a reply, a row per token: by token id (as text), its logprob and its rank from 1."""
    if len(rows) != len(completion_ids):
        raise JudgeError(f"the teacher scored {len(rows)} tokens of a reply of {len(completion_ids)}")
    logprobs = np.empty(len(rows), np.float32)
    top_ids = np.empty((len(rows), top), np.int32)
    top_logprobs = np.empty((len(rows), top), np.float32)
    for at, (row, token) in enumerate(zip(rows, completion_ids.tolist(), strict=True)):
        best = sorted((int(id) for id in row), key=lambda id: row[str(id)]["rank"])[:top]
        if str(token) not in row or len(best) < top:
            raise JudgeError(f"the teacher's row {at} lacks token {token} or has fewer than {top} of the best")
        logprobs[at] = row[str(token)]["logprob"]
        top_ids[at] = best
        top_logprobs[at] = [row[str(id)]["logprob"] for id in best]
    return Scores(logprobs, top_ids, top_logprobs, VERSION)


async def require_teacher(settings: EndpointSection, policy: str, top: int) -> None:
    """Raises ConfigError unless the server renders as the policy's model does, and scores with `top` tokens a row."""
    from transformers import AutoTokenizer

    teacher = OutsideTeacher(settings, START_S)
    tokenizer = AutoTokenizer.from_pretrained(model_path(policy))
    try:
        for messages, tools in PROBES:
            found = await teacher.render(messages, tools, {})
            expected = tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=True, tokenize=True, return_dict=False
            )
            if found != expected:
                at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
                raise ConfigError(
                    f"teacher.url={settings.url!r} renders other tokens than policy.model={policy!r}"
                    f"{'' if at is None else f' (from the {at + 1}th on)'}; serve a teacher with the same tokenizer "
                    "and chat template"
                )
        await teacher.score_messages(*PROBES[0], {}, np.array(expected[:2], np.int32), top)
    except JudgeError as error:
        raise ConfigError(
            f"teacher.url: {error}; learning.teacher_top={top} needs vLLM's --max-logprobs {top}"
        ) from None
