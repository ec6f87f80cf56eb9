"""A trained reward model: P(approved) of a reply, by a frozen base model's features and a head fitted to thumbs.

Knows transformers, the folder that `clawrl train-judge` writes, and how exact token ids become features. Ignores the
journal, votes and who asks. The features of a reply are the mean over its tokens of the base's last hidden states, in
the type that the base's files have. (On the built-in model that is as good as the last token's where the end of a reply
tells, and better where its first word does: 0.89 of replies against 0.77, of 100 labels with a tenth of them wrong.)

    FOLDER/head.safetensors      weight f32[H], bias f32[1]
    FOLDER/reward_model.json     the base model, what the head was fitted to, how it did on what was held out
"""

from __future__ import annotations

import json
import shutil
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clawrl.algorithms.reward import Head, probability, verdict
from clawrl.config import model_path
from clawrl.errors import ClawrlError, ConfigError, JudgeError
from clawrl.serving.endpoint import RefusedError

HEAD = "head.safetensors"
ABOUT = "reward_model.json"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How a head did on labels of sessions that it was not fitted to; None where there is nothing to measure it on."""

    approved: int
    refused: int
    coverage: float | None  # share of them on which it takes a side
    accuracy: float | None  # share of those on which it takes the people's side
    accuracy_of_all: float  # the same of all of them, without abstaining
    majority: float  # of all of them, by always guessing what is more frequent among the labels it was fitted to
    ece: float | None  # see `algorithms.calibration`
    auc: float | None


@dataclass(frozen=True, slots=True)
class About:
    """What stands in reward_model.json."""

    model: str  # the base, as it was named
    hidden_size: int
    approved: int  # labels of +1 that it was fitted to
    refused: int  # of -1
    held_out: HeldOut
    margin: float  # |P - 1/2| below which it abstains
    l2: float
    made: str  # ISO 8601, UTC


class Features:
    """A frozen base model that reads replies. Raises JudgeError if it cannot be loaded."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import AutoModel

        try:
            base = AutoModel.from_pretrained(model_path(model), dtype="auto")
            self._base = base.eval().requires_grad_(False).to(device)
        except (OSError, ValueError, RuntimeError) as error:
            raise JudgeError(f"model {model!r} cannot be loaded on {device}: {error}") from error
        text = self._base.config.get_text_config()
        self.size, self.vocabulary = int(text.hidden_size), int(text.vocab_size)
        self._context = int(text.max_position_embeddings)
        self._device = device

    def __call__(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> np.ndarray:
        """f32[H] of a reply i32[T] after its prompt i32[P]; beyond the context the first tokens are left out.

        Raises RefusedError for an empty reply, and for ids that the model does not have.
        """
        import torch

        ids = np.concatenate([prompt_ids, completion_ids]).astype(np.int64)[-self._context :]
        if not len(completion_ids) or ids.max() >= self.vocabulary or ids.min() < 0:
            raise RefusedError(
                f"a reply of {len(completion_ids)} tokens up to id {ids.max(initial=0)} cannot be read by a model of "
                f"{self.vocabulary} tokens; take a base with the policy's tokenizer"
            )
        with torch.inference_mode():
            tokens = torch.from_numpy(ids)[None].to(self._device)
            hidden = self._base(input_ids=tokens, use_cache=False).last_hidden_state[0]  # [L, H]
            return hidden[-len(completion_ids) :].float().mean(0).cpu().numpy()


class RewardModel:
    """Base and head together."""

    def __init__(self, features: Features, head: Head, margin: float) -> None:
        self._features, self._head, self._margin = features, head, margin

    @classmethod
    def load(cls, folder: str, model: str, device: str = "cpu") -> RewardModel:
        """The one in a folder, on its base `model`. Raises ConfigError if it holds none, or one of another base."""
        about, head = read(folder, model)
        features = Features(model, device)
        if features.size != about.hidden_size:
            raise ConfigError(
                f"{folder} is of a model with hidden size {about.hidden_size}, and {model!r} has {features.size}; "
                "train it anew (`clawrl train-judge`)"
            )
        return cls(features, head, about.margin)

    def probability(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> float:
        """P(approved) of a reply i32[T] after a prompt i32[P]. Raises RefusedError as `Features` does."""
        return float(probability(self._head, self._features(prompt_ids, completion_ids)))

    def verdict(self, prompt_ids: np.ndarray, completion_ids: np.ndarray) -> int | None:
        """+1 or -1; None where the model abstains, and for a reply whose tokens are not kept."""
        if not len(completion_ids):
            return None
        return verdict(self.probability(prompt_ids, completion_ids), self._margin)


def read(folder: str, model: str) -> tuple[About, Head]:
    """What a folder holds. Raises ConfigError if that is no reward model, or one of another base than `model`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        told: dict[str, Any] = json.loads((Path(folder) / ABOUT).read_text(encoding="utf-8"))
        about = About(**{**told, "held_out": HeldOut(**told["held_out"])})
        tensors = load_file(Path(folder) / HEAD)
        head = Head(tensors["weight"], float(tensors["bias"][0]))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"{folder!r} holds no reward model ({type(error).__name__}: {error}); name a folder that "
            "`clawrl train-judge` has written"
        ) from None
    if head.weight.shape != (about.hidden_size,):
        raise ConfigError(f"{folder!r} is broken: {HEAD} and {ABOUT} differ in size; train it anew")
    if _place(about.model) != _place(model):
        raise ConfigError(
            f"{folder!r} is of the base model {about.model!r}, and the judge's is {model!r}; "
            f"train one of it (`clawrl train-judge --model {model}`), or judge by the other"
        )
    return about, head


def require_reward_model(folder: str | None, base: str, policy: str) -> None:
    """Raises ConfigError if the folder holds no reward model of the judge's `base`, or `policy` has other tokens."""
    if folder is None:
        return
    try:
        read(folder, base)
    except ConfigError as error:
        raise ConfigError(f"judge.reward_model={error}") from None
    if _place(base) == _place(policy):
        return
    from transformers import AutoTokenizer

    try:
        one, other = (AutoTokenizer.from_pretrained(model_path(model)).get_vocab() for model in (base, policy))
    except (OSError, ValueError) as error:
        raise ConfigError(f"judge.reward_model={folder!r} reads the policy's tokens, but {error}") from error
    if one != other:
        raise ConfigError(
            f"judge.reward_model={folder!r} reads the policy's tokens, but judge.model={base!r} has others than "
            f"policy.model={policy!r}; train one on a base with the policy's tokenizer, or unset it"
        )


def write(folder: Path, about: About, head: Head) -> None:
    """All of it or nothing: it is written beside and renamed. Raises ClawrlError if that cannot be done."""
    from safetensors.numpy import save_file

    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        save_file({"weight": head.weight, "bias": np.array([head.bias], np.float32)}, unfinished / HEAD)
        (unfinished / ABOUT).write_text(json.dumps(asdict(about), indent=2) + "\n", encoding="utf-8")
        unfinished.rename(folder)  # takes the place of an empty folder, never of another
    except OSError as error:
        raise ClawrlError(f"{folder} cannot be written: {error.strerror}; name a new or empty folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _place(model: str) -> str:
    """The same for all names of one model."""
    try:
        return model_path(model)
    except ConfigError:
        return model
