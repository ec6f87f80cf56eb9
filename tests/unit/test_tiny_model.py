"""The corpus, the tokenizer's template and the shipped checkpoint of the tiny model."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clawrl.serving import judging
from envs.toolcall.stock import TOOLS, make_task, run_tool, solved
from jobs.tiny_model.corpus import SHARES, advice, examples, make_case, verdict
from jobs.tiny_model.evaluate import says
from jobs.tiny_model.model import CONTEXT, logits
from jobs.tiny_model.tools import demonstrate
from jobs.tiny_model.train import encode, orthogonal

FOLDER = Path(__file__).parents[2] / "clawrl" / "models" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER)


def test_the_corpus_comes_again_with_its_seed():
    first, again, other = (list(itertools.islice(examples(seed), 300)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {example.task for example in first} == set(SHARES)


def test_shares_sum_to_one():
    assert sum(SHARES.values()) == pytest.approx(1.0)


def test_cases_are_judged_as_their_own_answers_say():
    rng = random.Random(0)
    for _ in range(200):
        case = make_case(rng)
        assert judging.parse_vote(verdict(case)) == case.score
        assert judging.parse_hint(advice(case)) == case.hint
        assert case.hint is None or says(case.hint, case)
        assert (case.hint is None) == (case.want is None)


def test_only_replies_worth_imitating_carry_full_weight(tokenizer):
    batch = list(itertools.islice(examples(3), 200))
    encoded = encode(tokenizer, batch)
    assert len(encoded) == len(batch)
    for example, one in zip(batch, encoded, strict=True):
        imitated = tokenizer.decode(one.ids[one.weights == 1.0].tolist())
        spoken = [
            message.get("content") or ""
            for at, message in enumerate(example.messages)
            if message["role"] == "assistant" and at not in example.silent
        ]
        assert imitated.count("<|im_end|>") == len(spoken)
        assert all(text in imitated for text in spoken)
        assert len(one.ids) <= CONTEXT


def test_a_flawless_demonstration_solves_its_task_and_a_guess_calls_nothing():
    rng = random.Random(1)
    for _ in range(50):
        task = make_task(rng)
        assert solved(task, demonstrate(task, "none", rng)[-1]["content"])
        assert len(demonstrate(task, "guess", rng)) == 2


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("calc", {"expression": "12 - 15"}, "-3"),
        ("calc", {"expression": "2 * 3"}, "error: bad call"),
        ("lookup", {"item": "nothing", "place": "nowhere"}, "error: not found"),
        ("fly", {}, "error: bad call"),
    ],
)
def test_tools_answer_or_say_why_not(name, arguments, said):
    assert run_tool(make_task(random.Random(0)), name, arguments) == said


def test_the_template_renders_tools_calls_and_results(tokenizer):
    call = {"type": "function", "function": {"name": "calc", "arguments": {"expression": "1 + 2"}}}
    messages = [
        {"role": "developer", "content": "Be exact."},
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "3"},
        {"role": "tool", "content": "3"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    called = '<tool_call>\n{"name": "calc", "arguments": {"expression": "1 + 2"}}\n</tool_call>'
    answered = "<tool_response>\n3\n</tool_response>"
    assert text.startswith('<|im_start|>system\nBe exact.\n\n# Tools\n<tools>\n{"name": "lookup"')
    assert text.endswith(
        f"<|im_start|>user\nSum?<|im_end|>\n<|im_start|>assistant\n{called}\n{called}<|im_end|>\n"
        f"<|im_start|>user\n{answered}\n{answered}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_arguments_as_text_and_as_object_render_alike(tokenizer):
    def rendered(arguments):
        call = {"type": "function", "function": {"name": "lookup", "arguments": arguments}}
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return tokenizer.apply_chat_template(messages, tokenize=False)

    assert rendered('{"item": "pens", "place": "shop"}') == rendered({"item": "pens", "place": "shop"})


def test_digits_are_split_singly_and_text_survives(tokenizer):
    text = "Mia has 1234 pens → ünï\n**Answer:** <tool_call>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids if tokenizer.decode([i]).isdigit()] == ["1", "2", "3", "4"]


def test_the_checkpoint_is_small_and_shaped_as_stated(model, tokenizer):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000
    assert len(tokenizer) == model.config.vocab_size == 1536
    assert model.config.max_position_embeddings == 2048
    assert model.config.architectures == ["Qwen3ForCausalLM"]
    assert sum(parameter.numel() for parameter in model.parameters()) == 2_017_472
    assert model.generation_config.temperature == 1.0
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_lean_forward_equals_transformers(model):
    ids = torch.randint(0, 1536, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
        torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)
        at = torch.tensor([3, 50])
        torch.testing.assert_close(logits(model, ids, at=at), expected.flatten(0, 1)[at], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 12, 4), (1, 4, 12)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(orthogonal(matrices))
    assert singular.min() > 0.4
    assert singular.max() < 1.4
