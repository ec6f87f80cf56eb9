"""The turn loop of an episode: how it ends, what is cut, and that whatever happens is an Episode."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
import pytest

from clawrl.errors import EnvError
from clawrl.rollout.agent import IMAGE_GONE, Caller, Limits, newest_images, run_episode
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.env import AgentEnv, Answer, Opening, Split, Task
from clawrl.types import Message

ATTEMPT = Attempt("count", "group", 8, "group-3", "train", 5)


@dataclass(frozen=True, slots=True)
class Goal(Task):
    steps: int


class CountEnv(AgentEnv[Goal]):
    """Terminates after `steps` actions; -1, 0 or 1 as the last action says."""

    name = "count"

    def __init__(self, steps: int = 3, observation: str = "go on", fails: str = "", act_s: float = 0.0) -> None:
        super().__init__()
        self._steps, self._observation, self._fails, self._act_s = steps, observation, fails, act_s
        self._done, self._said = 0, "0"

    def make_task(self, number: int, split: Split) -> Goal:
        return Goal(f"{split}-{number}", self._steps)

    def begin(self, task: Goal) -> Opening:
        self._fail("begin")
        self._done, self._said = 0, "0"
        return Opening(({"role": "user", "content": self._observation},))

    def act(self, action: Message) -> Answer:
        self._fail("act")
        time.sleep(self._act_s)
        self._done, self._said = self._done + 1, action["content"]
        over = self.task is not None and self._done >= self.task.steps
        return Answer(() if over else ({"role": "user", "content": self._observation},), over, reward=0.25)

    def grade(self) -> float:
        self._fail("grade")
        return float(self._said)

    def gold(self, task: Goal) -> list[Message]:
        return [{"role": "assistant", "content": "1"}] * task.steps

    def _fail(self, where: str) -> None:
        if self._fails == where:
            raise EnvError(f"{where} is broken; mend it")
        if self._fails == f"defect in {where}":
            raise ZeroDivisionError("division by zero")


@dataclass(frozen=True, slots=True)
class Scripted(Caller):
    """Says the same at every turn, and keeps what it was shown."""

    client: Any = None
    model: str = "m"
    words: str = "1"
    seconds: float = 0.0
    error: Exception | None = None
    shown: list[list[Message]] = field(default_factory=list)

    async def reply(self, attempt: Attempt, messages: list[Message], tools: tuple[Any, ...], limits: Limits) -> Message:
        self.shown.append(list(messages))
        await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return {"role": "assistant", "content": self.words}


async def test_an_episode_to_its_end():
    caller = Scripted()
    episode = await run_episode(CountEnv(steps=3), ATTEMPT, caller, Limits())
    assert (episode.status, episode.outcome, episode.rewards, episode.reason) == ("done", 1.0, (0.25,) * 3, "")
    assert (episode.session, episode.group, episode.group_size) == ("group-3", "group", 8)
    assert (episode.source, episode.task) == ("count", "train-5")
    assert [len(messages) for messages in caller.shown] == [1, 3, 5]
    assert [message["role"] for message in caller.shown[-1]] == ["user", "assistant", "user", "assistant", "user"]


async def test_too_many_turns_are_graded_as_it_stands():
    episode = await run_episode(CountEnv(steps=9), ATTEMPT, Scripted(words="-1"), Limits(turns=2))
    assert (episode.status, episode.outcome, episode.rewards) == ("truncated", -1.0, (0.25, 0.25))
    assert "2 turns" in episode.reason


async def test_too_much_time_is_graded_as_it_stands():
    episode = await run_episode(CountEnv(), ATTEMPT, Scripted(seconds=60), Limits(seconds=0.1))
    assert (episode.status, episode.outcome) == ("timeout", 0.0)
    assert "longer than 0.1 s" in episode.reason
    assert episode.seconds < 40


async def test_an_action_under_way_at_the_time_limit_ends_before_the_verdict():
    episode = await run_episode(CountEnv(act_s=0.3), ATTEMPT, Scripted(), Limits(seconds=0.1))
    assert (episode.status, episode.outcome) == ("timeout", 1.0)


@pytest.mark.parametrize("where", ["begin", "act", "grade"])
@pytest.mark.parametrize("defect", ["", "defect in "])
async def test_an_environment_that_fails_is_an_error_without_outcome(where, defect):
    episode = await run_episode(CountEnv(fails=defect + where), ATTEMPT, Scripted(), Limits())
    assert (episode.status, episode.outcome) == ("error", None)
    assert ("ZeroDivisionError" if defect else f"{where} is broken") in episode.reason


@pytest.mark.parametrize("verdict", ["nan", "inf", "2"])
async def test_a_verdict_that_is_none_is_an_error(verdict):
    episode = await run_episode(CountEnv(), ATTEMPT, Scripted(words=verdict), Limits())
    assert (episode.status, episode.outcome) == ("error", None)
    assert "from -1 to 1" in episode.reason


async def test_a_reason_can_always_be_stored():
    episode = await run_episode(CountEnv(), ATTEMPT, Scripted(error=openai.OpenAIError("a\0b\ud83d")), Limits())
    assert "a\ufffdb?" in episode.reason


async def test_a_grader_that_fails_after_a_cut_is_an_error():
    episode = await run_episode(CountEnv(steps=9, fails="grade"), ATTEMPT, Scripted(), Limits(turns=1))
    assert (episode.status, episode.outcome) == ("error", None)
    assert "grade is broken" in episode.reason


async def test_without_replies_there_is_no_outcome():
    episode = await run_episode(CountEnv(), ATTEMPT, Scripted(error=openai.OpenAIError("refused")), Limits())
    assert (episode.status, episode.outcome, episode.rewards) == ("error", None, ())
    assert "no reply: OpenAIError: refused" in episode.reason


@pytest.mark.parametrize(("code", "status"), [("context_length_exceeded", "truncated"), (None, "error")])
async def test_a_conversation_longer_than_the_context_is_graded_as_it_stands(code, status):
    answer = httpx2.Response(400, request=httpx2.Request("POST", "http://gateway/v1/chat/completions"))
    refused = openai.BadRequestError("no", response=answer, body={"message": "no", "code": code})
    episode = await run_episode(CountEnv(), ATTEMPT, Scripted(error=refused), Limits())
    assert (episode.status, episode.outcome) == (status, 0.0 if code else None)
    assert ("longer than the model's context" if code else "no reply: BadRequestError") in episode.reason


async def test_a_long_observation_is_shown_by_head_and_tail():
    text = "head" + "x" * 1000 + "tail"
    caller = Scripted()
    await run_episode(CountEnv(observation=text), ATTEMPT, caller, Limits(observation_chars=100))
    for message in caller.shown[-1]:
        if message["role"] == "user":
            assert message["content"].startswith("head")
            assert message["content"].endswith("tail")
            assert "908 characters left out" in message["content"]
            assert len(message["content"]) < 150


async def test_of_a_long_text_beside_an_image_the_middle_is_cut_too():
    env = CountEnv(observation=[{"type": "text", "text": "head" + "x" * 1000 + "tail"}, picture(1)])  # type: ignore[arg-type]
    caller = Scripted()
    await run_episode(env, ATTEMPT, caller, Limits(observation_chars=100))
    text, image = caller.shown[0][0]["content"]
    assert text["text"].startswith("head")
    assert "908 characters left out" in text["text"]
    assert image == picture(1)


async def test_only_the_newest_images_stay():
    env = CountEnv(steps=4, observation=[{"type": "text", "text": "look"}, picture(1)])  # type: ignore[arg-type]
    caller = Scripted()
    await run_episode(env, ATTEMPT, caller, Limits(images=2))
    for turn, messages in enumerate(caller.shown, 1):
        kinds = [message["content"][1]["type"] for message in messages if message["role"] == "user"]
        assert kinds == ["text"] * max(0, turn - 2) + ["image_url"] * min(turn, 2)
    assert caller.shown[-1][0]["content"] == [{"type": "text", "text": "look"}, IMAGE_GONE]


def test_which_of_several_images_in_a_message_stay():
    messages = [{"role": "user", "content": [picture(1), picture(2)]}, {"role": "user", "content": [picture(3)]}]
    shown = newest_images(messages, 2)
    assert [part for message in shown for part in message["content"]] == [IMAGE_GONE, picture(2), picture(3)]
    assert newest_images(messages, 3) == messages
    assert messages[0]["content"][0] == picture(1)
    assert all(part == IMAGE_GONE for message in newest_images(messages, 0) for part in message["content"])


def picture(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{number}"}}


async def test_calls_go_out_as_any_clients():
    """By the real client, to an endpoint of the smallest kind: what a gateway is told of an attempt."""
    heard: list[tuple[dict[str, str], dict[str, Any]]] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head.splitlines()[1:] if line)}
        heard.append((headers, json.loads(await reader.readexactly(int(headers["content-length"])))))
        message = {"role": "assistant", "content": "1", "reasoning": "none of the environment's business"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n")
        writer.write(f"content-length: {len(body)}\r\n\r\n{body}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with (
        server,
        openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", api_key="k") as client,
    ):
        episode = await run_episode(CountEnv(steps=1), ATTEMPT, Caller(client, "m", 0.5, True, "pool"), Limits())
    assert episode.outcome == 1.0
    ((headers, body),) = heard
    told = {key: headers[f"x-{key}"] for key in ("session-id", "source", "group", "turn-type")}
    assert told == {"session-id": "group-3", "source": "count", "group": "group", "turn-type": "side"}
    assert (body["model"], body["temperature"], body["user"]) == ("m", 0.5, "pool")
    assert body["max_completion_tokens"] == Limits().reply_tokens
    assert "tools" not in body
