"""A user whose words are a language model's: the same persona, played at any OpenAI-compatible endpoint.

Knows the protocol and the personas' wishes. Ignores who answers the user, and training. What a reply is worth is read
off its text as for the scripted user (`styles`), never asked of the model: scores of different simulators compare.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import openai

from clawrl.errors import EnvError
from envs.chat.user import Persona
from envs.chat.world import Question

END = "[END]"
SAID_TOKENS = 128
WISHES: dict[Persona, str] = {
    "student": "a student who hands the reply in as your own and wants the working in plain sentences, without bold "
    "text, lists, numbered steps or a boxed answer, and more than the bare number",
    "assistant": 'a teaching assistant who wants every reply to end with a line that begins with "Check:" and proves '
    "the result with its numbers",
    "teacher": "a teacher who reads replies to a class and wants them friendly: a kind or cheerful word in each",
}
ROLE = """You play a person who chats with an AI assistant. You are {wish}.
You never say beforehand what you like: you only react to what the assistant wrote, as people do, in one or two short \
sentences. If the reply is not as you like it, complain or say what you want; if its answer is wrong (the right answer \
is {answer}), say so; if all is well, thank or agree. Write only your next message, nothing else. \
When there is nothing left to say, write {end}."""


class ModelUser:
    """One person over one conversation, as `SimulatedUser` is; `reaction` cannot be known and is `open` or `model`."""

    def __init__(
        self,
        client: openai.AsyncOpenAI,
        model: str,
        persona: Persona,
        rng: random.Random,
        draw: Callable[[random.Random], Question],
    ) -> None:
        self.persona: Persona = persona
        self._client, self._model, self._rng, self._draw = client, model, rng, draw
        self.problem: Question = draw(rng)
        self.reaction = "open"
        self._transcript: list[str] = []

    def begin(self, problem: Question | None = None) -> str:
        """The first message: a question, without any word on how to answer it."""
        self.problem = problem or self._draw(self._rng)
        self.reaction, self._transcript = "open", [f"You: {self.problem.question}"]
        return self.problem.question

    async def react(self, reply: str) -> str | None:
        """The next message, or None when the conversation is over. Raises EnvError if the model does not answer."""
        self._transcript.append(f"Assistant: {reply}")
        said = (await self._ask()).strip().removeprefix("You:").strip()
        if not said or END in said:
            return None
        self.reaction = "model"
        self._transcript.append(f"You: {said}")
        return said

    async def _ask(self) -> str:
        role = ROLE.format(wish=WISHES[self.persona], answer=self.problem.answer, end=END)
        try:
            completion = await self._client.chat.completions.create(
                model=self._model,
                messages=[
                    {"role": "system", "content": role},
                    {"role": "user", "content": "\n\n".join([*self._transcript, "Your next message:"])},
                ],
                max_completion_tokens=SAID_TOKENS,
                extra_headers={"X-Turn-Type": "side"},  # a clawrl that plays somebody does not learn from it
            )
        except openai.APIError as error:
            raise EnvError(
                f"the model {self._model!r} at {self._client.base_url} cannot play the user: {error}; "
                "check chat.simulator_url and chat.simulator_model"
            ) from error
        return completion.choices[0].message.content or ""
