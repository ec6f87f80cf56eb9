"""Linear layers of a base in 4 bits, frozen under an adapter that learns (QLoRA, arXiv:2305.14314).

Knows the tensors of compressed-tensors' `pack-quantized` form (see `quantized`), as transformers loads them. Weights
stay packed; each product unpacks its own, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedLinear(nn.Linear):
    """input · weightᵀ + bias. qweight is i32[out, in / 8], scale [out, in / group], both the same on every rank.

    A linear layer to PEFT, without a weight to FSDP: buffers are not sharded, parameters in whole numbers cannot be.
    """

    qweight: Tensor  # as PEFT calls it
    scale: Tensor

    def __init__(self, qweight: Tensor, scale: Tensor, shape: tuple[int, int], bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = shape
        self.register_buffer("qweight", qweight, persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]. The lowest bits of each number are its first input, and 8 stands for 0."""
        pairs = self.qweight.view(torch.uint8)  # of inputs; the lowest byte lies first
        values = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)[:, : self.in_features]
        groups = values.to(self.scale.dtype).unflatten(1, (self.scale.shape[1], -1)) - 8
        return (groups * self.scale[..., None]).flatten(1).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        product: Any = _Product.apply(input, self)
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """Keeps nothing of the weight, which is unpacked again for the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.unpacked(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.unpacked(grad.dtype), None


def keep_packed(model: Any) -> Any:
    """Put a PackedLinear in the place of each layer that transformers loaded packed, in place."""
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "weight_packed"):
            continue
        out_features, in_features = (int(size) for size in layer.weight_shape)
        bias = None if layer.bias is None else layer.bias.data
        packed = PackedLinear(layer.weight_packed.data, layer.weight_scale.data, (out_features, in_features), bias)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed)
    if hook := model.__dict__.pop("ct_decompress_hook", None):
        hook.remove()  # it would unpack the whole model at its first use
    return model
