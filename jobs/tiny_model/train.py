"""Pre-training of the tiny model: Muon on the matrices, AdamW on the rest, a linear fall of both at the end.

Knows token batches and CPU time. Ignores what the corpus says. Muon after Keller Jordan (2024): momentum, then five
Newton-Schulz steps towards the nearest orthogonal matrix, same-shaped matrices together. Matrices are multiplied in
bfloat16 where the CPU can, for which it makes no difference to what is learnt; elsewhere that takes 30 times as long.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from jobs.tiny_model.corpus import Example, examples
from jobs.tiny_model.model import CONTEXT, logits
from jobs.tiny_model.tokenizer import TURN_END, TURN_START

COMPUTE = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

READ_WEIGHT = 0.6  # loss weight of text that is only read; what is to be imitated has 1
READ_SHARE = 0.25  # of such tokens, those drawn into the loss at each step


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast; learning rates fall linearly over the last `decay` of the way."""

    tokens: int = 16_000_000
    seconds: float = 2000.0  # of this process's CPU time, after which training has ended, wherever it stands
    seed: int = 0
    muon_rate: float = 0.018
    adam_rate: float = 3e-3
    decay: float = 0.6
    batch_tokens: tuple[int, int] = (2048, 4096)  # first half, second half


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation in tokens: ids u16[L] and the loss weight of each token f32[L]."""

    ids: np.ndarray
    weights: np.ndarray


def encode(tokenizer: PreTrainedTokenizerFast, batch: list[Example]) -> list[Encoded]:
    """Render through the checkpoint's own template and weigh every token."""
    texts = [render_text(tokenizer, example) for example in batch]
    opening = tokenizer.encode("assistant\n", add_special_tokens=False)
    start, end = (cast(int, tokenizer.convert_tokens_to_ids(token)) for token in (TURN_START, TURN_END))
    encoded = []
    for example, ids in zip(batch, _ids(tokenizer, texts), strict=True):
        replies = [at for at, message in enumerate(example.messages) if message["role"] == "assistant"]
        weights = np.full(len(ids), READ_WEIGHT, np.float32)
        for at, (first, last) in zip(replies, _reply_spans(ids, start, end, opening), strict=True):
            weights[first:last] = 0.0 if at in example.silent else 1.0
        encoded.append(Encoded(np.asarray(ids, np.uint16), weights))
    return [one for one in encoded if len(one.ids) <= CONTEXT]


def render_text(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """The conversation as the template writes it."""
    text = tokenizer.apply_chat_template(
        list(example.messages), tools=list(example.tools) or None, tokenize=False, add_generation_prompt=False
    )
    return str(text)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[str]:
    """Train in place; yields a line of progress now and then."""
    optimizers = _optimizers(model, recipe)
    begun = reported = time.process_time()
    tokens, recent, progress = 0, [], 0.0
    for step, batch in enumerate(_batches(tokenizer, recipe)):
        elapsed = time.process_time() - begun
        progress = max(tokens / recipe.tokens, elapsed / recipe.seconds)
        if progress >= 1.0:
            break
        pace = min(1.0, step / 50 + 0.02) * min(1.0, (1 - progress) / recipe.decay)
        for optimizer, rate in zip(optimizers, (recipe.muon_rate, recipe.adam_rate), strict=True):
            optimizer.param_groups[0]["lr"] = rate * pace
        loss = weighted_loss(model, batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += sum(len(one.ids) for one in batch)
        recent = [*recent[-199:], loss.item()]
        if time.process_time() - reported > 15:
            reported = time.process_time()
            yield f"step={step} tokens={tokens} loss={sum(recent) / len(recent):.4f} seconds={elapsed:.0f}"
    yield f"tokens={tokens} loss={sum(recent) / max(1, len(recent)):.4f} seconds={time.process_time() - begun:.0f} end"


def weighted_loss(model: Qwen3ForCausalLM, batch: list[Encoded]) -> Tensor:
    """Cross-entropy per unit of weight over a padded batch."""
    length = max(len(one.ids) for one in batch)
    ids = np.zeros((len(batch), length), np.int64)
    weights = np.zeros((len(batch), length), np.float32)
    for row, one in enumerate(batch):
        ids[row, : len(one.ids)], weights[row, : len(one.ids)] = one.ids, one.weights
    tokens, weight = torch.from_numpy(ids), torch.from_numpy(weights)[:, 1:].flatten()
    drawn = torch.rand_like(weight) < READ_SHARE
    at = ((weight >= 1) | ((weight > 0) & drawn)).nonzero().squeeze(1)
    found = logits(model, tokens[:, :-1], COMPUTE, at)
    losses = F.cross_entropy(found, tokens[:, 1:].flatten()[at], reduction="none")
    return (losses * weight[at]).sum() / weight[at].sum()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised per matrix; weight decay 0.01 of the step."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.shape)].append(parameter)
            for (rows, columns), same in by_shape.items():
                updates = torch.stack([self._momentum(parameter, group["momentum"]) for parameter in same])
                size = max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(same, orthogonal(updates), strict=True):
                    parameter.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * size)

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """Nesterov's look-ahead of the running gradient."""
        state = self.state[parameter]
        running = state.setdefault("running", torch.zeros_like(parameter))
        gradient = parameter.grad
        assert gradient is not None
        running.lerp_(gradient, 1 - momentum)
        return gradient.lerp(running, momentum)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """[N, R, C] -> about U Vᵀ of each, by the quintic Newton-Schulz iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(COMPUTE)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


def _optimizers(model: Qwen3ForCausalLM, recipe: Recipe) -> tuple[Muon, torch.optim.AdamW]:
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    others = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    return Muon(matrices, lr=recipe.muon_rate), torch.optim.AdamW(
        others, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0
    )


def _batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, pool: int = 3000) -> Iterator[list[Encoded]]:
    """Pools of conversations sorted by length, cut into batches of about equal size, batches in random order."""
    stream, rng, seen = examples(recipe.seed), random.Random(recipe.seed), 0
    while True:
        encoded = encode(tokenizer, list(itertools.islice(stream, pool)))
        rng.shuffle(encoded)
        encoded.sort(key=lambda one: len(one.ids))
        limit = recipe.batch_tokens[0 if seen < recipe.tokens / 2 else 1]
        batches: list[list[Encoded]] = [[]]
        for one in encoded:
            if batches[-1] and (len(batches[-1]) + 1) * len(one.ids) > limit:
                batches.append([])
            batches[-1].append(one)
        rng.shuffle(batches)
        seen += sum(len(one.ids) for one in encoded)
        yield from batches


def _ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], tokenizer(texts, add_special_tokens=False)["input_ids"])


def _reply_spans(ids: list[int], start: int, end: int, opening: list[int]) -> Iterator[tuple[int, int]]:
    """[first, last) of every assistant reply, its end marker included."""
    at, width = 0, len(opening)
    while at < len(ids):
        if ids[at] == start and ids[at + 1 : at + 1 + width] == opening:
            first = at + 1 + width
            at = ids.index(end, first)
            yield first, at + 1
        at += 1
