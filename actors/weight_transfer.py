"""vLLM's side of a weight transfer: takes packed chunks into a running engine through vLLM's own update protocol.

    start_weight_update -> update_weights (once per chunk) -> finish_weight_update

Loaded inside the engine's worker processes: `worker_extension_cls` names WorkerExtension, and importing this module
registers the backend. Weights arrive in one of three ways:

- `chunk`: the WeightChunk itself, when engine and caller share a process. Zero-copy from the object store to the model.
- `path`: a file of the chunk's bytes in shared memory, mapped by each worker process of the engine (its tensor-parallel
  ranks included). The caller keeps the file until update_weights returned. All ranks must be on the caller's host; an
  engine spread over hosts is not supported.
- `broadcast`: all of them by NCCL, in one update (nccl_channel).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import LAYERWISE_INFO, _place_kernel_tensors

from sppo_ray.secrets import hide_in_logs
from sppo_ray.weight_chunks import WeightChunk, unpack

hide_in_logs()  # an engine's process of its own begins with nothing else of ours, and writes to its actor's log

BACKEND = "sppo_chunks"
EXTENSION = "actors.weight_transfer.WorkerExtension"


@dataclass
class ChunkInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing: chunks come with each update, and a broadcast brings its own process group."""


@dataclass
class ChunkUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """`chunk`, or `path` with the chunk's header, or `broadcast`: arguments of nccl_channel.receive."""

    chunk: WeightChunk | None = None
    path: str | None = None
    names: list[str] | None = None
    dtypes: list[str] | None = None
    shapes: list[list[int]] | None = None
    broadcast: dict[str, Any] | None = None

    def resolve(self) -> WeightChunk:
        """The chunk. A mapped file stays mapped as long as a tensor of it lives, even after it was unlinked."""
        if self.chunk is not None:
            return self.chunk
        if self.path is None or self.names is None or self.dtypes is None or self.shapes is None:
            raise ValueError("a weight update needs `chunk`, or `path` with `names`, `dtypes` and `shapes`")
        data = np.memmap(self.path, dtype=np.uint8, mode="r")
        return WeightChunk(tuple(self.names), tuple(self.dtypes), tuple(map(tuple, self.shapes)), data)


class ChunkTransferEngine(WeightTransferEngine[ChunkInitInfo, ChunkUpdateInfo]):  # type: ignore[misc]
    """Loads chunks in checkpoint format with vLLM's layerwise reload (plain load_weights fails on prepacked layers)."""

    init_info_cls = ChunkInitInfo
    update_info_cls = ChunkUpdateInfo

    def init_transfer_engine(self, init_info: ChunkInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ChunkUpdateInfo) -> None:
        if update_info.broadcast is None:
            self.model.load_weights(unpack(update_info.resolve()))
        else:
            from actors import nccl_channel  # imports ray, which the engine's processes need for nothing else

            nccl_channel.receive(self, **update_info.broadcast)

    def finish_weight_update(self) -> None:
        """Raises ValueError when a layer got no weights: vLLM would keep its old ones and only log a warning."""
        missing, tied = _layers_still_waiting(self.model)
        if missing:
            raise ValueError(f"the published weights hold nothing for {len(missing)} layers, e.g. {missing[:3]}")
        finalize_layerwise_reload(self.model, self.model_config)
        for layer in tied:
            # A tied output layer shares its tensor with the embedding, which was loaded, but on CPU it computes with a
            # packed copy made at start. vLLM 0.32 does not make it again, so the old output layer would go on serving.
            quant_method = getattr(layer, "quant_method", None)
            if isinstance(quant_method, QuantizeMethodBase):
                quant_method.process_weights_after_loading(layer)

    def abandon(self) -> None:
        """Undo what an interrupted update left pending, so that the next one starts from nothing.

        vLLM keeps the half-counted tensors of an interrupted layer, and `start` skips such layers, so the repeated tensors
        would count twice and the layer would be processed before it is whole: of 37 places to interrupt the embedded
        policy's update, 16 could not be recovered by repeating it. So put the kernel tensors back and forget the counts.
        Layers that were complete keep their new weights: the model is a mixture until a whole update went through.
        """
        for layer in self.model.modules():
            info = LAYERWISE_INFO.get(layer)
            if info is not None and info.can_load():
                if info.kernel_tensors is not None:
                    _place_kernel_tensors(layer, info)
                info.reset()

    def shutdown(self) -> None:
        """Nothing is held between updates."""


def _layers_still_waiting(model: torch.nn.Module) -> tuple[list[str], list[torch.nn.Module]]:
    """The layers that got no tensor in the open update: (names of those left out, those tied to a layer that got its own).

    Attention layers are not counted: they have scales only, which are not published.
    """
    waiting: list[tuple[str, torch.nn.Module, set[int]]] = []
    arrived: set[int] = set()  # ids of the parameters in use by layers that got tensors
    for name, layer in model.named_modules():
        info = LAYERWISE_INFO.get(layer)
        set_aside = info.kernel_tensors[0] if info is not None and info.kernel_tensors is not None else None
        if info is None or set_aside is None or info.load_numel:
            in_use = layer._parameters if set_aside is None else set_aside
            arrived.update(id(parameter) for parameter in in_use.values())
        elif set_aside and not is_deferred_attention_layer(layer):
            waiting.append((name, layer, {id(parameter) for parameter in set_aside.values()}))
    missing = [name for name, _, parameters in waiting if not parameters <= arrived]
    return missing, [layer for _, layer, parameters in waiting if parameters <= arrived]


class WorkerExtension:
    """Mixed into vLLM's worker class; importing this module is its main purpose."""

    def abandon_weight_update(self) -> None:
        """Back to before start_weight_update; harmless when no update is open."""
        self.weight_transfer_engine.abandon()  # type: ignore[attr-defined]
        self.weight_transfer_engine.reset_weight_update_target()  # type: ignore[attr-defined]
        self._weight_update_active = False


if BACKEND not in WeightTransferEngineFactory._registry:  # the engine's process may import this under two sys.paths
    WeightTransferEngineFactory.register_engine(BACKEND, ChunkTransferEngine)
