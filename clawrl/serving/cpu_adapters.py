"""Adapters on a CPU: what vLLM's linear layers add for them, one matrix product per adapter in the batch.

vLLM's own (0.32) copies both matrices of the adapter for every token, and counts a token without an adapter as one of
the last slot's: a judge that shares the engine would speak with whichever adapter is there. Loaded in the engine's
process (`weight_transfer.register`). Knows vLLM's interface; ignores versions and requests.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class GroupedAdapters(PunicaWrapperCPU):
    """For the linear layers; what vLLM does to embeddings and heads is its own, and no adapter of ours is there."""

    def update_metadata(self, *arguments: Any, **options: Any) -> None:
        super().update_metadata(*arguments, **options)
        self._groups = groups(self.token_lora_indices)

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **_: Any,
    ) -> None:
        """y[t, slice i] += scale · B_i A_i x[t] by the adapter of each token t, in place.

        y is [T, all slices], x [T, in]; A_i and B_i are [slots, 1, rank, in] and [slots, 1, slice i, rank].
        """
        for slot, rows in self._groups:
            inputs = x if rows is None else x[rows]
            start = 0
            for a, b, size in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                added = (inputs @ a[slot, 0].t()) @ (b[slot, 0] if scale == 1 else scale * b[slot, 0]).t()
                there = y[:, start : start + size]
                if rows is None:
                    there += added
                else:
                    there.index_add_(0, rows, added)
                start += size


def groups(slots: torch.Tensor) -> list[tuple[int, torch.Tensor | None]]:
    """(slot, its tokens i64[n]) of each adapter among the tokens' slots i64[T]; None: all tokens. -1 has no adapter."""
    found = [slot for slot in slots.unique().tolist() if slot >= 0]
    if len(found) == 1 and bool((slots == found[0]).all()):
        return [(found[0], None)]
    return [(slot, (slots == slot).nonzero()[:, 0]) for slot in found]


def install() -> None:
    """Let vLLM use it for its CPU engines."""
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.get_punica_wrapper = classmethod(lambda _: f"{__name__}.{GroupedAdapters.__name__}")  # type: ignore
