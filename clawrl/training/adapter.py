"""Adapters: which layers of a model get one, what its tensors are called, and what PEFT writes beside them.

Knows PEFT's names and files (LoRA, arXiv:2106.09685). Ignores training and serving. torch and peft are loaded by what
puts an adapter into a model, and by nothing else here.
"""

from __future__ import annotations

from typing import Any

from clawrl.config import LoraSection
from clawrl.errors import ConfigError
from clawrl.training.checkpoint import tensor_names

_PREFIX, _NAME = "base_model.model.", "default"


def require_targets(lora: LoraSection, model: str) -> None:
    """Raises ConfigError if the model has no layer of one of the names; one that is not here is not looked at."""
    if not (names := tensor_names(model)):
        return
    layers = {name.removesuffix("_packed").removesuffix(".weight").rpartition(".")[2] for name in names}
    if missing := [target for target in lora.targets if target not in layers]:
        known = ", ".join(sorted(name for name in layers if name.endswith(("proj", "_fc", "fc1", "fc2"))))
        raise ConfigError(f"lora.targets: model {model!r} has no layer {missing[0]!r}; it has {known}")


def inject(model: Any, lora: LoraSection) -> Any:
    """Put an adapter into a transformers model, in place: A is random (torch's generator), B is 0, and only they learn.

    They are float32, whatever the type of the model's own weights.
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets))  # pyright: ignore
    inject_adapter_in_model(settings, model, _NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def public_name(name: str) -> str:
    """A parameter's name in an adapter's checkpoint; other parameters keep theirs."""
    return f"{_PREFIX}{name.replace(f'.{_NAME}.', '.')}" if ".lora_" in name else name


def description(lora: LoraSection, model: str) -> dict[str, Any]:
    """adapter_config.json, as PEFT and vLLM read it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
