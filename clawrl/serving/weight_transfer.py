"""A vLLM weight-transfer engine that pulls a version's tensors out of Ray's object store.

vLLM loads it in every engine worker through the entry point `vllm.general_plugins` (pyproject.toml). Knows how
buckets are laid out (`types.Bucket`) and vLLM's update protocol: init once, then start / update / finish for each
version. Ignores which version comes next and why: the policy replica says so.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from clawrl.types import Bucket

BACKEND = "clawrl_object_store"


@dataclass
class ObjectStoreInit(WeightTransferInitInfo):
    """Where the worker finds the weight store."""

    address: str  # of the Ray cluster's GCS
    namespace: str
    store: str  # the weight store's actor name


@dataclass
class ObjectStoreUpdate(WeightTransferUpdateInfo):
    """One version to take over, all of its buckets."""

    version: int
    num_buckets: int


class ObjectStoreEngine(WeightTransferEngine[ObjectStoreInit, ObjectStoreUpdate]):
    """Loads buckets straight from shared memory; on another machine Ray has fetched them before the pause."""

    init_info_cls = ObjectStoreInit
    update_info_cls = ObjectStoreUpdate

    def init_transfer_engine(self, init_info: ObjectStoreInit) -> None:
        """Join the Ray cluster from the engine's worker process and find the store. Raises ValueError if absent."""
        if not ray.is_initialized():
            ray.init(address=init_info.address, namespace=init_info.namespace, log_to_driver=False, logging_level=40)
        self._store = ray.get_actor(init_info.store, namespace=init_info.namespace)

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdate) -> None:
        model: Any = self.model
        pending = [self._store.bucket.remote(update_info.version, i) for i in range(update_info.num_buckets)]
        for (ref,) in ray.get(pending):
            model.load_weights(tensors(ray.get(ref), self.device))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _refresh_tied_heads(self.model)

    def shutdown(self) -> None:
        if ray.is_initialized():
            ray.shutdown()


def register() -> None:
    """Entry point `vllm.general_plugins`: make what is ours known to vLLM; safe to call again."""
    _die_with_parent()
    if current_platform.is_cpu():
        from clawrl.serving import cpu_adapters

        cpu_adapters.install()
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, __name__, ObjectStoreEngine.__name__)


def _die_with_parent() -> None:
    """An engine's process ends with the replica that started it, even a replica that was killed (Linux)."""
    if multiprocessing.parent_process() is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _refresh_tied_heads(model: torch.nn.Module) -> None:
    """Give output heads that share the embeddings' weight the new ones.

    A checkpoint has no tensor of its own for them, so vLLM's layerwise reload passes them over; on a CPU such a head
    computes with a repacked copy, which would keep the old weights (vLLM 0.32; the canary shows it).
    """
    embeddings = {id(module.weight): module for module in model.modules() if type(module) is VocabParallelEmbedding}
    for head in model.modules():
        if isinstance(head, ParallelLMHead) and id(head.weight) in embeddings:
            head.quant_method.process_weights_after_loading(head)


def tensors(bucket: Bucket, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of a bucket; bfloat16 arrives as 16-bit integers, which numpy can carry."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        for name, dtype, shape, array in zip(bucket.names, bucket.dtypes, bucket.shapes, bucket.arrays, strict=True):
            tensor = torch.from_numpy(array).view(getattr(torch, dtype)).view(tuple(shape))
            yield name, tensor.to(device)
