"""The whole loop, as a user meets it: served, captured, judged, trained, swapped, stopped."""

from __future__ import annotations

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from running import STOP_S, Server, stop_server

from clawrl.config import model_path
from clawrl.training.checkpoint import read_canary
from clawrl.training.model import ATTENTION, TokenScorer
from clawrl.training.packed_linear import keep_packed
from envs.chat.conversation import evaluate, hold_conversation
from envs.chat.model_user import ModelUser
from envs.chat.user import SimulatedUser
from envs.chat.world import make_problem

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

QUESTION = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does Tom have?"}]
TURNS_WAITING = 64
TOOL = {
    "type": "function",
    "function": {
        "name": "calc",
        "description": "Compute an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}


def loaded(folder: Path, base: str = "clawrl:tiny", **options: Any) -> Any:
    """A model in float32; of a folder that holds an adapter, the base with it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = (folder / "adapter_config.json").exists()
    model = keep_packed(
        AutoModelForCausalLM.from_pretrained(model_path(base) if adapted else folder, dtype=torch.float32, **options)
    )
    return PeftModel.from_pretrained(model, str(folder)).get_base_model() if adapted else model


@cache
def scorer(model: str, base: str) -> TokenScorer:
    return TokenScorer(loaded(Path(model), base, attn_implementation=ATTENTION), logit_chunk=64)


def scored(model: str, prompt_ids: np.ndarray, completion_ids: np.ndarray, *, base: str = "clawrl:tiny") -> np.ndarray:
    """The trainer's own log-probabilities of a reply, f32[T], with the weights, or the adapter, in a folder."""
    token_ids = np.concatenate([prompt_ids, completion_ids]).astype(np.int64)
    positions = np.arange(len(prompt_ids) - 1, len(token_ids) - 1)
    with torch.no_grad():
        out = scorer(model, base)(
            torch.from_numpy(token_ids),
            torch.arange(len(token_ids)),
            [0, len(token_ids)],
            torch.from_numpy(positions),
            torch.from_numpy(token_ids[positions + 1]),
            torch.empty(len(positions), 0, dtype=torch.int64),
        )
    return out.logprobs.numpy()


# -- serving -----------------------------------------------------------------------------------------------------------


def test_models_and_health(server: Server):
    assert [model.id for model in server.client().models.list()] == ["clawrl"]
    assert httpx.get(f"{server.url}/healthz").json()["status"] == "ok"


def test_streaming_is_real(server: Server):
    """The first chunks come long before the last; the very first reply of a system is not asked, it wakes everybody."""
    for _ in range(2):
        arrivals, num_tokens = stream_arrivals(server)
    assert num_tokens == 400
    assert len(arrivals) > 20
    assert arrivals[-1] - arrivals[0] > 0.2 * arrivals[-1], "the reply came in one piece"


def stream_arrivals(server: Server) -> tuple[list[float], int]:
    """Seconds from the request to each chunk of a reply of 400 tokens, and how many tokens it says it has."""
    started, arrivals, num_tokens = time.perf_counter(), [], 0
    stream = server.client().chat.completions.create(
        model="clawrl",
        messages=QUESTION,  # type: ignore[arg-type]
        stream=True,
        max_tokens=400,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        extra_headers={"X-Turn-Type": "side"},
    )
    for chunk in stream:
        arrivals.append(time.perf_counter() - started)
        if chunk.usage is not None:
            num_tokens = chunk.usage.completion_tokens
    return arrivals, num_tokens


def test_the_journal_holds_what_the_engine_sampled(server: Server):
    """Ids and log-probabilities in the turn are those the engine itself reports in the same reply."""
    answer = server.client().chat.completions.create(
        model="clawrl",
        messages=QUESTION,  # type: ignore[arg-type]
        logprobs=True,
        top_logprobs=4,
        extra_body={"return_token_ids": True, "return_tokens_as_token_ids": True},
        extra_headers={"X-Turn-Type": "side"},
    )
    turn = server.journal().turn(answer.id)
    assert turn is not None, "the turn must be durable before the reply ends"
    raw: Any = answer
    assert turn.capture.prompt_ids.tolist() == raw.prompt_token_ids
    assert turn.capture.completion_ids.tolist() == raw.choices[0].token_ids
    content = raw.choices[0].logprobs.content
    np.testing.assert_allclose(turn.capture.logprobs, [token.logprob for token in content], atol=1e-6)
    for position, token in enumerate(content):  # vLLM lists the sampled token among the top, ours stands apart
        ids, logprobs = turn.capture.top_ids[position].tolist(), turn.capture.top_logprobs[position].tolist()
        ours = dict(zip(ids, logprobs, strict=True)) | {turn.capture.completion_ids[position]: token.logprob}
        for top in token.top_logprobs:
            assert ours[int(top.token.removeprefix("token_id:"))] == pytest.approx(top.logprob, abs=1e-6)
    assert turn.reply["content"] == answer.choices[0].message.content


def test_trainer_and_engine_agree_at_lag_zero(server: Server):
    answer = server.client().chat.completions.create(
        model="clawrl",
        messages=QUESTION,  # type: ignore[arg-type]
        stream=False,
        extra_headers={"X-Turn-Type": "side"},
    )
    turn = server.journal().turn(answer.id)
    assert turn is not None
    (span,) = turn.capture.versions
    folder = (
        model_path("clawrl:tiny") if span.version == 0 else str(server.run_directory / "versions" / str(span.version))
    )
    ours = scored(folder, turn.capture.prompt_ids, turn.capture.completion_ids)
    np.testing.assert_allclose(ours, turn.capture.logprobs, atol=1e-3)


def test_tools_reach_the_template_and_calls_come_back_parsed(server: Server):
    """A forced call: the arguments are the tiny model's, the parsing and the deltas are vLLM's."""
    stream = server.client().chat.completions.create(
        model="clawrl",
        messages=[{"role": "user", "content": "What is 12 + 30?"}],
        tools=[TOOL],  # type: ignore[list-item]
        tool_choice={"type": "function", "function": {"name": "calc"}},
        stream=True,
        max_tokens=200,
        temperature=0,
        extra_headers={"X-Turn-Type": "side"},
    )
    calls, response_id = [], ""
    for chunk in stream:
        response_id = chunk.id
        calls += [call for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert calls[0].function is not None
    assert calls[0].function.name == "calc"
    turn = server.journal().turn(response_id)
    assert turn is not None
    assert turn.reply["tool_calls"][0]["function"]["name"] == "calc"
    assert turn.tools == (TOOL,)


def test_a_request_sent_twice_is_one_turn(server: Server):
    """What OpenAI's SDKs send again after a broken connection gets the recorded reply, streamed or not."""
    before = server.status()["journal"]["turns"]
    asked: Any = {"model": "clawrl", "messages": [{"role": "user", "content": "Sent twice: what is 7 + 8?"}]}
    client = server.client().chat.completions
    first = client.create(**asked)
    again = client.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    assert (again.id, again.choices[0].message.content) == (first.id, first.choices[0].message.content)
    streamed = list(client.create(**asked, stream=True, extra_headers={"x-stainless-retry-count": "2"}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert ({chunk.id for chunk in streamed}, said) == ({first.id}, first.choices[0].message.content)
    assert server.status()["journal"]["turns"] == before + 1
    assert client.create(**asked).id != first.id, "without a sign of a retry it is a wish for another reply"


async def test_an_idempotency_key_names_one_turn(server: Server):
    client = server.async_client().chat.completions
    asked: Any = {"model": "clawrl", "extra_headers": {"Idempotency-Key": "order-66"}}
    messages: Any = [{"role": "user", "content": "With a key: what is 20 + 3?"}]
    replies = await asyncio.gather(*(client.create(messages=messages, **asked) for _ in range(3)))
    assert len({reply.id for reply in replies}) == 1
    with pytest.raises(openai.UnprocessableEntityError, match="another request"):
        await client.create(messages=[{"role": "user", "content": "Something else"}], **asked)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_generation(server: Server, stream: bool):
    body = {"messages": QUESTION, "stream": stream, "max_tokens": 1900, "ignore_eos": True}
    url = f"{server.url}/v1/chat/completions"
    with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=0.5) as response:
        next(response.iter_bytes())
    server.wait_for("the engine to be idle", lambda: server.status()["policy"]["streams"] == 0, timeout_s=5)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        ("{not json", {}, 400),
        ("[]", {}, 400),
        ('{"messages": []}', {}, 400),
        ('{"messages": [{"role": "robot", "content": "x"}]}', {}, 400),
        ('{"model": "gpt-9", "messages": [{"role": "user", "content": "x"}]}', {}, 404),
        ('{"messages": [{"role": "user", "content": "%s"}]}' % ("word " * 6000), {}, 400),
        ('{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', {}, 400),
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', {}, 400),
        ('{"messages": [{"role": "user", "content": "x"}], "n": 99}', {}, 400),
        ('{"messages": [{"role": "user", "content": "x"}], "top_p": 7}', {}, 400),
        ('{"messages": [{"role": "user", "content": "x"}]}', {"content-type": "text/plain"}, 415),
    ],
)
def test_bad_requests_leave_engine_and_journal_untouched(server: Server, content: str, headers: dict, status: int):
    before = server.status()["journal"]
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"content-type": "application/json", **headers},
        timeout=30,
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) > 10
    after = server.status()["journal"]
    assert {key: after[key] for key in ("turns", "next_states")} == {
        key: before[key] for key in ("turns", "next_states")
    }


def test_status_command_shows_versions_and_buffer(server: Server):
    shown = subprocess.run(
        [sys.executable, "-m", "clawrl.cli", "status", "--url", server.url], capture_output=True, text=True, timeout=60
    )
    assert shown.returncode == 0, shown.stderr
    assert "versions" in shown.stdout
    assert "buffer" in shown.stdout


# -- learning ----------------------------------------------------------------------------------------------------------


async def converse(server: Server, num: int, concurrency: int, seed: int) -> list[Any]:
    """Conversations side by side, no more of them than judge and trainer keep up with: people are slower than these."""
    client, gate = server.async_client(), asyncio.Semaphore(concurrency)

    async def keep_up() -> None:
        while True:
            status = await asyncio.to_thread(server.status)
            counts = status["journal"]
            if counts["next_states"] - counts["judgements"] + status["buffer"]["size"] < TURNS_WAITING:
                return
            await asyncio.sleep(0.5)

    async def one(index: int) -> Any:
        user = SimulatedUser("student", random.Random(f"{seed}-{index}"))
        async with gate:
            await keep_up()
            return await hold_conversation(client, "clawrl", user, None, f"e2e-{seed}-{index}", max_turns=3)

    return await asyncio.gather(*(one(index) for index in range(num)))


def test_a_conversation_is_paired_judged_and_sampled(server: Server):
    (conversation,) = asyncio.run(converse(server, 1, 1, seed=11))
    assert len(conversation.exchanges) >= 2
    store = server.journal()
    last = store.last_turn("local", conversation.session)
    assert last is not None
    assert last[2] == len(conversation.exchanges) - 1, "every message of the session is a turn of its own"
    assert store.open_turn("local", _digest_after(conversation, 1)) is not None
    server.wait_for("judgement", lambda: server.status()["journal"]["judgements"] >= 1)


def test_a_model_plays_the_user(server: Server):
    """The simulator is any OpenAI-compatible endpoint: here the tiny model, which was never taught to play anybody."""
    turns = server.status()["journal"]["main_turns"]
    client = server.async_client()
    user = ModelUser(client, "clawrl", "student", random.Random(2), make_problem)
    held = asyncio.run(hold_conversation(client, "clawrl", user, None, "e2e-played", max_turns=2))
    assert held.num_failed == 0
    assert [exchange.reaction for exchange in held.exchanges] == ["open", "model"]
    assert held.exchanges[1].said
    assert server.status()["journal"]["main_turns"] == turns + 2, (
        "the simulator's own replies are no turns to learn from"
    )


def _digest_after(conversation: Any, num: int) -> str:
    from clawrl.serving.sessions import digest

    messages = []
    for exchange in conversation.exchanges[:num]:
        messages += [{"role": "user", "content": exchange.said}, {"role": "assistant", "content": exchange.reply}]
    return digest(messages)


def test_hybrid_learns_while_it_serves(server: Server):
    """Before, conversations, after: the score rises, no request fails, every swap is proved by its canary."""
    rng = random.Random(5)
    problems = [make_problem(rng, "heldout") for _ in range(100)]
    before = asyncio.run(evaluate(server.async_client(), "clawrl", "student", problems))
    conversations = asyncio.run(converse(server, 200, 12, seed=3))
    server.wait_for("versions", lambda: server.status()["journal"]["versions"] >= 8, timeout_s=180)
    server.wait_for("a quiet trainer", lambda: server.status()["buffer"]["size"] < 32, timeout_s=60)
    time.sleep(3)
    after = asyncio.run(evaluate(server.async_client(), "clawrl", "student", problems))
    assert sum(conversation.num_failed for conversation in conversations) == 0
    assert after.score >= before.score + 0.15, (before, after)
    swaps = server.journal().swaps()
    assert len(swaps) >= 8
    assert all(swap.canary_error is not None and swap.canary_error < 1e-3 for swap in swaps), swaps
    assert all(swap.canary_moved for swap in swaps if swap.version > 0)


def test_the_served_weights_are_the_published_checkpoint(server: Server):
    """After training, a reply's behaviour log-probabilities are those of the checkpoint on disk, not of the start."""
    version = server.status()["versions"]["serving"]
    assert version > 0, "runs after the learning test"
    answer = server.client().chat.completions.create(
        model="clawrl",
        messages=QUESTION,  # type: ignore[arg-type]
        extra_headers={"X-Turn-Type": "side"},
    )
    turn = server.journal().turn(answer.id)
    assert turn is not None
    assert [span.version for span in turn.capture.versions] == [version]
    ids = (turn.capture.prompt_ids, turn.capture.completion_ids)
    published = scored(str(server.run_directory / "versions" / str(version)), *ids)
    initial = scored(model_path("clawrl:tiny"), *ids)
    np.testing.assert_allclose(published, turn.capture.logprobs, atol=1e-3)
    assert np.abs(initial - turn.capture.logprobs).max() > 0.05


def clawrl(server: Server, *words: str) -> str:
    """What a command prints."""
    ended = subprocess.run(
        [sys.executable, "-m", "clawrl.cli", *words, "--url", server.url], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_rollback_fails_no_request_and_training_goes_on_from_there(server: Server):
    async def talk_and_roll_back() -> tuple[list[Any], str]:
        talking = asyncio.create_task(converse(server, 60, 16, seed=21))
        await asyncio.sleep(3)
        said = await asyncio.to_thread(clawrl, server, "rollback", "--reason", "a test")
        return await talking, said

    conversations, said = asyncio.run(talk_and_roll_back())
    assert sum(conversation.num_failed for conversation in conversations) == 0
    found = re.match(r"version (\d+) serves; rejected: ([\d ]+); the next version will be (\d+)", said)
    assert found is not None, said
    restored, rejected, following = int(found[1]), [int(number) for number in found[2].split()], int(found[3])
    assert restored < min(rejected)

    def taken_on() -> bool:  # and maybe retired since, by the one after it
        return server.status()["versions"]["states"].get(str(following)) in ("serving", "retired")

    for more in range(10):  # what was said before the rollback may not have been enough for the next
        if taken_on():
            break
        asyncio.run(converse(server, 16, 16, seed=210 + more))
    assert taken_on()
    records = {version.number: version for version in server.journal().versions()}
    assert records[following].parent == restored
    told = {entry["number"]: entry for entry in json.loads(clawrl(server, "versions", "--json"))}
    assert {told[number]["state"] for number in rejected} == {"rejected"}
    assert {told[number]["reason"] for number in rejected} == {"a test"}
    swaps = [swap.version for swap in server.journal().swaps()]
    last = {version: at for at, version in enumerate(swaps)}
    assert last[restored] > max(last.get(number, -1) for number in rejected)


def test_a_version_is_pinned_compared_and_exported(server: Server, tmp_path: Path):
    states = server.status()["versions"]["states"]
    number = server.status()["versions"]["serving"]
    assert f"version {number} is pinned" in clawrl(server, "pin", str(number))
    parent = str(max(int(each) for each, state in states.items() if state == "retired"))
    assert "turns by user: local" in clawrl(server, "diff", parent, str(number))
    clawrl(server, "export", str(number), str(tmp_path / "out"))
    canary = read_canary(server.run_directory / "versions" / str(number))
    assert canary is not None
    model = loaded(tmp_path / "out")
    for ids, logprobs in zip(canary.token_ids, canary.logprobs, strict=True):
        tokens = torch.from_numpy(ids).long()
        with torch.no_grad():
            table = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        np.testing.assert_allclose(table.gather(-1, tokens[1:, None])[:, 0].numpy(), logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "body", "status", "message"),
    [
        ("rollback", {"number": 9999}, 400, "version 9999 does not exist"),
        ("rollback", {"version": 1}, 400, "rollback cannot be called with"),
        ("nothing", {}, 404, "there is no act 'nothing'; known are "),
    ],
)
def test_an_act_that_cannot_be_is_refused(server: Server, name: str, body: dict, status: int, message: str):
    response = httpx.post(f"{server.url}/admin/{name}", json=body, timeout=30)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_no_sample_is_consumed_twice(server: Server):
    versions = server.journal().versions()
    consumed = [sample for version in versions for sample in version.samples]
    assert len(consumed) == len(set(consumed)) > 0


# -- starting and stopping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy.modle=x"], "policy.modle is not a key; allowed here: "),
        (["trainer.workers=many"], "trainer.workers"),
        (["policy.model=/no/such/folder", "judge.model=/no/such/folder"], "/no/such/folder"),
        (["--config", "/no/such.toml"], "/no/such.toml"),
        (["run_root=/proc/nothing"], "/proc/nothing"),
        (["journal.url=postgresql://u:p@127.0.0.1:9/d"], "start PostgreSQL, or correct host and port in journal.url"),
    ],
)
def test_a_config_that_cannot_work_is_one_clear_line(arguments: list[str], message: str):
    ended = subprocess.run(
        [sys.executable, "-m", "clawrl.cli", "serve", "gateway.port=30999", *arguments],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 2
    assert message in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_refused_before_anything_starts(server: Server):
    port = server.url.rsplit(":", 1)[1]
    ended = subprocess.run(
        [sys.executable, "-m", "clawrl.cli", "serve", f"gateway.port={port}"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 2
    assert f"gateway.port={port}" in ended.stderr


def test_ctrl_c_ends_everything_within_seconds(server: Server):
    """Last: it stops the shared system."""
    import psutil

    family = psutil.Process(server.process.pid).children(recursive=True)
    assert any("VLLM" in process.name() or "VLLM" in " ".join(process.cmdline()) for process in family)
    code, seconds = stop_server(server)
    assert code == 0
    assert seconds < STOP_S
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [process.name() for process in alive] == []
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{server.url}/healthz", timeout=2)
