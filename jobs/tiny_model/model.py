"""The tiny model's shape, and a forward pass over its Hugging Face parameters with few kernels.

Knows Qwen3's architecture. Ignores text, data and optimizers. The checkpoint is an ordinary Qwen3ForCausalLM; only
the pre-training here uses `logits`, which gives the same numbers with less overhead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from jobs.tiny_model.tokenizer import VOCABULARY

CONTEXT = 2048


def config(pad: int, end: int) -> Qwen3Config:
    """2.0 M parameters: 4 layers of 192, 3 query heads over 1 key-value head of 64, feed-forward 576, tied."""
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )


def make_model(pad: int, end: int, seed: int) -> Qwen3ForCausalLM:
    """Fresh weights: normal with 0.02 for embeddings, 1/sqrt(fan in) for matrices, small where a branch ends."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config(pad, end)).float()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            ends_branch = "o_proj" in name or "down_proj" in name
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * (0.2 if ends_branch else 1.0))
    return model


def logits(
    model: Qwen3ForCausalLM, ids: Tensor, dtype: torch.dtype = torch.float32, at: Tensor | None = None
) -> Tensor:
    """f32[N, V] at the N flat positions `at` of ids i64[B, L]; without `at`, f32[B, L, V].

    Rows are padded at their end, which causal attention never looks at. Products are taken in `dtype`; the residual
    stream and the norms stay in float32.
    """
    shape: Any = model.config
    inner: Any = model.model
    eps = shape.rms_norm_eps
    batch, length = ids.shape
    width, size, heads = shape.hidden_size, shape.head_dim, shape.num_attention_heads
    cosine, sine = _rotary(length, size, shape.rope_parameters["rope_theta"])
    x = inner.embed_tokens(ids)
    for layer in inner.layers:
        attention, feed = layer.self_attn, layer.mlp
        h = F.rms_norm(x, (width,), layer.input_layernorm.weight, eps).to(dtype)
        projections = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
        q, k, v = (
            F.linear(h, torch.cat(projections).to(dtype))
            .view(batch, length, heads + 2, size)
            .transpose(1, 2)
            .split((heads, 1, 1), dim=1)
        )
        q = _rotate(F.rms_norm(q.float(), (size,), attention.q_norm.weight, eps), cosine, sine).to(dtype)
        k = _rotate(F.rms_norm(k.float(), (size,), attention.k_norm.weight, eps), cosine, sine).to(dtype)
        mixed = _attend(q, k, v)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, length, -1), attention.o_proj.weight.to(dtype))
        h = F.rms_norm(x, (width,), layer.post_attention_layernorm.weight, eps).to(dtype)
        gate, up = F.linear(h, torch.cat([feed.gate_proj.weight, feed.up_proj.weight]).to(dtype)).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, feed.down_proj.weight.to(dtype))
    x = x if at is None else x.flatten(0, 1)[at]
    x = F.rms_norm(x, (width,), inner.norm.weight, eps).to(dtype)
    return F.linear(x, inner.embed_tokens.weight.to(dtype)).float()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, H, L, D] queries to one head of keys and values [B, 1, L, D].

    Written out: on a CPU and on rows this short it takes a third of the time of the fused kernel's backward.
    """
    batch, heads, length, size = q.shape
    scores = (q.reshape(batch, heads * length, size) @ k[:, 0].mT).view(batch, heads, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (scores * size**-0.5).masked_fill(hidden, float("-inf")).softmax(dim=-1)
    return (weights.view(batch, heads * length, length) @ v[:, 0]).view(batch, heads, length, size)


def _rotary(length: int, size: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, each f32[L, size], halves repeated as Hugging Face does."""
    rates = base ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
