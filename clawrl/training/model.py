"""The language model as the trainer sees it: packed rows in, log-probabilities of chosen tokens out.

Knows transformers' causal language models, packed attention and FSDP2. Ignores losses, batches and Ray. Several
sequences stand in one row; attention stays inside each (`bounds`), and full-vocabulary logits exist for at most
`logit_chunk` positions at a time, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM

from clawrl.config import LoraSection
from clawrl.errors import ConfigError
from clawrl.training.adapter import inject
from clawrl.training.packed_linear import keep_packed
from clawrl.training.quantized import require_trained

ATTENTION = "clawrl_packed"
RESHARD_ABOVE_PARAMETERS = 500_000_000  # smaller models stay whole between forward and backward: fewer collectives


class Scored(NamedTuple):
    """What a forward pass says about the scored positions of a row (a tuple, so that FSDP sees the tensors)."""

    logprobs: Tensor  # f32[S], of the targets
    support: Tensor  # f32[S, k], of the support tokens
    entropy: Tensor  # f32[S], of the whole distribution; no gradient


class TokenScorer(nn.Module):
    """A causal language model that scores chosen tokens of packed rows."""

    def __init__(self, model: nn.Module, logit_chunk: int) -> None:
        super().__init__()
        self.model: Any = model
        self.logit_chunk = logit_chunk

    @classmethod
    def load(
        cls,
        folder: str,
        *,
        logit_chunk: int,
        activation_checkpointing: bool = False,
        lora: LoraSection | None = None,
        frozen_dtype: torch.dtype = torch.float32,
    ) -> TokenScorer:
        """Read a Hugging Face model as float32 master weights, or in `frozen_dtype` under an adapter that learns.
        What is in 4 bits stays so (`packed_linear`).

        Raises ConfigError if it cannot be trained packed.
        """
        require_trained(folder, adapters=lora is not None)  # a model that has just been downloaded was not looked at
        dtype = torch.float32 if lora is None else frozen_dtype
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=ATTENTION)
        _require_plain(model, folder)
        if lora is not None:
            model = inject(keep_packed(model), lora)
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return cls(model.train(), logit_chunk)

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        bounds: Sequence[int],
        positions: Tensor,
        targets: Tensor,
        support: Tensor,
    ) -> Scored:
        """token_ids and position_ids i64[T]; positions and targets i64[S]; support i64[S, k]. See `PackedRow`."""
        hidden = self.model.base_model(
            input_ids=token_ids[None],
            position_ids=position_ids[None],
            use_cache=False,
            packed_bounds=tuple(bounds),
            packed_offsets=torch.tensor(bounds, dtype=torch.int32, device=token_ids.device),
        ).last_hidden_state[0]
        hidden = hidden[positions]
        chosen = torch.cat([targets[:, None], support], dim=1)
        chunks = list(zip(hidden.split(self.logit_chunk), chosen.split(self.logit_chunk), strict=True))
        if len(chunks) == 1:
            parts = [self._score(*chunks[0])]
        else:
            parts = [checkpoint(self._score, *chunk, use_reentrant=False) for chunk in chunks]
        picked, entropy = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return Scored(picked[:, 0].clone(), picked[:, 1:].clone(), entropy)

    def _score(self, hidden: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities f32[C, 1 + k] of chosen tokens i64[C, 1 + k] and entropy f32[C] of C positions."""
        logits = self.model.get_output_embeddings()(hidden).float()
        normaliser = logits.logsumexp(-1, keepdim=True)
        with torch.no_grad():
            entropy = normaliser[:, 0] - ((logits - normaliser).exp() * logits).sum(-1)
        return logits.gather(-1, chosen) - normaliser, entropy


def shard(scorer: TokenScorer, mesh: DeviceMesh, dtype: torch.dtype) -> TokenScorer:
    """Spread parameters over the mesh with FSDP2, a group per decoder layer and one for the rest, in place.

    Master weights and gradients stay float32; compute runs in `dtype`. The root keeps embeddings, final norm and
    head together, so tied embeddings stay one parameter.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype != torch.float32 else None
    options: dict[str, Any] = {"mesh": mesh} | ({"mp_policy": precision} if precision else {})
    reshard = sum(parameter.numel() for parameter in scorer.parameters()) > RESHARD_ABOVE_PARAMETERS
    for layer in decoder_layers(scorer.model):
        fully_shard(layer, reshard_after_forward=reshard, **options)
    # The head is used again in the backward pass of every logit chunk: keep it whole.
    fully_shard(scorer, reshard_after_forward=False, **options)
    return scorer


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformers model, as the model itself names them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_bounds: tuple[int, ...] = (),
    packed_offsets: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence of a row: query [1, H, T, D], key and value [1, H_kv, T, D].

    Returns [1, T, H, D], as transformers' AttentionInterface asks. On a GPU in 16 bits one variable-length kernel
    does all sequences; elsewhere scaled_dot_product_attention runs once per sequence.
    """
    if softcap is not None or s_aux is not None:
        raise ConfigError("the model uses capped attention scores or attention sinks, which training lacks")
    kernel = _varlen_kernel() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else None
    if kernel is not None and packed_offsets is not None:
        longest = max(b - a for a, b in pairwise(packed_bounds))
        flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        return kernel(*flat, packed_offsets, longest, scaling, sliding_window)[None], None
    lengths = [b - a for a, b in pairwise(packed_bounds)] or [query.shape[2]]
    grouped = query.shape[1] != key.shape[1]
    outputs = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=(mask := _window(q, sliding_window)), is_causal=mask is None, scale=scaling,
            enable_gqa=grouped,
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@cache
def _varlen_kernel() -> Any:
    """flash-attention 2 if it is installed, else torch's own variable-length attention, else None.

    Called as kernel(query [T, H, D], key, value [T, H_kv, D], offsets i32[n + 1], longest, scale, window).
    """
    try:
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        return lambda q, k, v, offsets, longest, scale, window: flash_attn_varlen_func(
            q, k, v, offsets, offsets, longest, longest, softmax_scale=scale, causal=True,
            window_size=(window - 1, 0) if window else (-1, -1),
        )  # fmt: skip
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return lambda q, k, v, offsets, longest, scale, window: varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=scale,
        window_size=((window - 1) if window else -1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _window(query: Tensor, sliding_window: int | None) -> Tensor | None:
    """The mask of sliding-window attention, bool[T, T], where a sequence is longer than the window."""
    length = query.shape[2]
    if not sliding_window or length <= sliding_window:
        return None
    at = torch.arange(length, device=query.device)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _require_plain(model: nn.Module, folder: str) -> None:
    """Refuse models whose scores would silently differ: ours knows neither capped logits nor attention sinks."""
    config = model.config
    for key in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, key, None) not in (None, 1, 1.0):
            raise ConfigError(f"model {folder} sets {key}={getattr(config, key)}, which training lacks; choose another")
    if not decoder_layers(model):
        raise ConfigError(f"model {folder} does not name its decoder layers, so it cannot be sharded; choose another")


AttentionInterface.register(ATTENTION, packed_attention)
