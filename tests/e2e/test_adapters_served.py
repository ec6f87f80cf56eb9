"""Versions as adapters, one engine for policy and judge: served while people talk, let go, taken back, exported.

Everyone has a policy together, and who talks enough has their own beside it.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import Server, start_server, stop_server
from safetensors.torch import load_file, save_file
from test_system import QUESTION, clawrl, converse, loaded, scored
from transformers import AutoTokenizer

from clawrl.algorithms.hints import with_hint
from clawrl.config import model_path
from clawrl.types import EMA, Sample

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CONFIG = Path(__file__).parents[2] / "configs" / "cpu_lora.toml"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = ("trainer.learning_rate=3e-3", "lora.policy_scope=hierarchy", "buffer.batch_size=16", "versions.keep=50")
    teacher = ("learning.teacher=ema", "learning.ema_decay=0.8", "learning.distillation=token")
    server = start_server(tmp_path_factory.mktemp("adapted"), "--config", str(CONFIG), *words, *teacher)
    yield server
    if server.process.poll() is None:
        stop_server(server)


def reply(server: Server, num_tokens: int = 200, user: str = "guest") -> str:
    """The id of a reply of so many tokens."""
    answer = server.client().chat.completions.create(
        model="clawrl",
        messages=QUESTION,  # type: ignore[arg-type]
        max_tokens=num_tokens,
        user=user,
        extra_body={"ignore_eos": True},
        extra_headers={"X-Turn-Type": "side"},
    )
    return answer.id


def test_adapters_learn_and_no_request_changes_its_weights_midway(adapted: Server):
    replies, done = [], threading.Event()

    def ask() -> None:
        while not done.is_set():
            replies.append(reply(adapted, 1800))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        conversations = asyncio.run(converse(adapted, 40, 12, seed=3))
        adapted.wait_for("versions", lambda: adapted.status()["journal"]["versions"] >= 3)
    finally:
        done.set()
        asking.join()
    assert sum(conversation.num_failed for conversation in conversations) == 0
    journal = adapted.journal()
    assert {version.kind for version in journal.versions()} == {"lora"}
    swaps = [swap for swap in journal.swaps() if swap.version > 0]
    assert all(swap.canary_moved and swap.stall_ms == 0 for swap in swaps), swaps
    assert all(swap.canary_error is not None and swap.canary_error < 1e-3 for swap in swaps), swaps
    turns = [journal.turn(each) for each in replies]
    assert all(turn is not None and len(turn.capture.versions) == 1 for turn in turns)
    spans = [(turn.started, turn.ended) for turn in turns if turn]
    over = [swap.version for swap in swaps if any(start < swap.at < end for start, end in spans)]
    assert over, "no reply was under way while a version came"


def test_the_judge_in_the_same_engine_is_the_model_without_an_adapter(adapted: Server):
    """Its scores of replies sampled under an adapter are those of the model as it was, and not the adapter's."""
    samples = adapted.journal()._all(Sample)
    late = [sample for sample in samples if sample.oldest_version > 0 and sample.reference_logprobs is not None]
    assert late, "runs after the learning test, which leaves some"
    for sample in late[:5]:
        mask = sample.loss_mask
        start = int(np.flatnonzero(mask)[0])
        initial = scored(model_path("clawrl:tiny"), sample.token_ids[:start], sample.token_ids[start:])
        assert sample.reference_logprobs is not None
        np.testing.assert_allclose(sample.reference_logprobs[start:], initial, atol=1e-3)
    gaps = [np.abs((each.reference_logprobs - each.logprobs)[each.loss_mask]).max() for each in late]
    assert max(gaps) > 0.05


def test_the_teacher_is_the_moving_average_of_a_version(adapted: Server, tmp_path: Path):
    """Log-probabilities of replies after the hinted prompt, by the averages in the versions' folders."""
    journal, tokenizer = adapted.journal(), AutoTokenizer.from_pretrained(model_path("clawrl:tiny"))
    late = [sample for sample in journal._all(Sample) if sample.oldest_version > 0 and sample.distillation]
    assert late, "runs after the learning test, which leaves some"
    longest = sorted(late, key=lambda sample: sample.loss_mask.sum())[-12:]
    hints = {turn.id: judgement.hints for _, turn, judgement in journal.judged_turns(None, 10_000)}
    folders = [each.parent for each in adapted.run_directory.glob("versions/*/ema.safetensors")]
    averages = [average_of(each, tmp_path / each.name) for each in folders]
    plain: list[float] = []
    average: list[float] = []
    for sample in longest:
        told, turn = sample.distillation.advantages[sample.loss_mask][:, 0], journal.turn(sample.id)
        assert turn is not None
        prompts = [
            tokenizer.apply_chat_template(
                with_hint(turn.messages, hint), add_generation_prompt=True, tokenize=True, return_dict=False
            )
            for hint in hints[sample.id]
        ]

        def gap(folder: Path, turn=turn, told=told, prompts=prompts) -> float:
            reply = turn.capture
            teachers = [scored(str(folder), np.array(prompt), reply.completion_ids) for prompt in prompts]
            return min(np.abs(np.clip(teacher - reply.logprobs, -1, 1) - told).max() for teacher in teachers)

        average.append(min(map(gap, averages)))
        plain.append(min(map(gap, [*folders, Path(model_path("clawrl:tiny"))])))
    assert max(average) < 2e-5 < 1e-3 < max(plain), (average, plain)


def average_of(version: Path, folder: Path) -> Path:
    """A version's moving average as an adapter."""
    tensors = {name.removeprefix(EMA): each for name, each in load_file(version / "ema.safetensors").items()}
    shutil.copytree(version, folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_a_reply_is_the_published_adapters(adapted: Server):
    turn = adapted.journal().turn(reply(adapted))
    assert turn is not None
    (span,) = turn.capture.versions
    assert span.version == adapted.status()["versions"]["serving"] > 0
    folder = adapted.run_directory / "versions" / str(span.version)
    found = scored(str(folder), turn.capture.prompt_ids, turn.capture.completion_ids)
    np.testing.assert_allclose(found, turn.capture.logprobs, atol=1e-3)


def test_who_talked_has_a_policy_of_their_own(adapted: Server):
    """It learnt from what was said to it alone, answers nobody else, and can be taken back alone."""
    adapted.wait_for("all that is to learn to be learnt", lambda: rests(adapted))
    journal, serving = adapted.journal(), adapted.status()["versions"]["serving"]
    versions = {version.number: version for version in journal.versions()}
    own = [version for version in versions.values() if version.scope]
    (user,) = {version.scope for version in own}
    learnt = [turn for version in own for turn in version.samples]
    assert {author for _, author, _ in journal.authors(learnt)} == {user}
    assert all(versions[each].scope in ("", user) for version in own if (each := version.parent))
    turn, other = journal.turn(reply(adapted, user=user)), journal.turn(reply(adapted))
    assert turn is not None
    assert other is not None
    (span,), (others,) = turn.capture.versions, other.capture.versions
    assert (span.version, others.version) == (max(version.number for version in own), serving)
    folder = adapted.run_directory / "versions" / str(span.version)
    found = scored(str(folder), turn.capture.prompt_ids, turn.capture.completion_ids)
    np.testing.assert_allclose(found, turn.capture.logprobs, atol=1e-3)
    assert f"version {own[-2].number} serves" in clawrl(adapted, "rollback", "--user", user)
    assert adapted.status()["versions"]["serving"] == serving
    adapted.wait_for("the way back", lambda: spoken_by(adapted, user) == own[-2].number)


def rests(server: Server) -> bool:
    """Nothing waits to be judged, to make a batch, or to serve."""
    state = server.status()
    journal, buffer = state["journal"], state["buffer"]
    judged = journal["next_states"] == journal["judgements"]
    return judged and not buffer["leased"] and buffer["longest"] < 16 and not state["versions"]["unproven"]


def spoken_by(server: Server, user: str) -> int:
    """The version that answers a user."""
    turn = server.journal().turn(reply(server, 8, user))
    assert turn is not None
    return turn.capture.versions[0].version


def test_adapters_that_nobody_uses_leave_the_machine(adapted: Server):
    folders = adapted.run_directory / "adapters"
    of_two = 4  # everyone's and one user's, each with its average
    adapted.wait_for("what two policies need", lambda: len(list(folders.iterdir())) == of_two, timeout_s=60)


def test_an_adapter_is_exported_and_version_0_is_the_model_itself(adapted: Server, tmp_path: Path):
    serving = adapted.status()["versions"]["serving"]
    clawrl(adapted, "export", str(serving), str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "adapter_model.safetensors").exists()
    assert loaded(tmp_path / "mine")
    assert "version 0 serves" in clawrl(adapted, "rollback", "0")
    adapted.wait_for("version 0", lambda: set(adapted.status()["versions"]["replicas"].values()) == {0})
    turn = adapted.journal().turn(reply(adapted))
    assert turn is not None
    assert [span.version for span in turn.capture.versions] == [0]
    initial = scored(model_path("clawrl:tiny"), turn.capture.prompt_ids, turn.capture.completion_ids)
    np.testing.assert_allclose(initial, turn.capture.logprobs, atol=1e-3)
