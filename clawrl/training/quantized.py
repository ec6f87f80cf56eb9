"""A base in 4 bits (QLoRA, arXiv:2305.14314): which are understood, and how one is made of a model.

Knows compressed-tensors' form `pack-quantized`, which vLLM serves on GPUs and CPUs: signed integers, eight to an int32,
and a scale for each group of inputs. Ignores training (`packed_linear`). torch is loaded by what makes one, and by
nothing else here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clawrl.config import EngineSection
from clawrl.errors import ConfigError, WeightSyncError, boundary
from clawrl.training.checkpoint import appearing, copy_beside_weights, model_folder

FORMAT = "pack-quantized"
BITS = 4


def quantization(model: str) -> dict[str, Any] | None:
    """What a model on this machine says of the form of its weights; None: floating point, or it is not here."""
    try:
        found = json.loads((model_folder(model) / "config.json").read_text(encoding="utf-8"))
    except (WeightSyncError, OSError, ValueError):
        return None
    return found.get("quantization_config")


def require_served(section: str, engine: EngineSection) -> None:
    """Raises ConfigError if the engine has no products for the form of its weights."""
    if quantization(engine.model) is not None and engine.dtype == "float32":
        room = ", and versions.canary_tolerance=0.25 for what it rounds" if section == "policy" else ""
        raise ConfigError(
            f"{section}.dtype=float32: {section}.model={engine.model!r} is quantised, and vLLM multiplies such weights "
            f"in 16 bits only; set {section}.dtype=bfloat16{room}"
        )


def require_trained(model: str, *, adapters: bool) -> None:
    """Raises ConfigError if nothing can be trained over the form of a model's weights."""
    found = quantization(model)
    if found is None:
        return
    if not adapters:
        raise ConfigError(
            f"policy.model={model!r} is quantised: only an adapter over such weights can be trained; add [lora], or "
            "name the model that it was made of"
        )
    if not _understood(found):
        said = f"{found.get('quant_method')} {found.get('format') or ''}".strip()
        raise ConfigError(
            f"policy.model={model!r} is quantised as {said}; training reads compressed-tensors' {FORMAT} with "
            f"symmetric groups of {BITS} bits and no order of activations alone: make one of the model that it was "
            "made of (`clawrl quantize`)"
        )


def _understood(found: Mapping[str, Any]) -> bool:
    groups = list((found.get("config_groups") or {}).values())
    beyond = found.get("transform_config") or found.get("kv_cache_scheme")
    return found.get("format") == FORMAT and bool(groups) and not beyond and all(map(_plain, groups))


def _plain(group: Mapping[str, Any]) -> bool:
    """Weights alone, and no index of groups beside them (the order `weight`, or `static`, needs none)."""
    weights = group.get("weights") or {}
    return (
        (weights.get("num_bits"), weights.get("type"), weights.get("symmetric")) == (BITS, "int", True)
        and weights.get("strategy") in ("group", "channel")
        and weights.get("actorder") in (None, False, "weight", "static")
        and not group.get("input_activations")
        and not group.get("output_activations")
    )


def quantize(model: str, to: Path, group: int) -> tuple[int, int]:
    """Write a model with its linear layers in 4 bits, each weight rounded to the nearest, and its other files.

    `group` inputs share a scale. The head stays as it is: it chooses the tokens, and may be the embeddings' own weight.
    Returns the bytes of all weights before and after. Raises ConfigError if `group` does not divide a layer's inputs,
    or the model is quantised already, has experts or cannot be read; WeightSyncError if it is not here, or `to` cannot
    be written, which leaves nothing.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    folder = model_folder(model)
    if quantization(model) is not None:
        raise ConfigError(f"model {model!r} is quantised already; name the model that it was made of")
    with boundary(ConfigError, f"model {model!r} cannot be read"):
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    before, head = _num_bytes(base), base.get_output_embeddings()
    kept = [name for name, layer in base.named_modules() if layer is head]
    form = QuantizationArgs.model_validate(
        {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=form)
    _require_linear(base, kept, group)
    apply_quantization_config(base, QuantizationConfig(config_groups={"base": scheme}, ignore=kept))
    for layer in base.modules():
        if hasattr(layer, "weight_scale"):
            grouped = layer.weight.data.unflatten(1, (-1, group))
            scale = calculate_qparams(grouped.amin(-1), grouped.amax(-1), form)[0]
            layer.weight_scale.data = scale.bfloat16().to(layer.weight.dtype)  # as engines will read it
    compressor = ModelCompressor.from_pretrained_model(base)
    compressor.compress_model(base)
    with boundary(WeightSyncError, f"{to} cannot be written"), appearing(to) as unfinished:
        copy_beside_weights(folder, unfinished)
        base.save_pretrained(unfinished)
        compressor.update_config(str(unfinished))
    return before, _num_bytes(base)


def _require_linear(model: Any, kept: Sequence[str], group: int) -> None:
    """Raises ConfigError if the model's weights are not those of linear layers that groups divide."""
    experts = [name for name, each in model.named_parameters() if ".experts." in name and each.ndim > 2]
    if experts:
        raise ConfigError(
            f"{experts[0]} is no linear layer: mixtures of experts are not rounded here; name another model"
        )
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear" and name not in kept and layer.in_features % group:
            raise ConfigError(
                f"a group of {group} does not divide the {layer.in_features} inputs of {name}; name another"
            )


def _num_bytes(model: Any) -> int:
    return sum(each.numel() * each.element_size() for each in model.parameters())
