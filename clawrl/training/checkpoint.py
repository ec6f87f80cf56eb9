"""Checkpoints on disk: a Hugging Face or PEFT folder per version, written once and read as transfer buckets.

Knows the safetensors format (8-byte header length, JSON header, raw tensors), which needs no torch. Ignores versions'
states and who reads. A folder appears whole or not at all, and is on the disk when `write_checkpoint` returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from clawrl.config import model_path
from clawrl.errors import WeightSyncError, boundary
from clawrl.types import EMA, GROUP, Bucket, Canary

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CARRIERS = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "F16": np.dtype("<f2")}
_NAMES = {code: name for name, code in _CODES.items()}
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_CANARY, _AVERAGE = "canary.npz", "ema.safetensors"


def model_folder(model: str) -> Path:
    """The folder of a model given as in the config: `clawrl:tiny`, a folder, or a name in the Hugging Face cache."""
    if Path(found := model_path(model)).is_dir():
        return Path(found)
    from huggingface_hub import snapshot_download

    with boundary(WeightSyncError, f"model {model!r} is neither a folder nor in the Hugging Face cache"):
        return Path(snapshot_download(model, local_files_only=True))


def write_checkpoint(folder: Path, buckets: Sequence[Bucket], base: Path, canary: Canary | None = None) -> None:
    """Write buckets as safetensors next to the base model's configuration and tokenizer files.

    Durable on return: files and folder are synchronised, the folder renamed into place. An older folder of the same
    name, left by a crash before its version was recorded, is replaced.
    """
    with appearing(folder, replaces=True) as unfinished:
        copy_beside_weights(base, unfinished)
        count = len(buckets)
        files = [
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for i in range(count)
        ]
        for file, bucket in zip(files, buckets, strict=True):
            _write_safetensors(unfinished / file, bucket)
        if count > 1:
            _write_index(unfinished, files, buckets)
        if canary is not None:
            write_canary(unfinished, canary)


def write_adapter(folder: Path, buckets: Sequence[Bucket], description: dict[str, Any], canary: Canary) -> None:
    """The same for an adapter, as PEFT writes it: one file of tensors, and adapter_config.json.

    Its moving average, where there is one, is another file beside it.
    """
    with appearing(folder, replaces=True) as unfinished:
        _write_safetensors(unfinished / "adapter_model.safetensors", _joined(buckets, average=False))
        if (average := _joined(buckets, average=True)).names:
            _write_safetensors(unfinished / _AVERAGE, average)
        (unfinished / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        write_canary(unfinished, canary)


def copy_beside_weights(model: Path, folder: Path) -> None:
    """Copy what a model's folder holds beside its weights: configuration, tokenizer, template."""
    for file in model.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


@contextmanager
def appearing(folder: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` once all is on the disk.

    That of none or of an empty one, or of whatever is there (`replaces`).
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _synchronise(unfinished)
        if replaces:
            shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    except BaseException:  # of a full disk, it gives back what it took
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    _synchronise(folder.parent)


def read_buckets(folder: Path, bucket_bytes: int) -> Iterator[Bucket]:
    """The tensors of a checkpoint as buckets of at most `bucket_bytes`, mapped from disk, in the files' order."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightSyncError(f"checkpoint {folder} has no *.safetensors file; restore the folder or roll back")
    names: list[str] = []
    arrays: list[np.ndarray] = []
    codes: list[str] = []
    size = 0
    for file in files:
        for name, code, array in _read_safetensors(file):
            if names and size + array.nbytes > bucket_bytes:
                yield _bucket(names, codes, arrays)
                names, codes, arrays, size = [], [], [], 0
            names.append(name)
            codes.append(code)
            arrays.append(array)
            size += array.nbytes
    yield _bucket(names, codes, arrays)


def require_whole(folder: Path) -> None:
    """Raise WeightSyncError, naming the file, if a version's checkpoint is not all there. Tensors are not read."""
    files = {file.name for file in folder.glob("*.safetensors")}
    if not files - {_AVERAGE}:
        raise WeightSyncError(f"checkpoint {folder} has no *.safetensors file; restore the folder or roll back")
    index = folder / "model.safetensors.index.json"
    with boundary(WeightSyncError, f"checkpoint file {index} cannot be read; restore it or roll back"):
        expected = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else files
    if missing := sorted(expected - files):
        raise WeightSyncError(f"checkpoint {folder}: {missing[0]} is missing; restore it or roll back")
    for file in sorted(expected):
        with boundary(WeightSyncError, f"checkpoint file {file} cannot be read; restore it or roll back"):
            _read_header(folder / file)
    if read_canary(folder) is None:
        raise WeightSyncError(f"checkpoint {folder} has no {_CANARY}; restore it or roll back")


def states_of(scope: str) -> str:
    """The folder of a policy among those of the trainer's states."""
    return "group" if scope == GROUP else hashlib.sha256(scope.encode()).hexdigest()[:32]


def remove_states(folder: Path, numbers: Collection[int]) -> None:
    """Remove what `resume` keeps of the trainer's state with these versions, and all that is only half written.

    A state that is being written right now is lost too, which costs the exactness of a restart and nothing else.
    """
    for state in [path for number in numbers for path in folder.glob(f"*/{number}-from-*")]:
        shutil.rmtree(state, ignore_errors=True)
    for policy in folder.glob("*/"):
        remove_unfinished(policy)


def remove_unfinished(folder: Path) -> None:
    """Remove what a crash left half written."""
    for left in folder.glob(".*.unfinished"):
        shutil.rmtree(left, ignore_errors=True)


def export_checkpoint(source: Path, destination: Path) -> None:
    """Copy a checkpoint's folder to `destination`, which appears whole or not at all.

    The configuration then says the weights' own type. Raises WeightSyncError if there is something already.
    """
    if not destination.is_absolute():
        raise WeightSyncError(f"export folder {destination} is relative to nothing here; give an absolute path")
    with boundary(WeightSyncError, f"export folder {destination} cannot be written"):
        if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
            raise WeightSyncError(f"export folder {destination} exists and is not empty; name another")
        with appearing(destination) as unfinished:
            for file in source.iterdir():
                if file.is_file() and file.name not in (_CANARY, _AVERAGE) and not file.name.startswith("."):
                    shutil.copyfile(file, unfinished / file.name)
            if (unfinished / "config.json").exists():  # an adapter has none
                _state_type(unfinished / "config.json", source)


def _state_type(file: Path, source: Path) -> None:
    """Make a configuration say the type that the weights in `source` have, if it is one."""
    header, _ = _read_header(min(source.glob("*.safetensors")))
    types = {entry["dtype"] for entry in header.values()}
    config = json.loads(file.read_text(encoding="utf-8"))
    if len(types) == 1 and (dtype := types.pop()) in _NAMES:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": _NAMES[dtype]}
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def tensor_names(model: str) -> set[str]:
    """Names of a model's tensors on this machine; none if it is not here, or not as safetensors."""
    try:
        files = list(model_folder(model).glob("*.safetensors"))
        return {name for file in files for name in _read_header(file)[0]}
    except (WeightSyncError, OSError, ValueError):
        return set()


def write_canary(folder: Path, canary: Canary) -> None:
    """Keep a version's canary in its folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"token_ids_{i}": ids for i, ids in enumerate(canary.token_ids)}
    arrays |= {f"logprobs_{i}": logprobs for i, logprobs in enumerate(canary.logprobs)}
    np.savez(folder / _CANARY, **arrays)  # pyright: ignore[reportArgumentType]


def read_canary(folder: Path) -> Canary | None:
    """The canary kept in a version's folder, if there is one."""
    file = folder / _CANARY
    if not file.is_file():
        return None
    with boundary(WeightSyncError, f"{file} cannot be read; restore it or roll back"), np.load(file) as arrays:
        count = len(arrays.files) // 2
        return Canary(
            token_ids=tuple(arrays[f"token_ids_{i}"] for i in range(count)),
            logprobs=tuple(arrays[f"logprobs_{i}"] for i in range(count)),
        )


def _bucket(names: list[str], codes: list[str], arrays: list[np.ndarray]) -> Bucket:
    return Bucket(
        names=tuple(names),
        dtypes=tuple(_NAMES[code] for code in codes),
        shapes=tuple(array.shape for array in arrays),
        arrays=tuple(arrays),
    )


def _joined(buckets: Sequence[Bucket], *, average: bool) -> Bucket:
    """The tensors of a version's moving average, or all others."""
    columns = ((each.names, each.dtypes, each.shapes, each.arrays) for each in buckets)
    rows = [row for each in columns for row in zip(*each, strict=True) if row[0].startswith(EMA) is average]
    return Bucket(*zip(*rows, strict=True)) if rows else Bucket((), (), (), ())


def _write_safetensors(file: Path, bucket: Bucket) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, array in zip(bucket.names, bucket.dtypes, bucket.arrays, strict=True):
        start, end = end, end + array.nbytes
        header[name] = {"dtype": _CODES[dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for array in bucket.arrays:
            out.write(np.ascontiguousarray(array).data)


def _read_safetensors(file: Path) -> Iterator[tuple[str, str, np.ndarray]]:
    with boundary(WeightSyncError, f"checkpoint file {file} cannot be read; restore it or roll back"):
        header, first = _read_header(file)
        content = np.asarray(np.memmap(file, np.uint8, "r"))
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in _CARRIERS:
                raise WeightSyncError(f"{file}: {name} has type {entry['dtype']}; known are {', '.join(_CARRIERS)}")
            start, end = (first + offset for offset in entry["data_offsets"])
            yield name, entry["dtype"], content[start:end].view(_CARRIERS[entry["dtype"]]).reshape(entry["shape"])


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(entries by tensor name, where the tensors begin). Raises ValueError if the file is shorter than it says."""
    with file.open("rb") as source:
        first = 8 + int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(first - 8))
    header.pop("__metadata__", None)
    size, end = file.stat().st_size, first + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise ValueError(f"it has {size} bytes of {end}")
    return header, first


def _write_index(folder: Path, files: Sequence[str], buckets: Sequence[Bucket]) -> None:
    where = {name: file for file, bucket in zip(files, buckets, strict=True) for name in bucket.names}
    total = sum(array.nbytes for bucket in buckets for array in bucket.arrays)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _synchronise(folder: Path) -> None:
    """fsync a folder and the files in it."""
    for path in [*(file for file in folder.iterdir() if file.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
