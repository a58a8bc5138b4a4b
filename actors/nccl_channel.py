"""One NCCL broadcast of published weights, from rank 0 of the learner to every rollout worker that is up.

vLLM's packed transfer on both sides: its process group, its producer and its NCCLWeightTransferEngine. What is not its own
is the driving: vLLM's trainer engine gives every client the same rank offset, and it knows neither our pauses nor our
versions. So the worker is told to `load` as with the other channels, and its engine receives where it else would pull.

    rank 0                                   hub                    rollout workers
    chunks -----------------------------> commit(broadcast=...)
    load(version) ------------------------------------------------> update_weights: join the group
    open the group, broadcast the chunks =========================> receive, check, serve
    end_broadcast -----------------------> workers that restart now pull the chunks

The group lives for one publish, so workers may come and go between publishes. The names, dtypes and shapes are known
beforehand from the chunks, and no gathering of the learner's ranks takes part in the broadcast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, trainer_init, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
from vllm.utils.network_utils import get_open_port

from sppo_ray.config import Config
from sppo_ray.errors import WeightSyncError
from sppo_ray.weight_chunks import Checksum, WeightChunk, unpack

WORKERS = "rollout-"  # how the names of rollout workers begin
TENSOR_PARALLEL = 1  # GPUs of one rollout worker
POLL_S = 1.0
ANSWER_S = 10.0  # a worker that does not answer in this time is restarting, and pulls when it is back


# Wiring.


def rank_offsets(names: Sequence[str], tensor_parallel: int) -> dict[str, int]:
    """The first rank of each engine in the group, by worker; the learner is rank 0. A vLLM process adds its own rank
    within the engine."""
    return {name: 1 + i * tensor_parallel for i, name in enumerate(names)}


def trainer_init_info(
    address: str, port: int, workers: int, tensor_parallel: int, buffer_bytes: int
) -> NCCLTrainerInitInfo:
    """The group as rank 0 opens it: itself and every GPU of `workers` engines."""
    world = 1 + workers * tensor_parallel
    return NCCLTrainerInitInfo(address, port, world, packed=True, packed_buffer_size_bytes=buffer_bytes, rank=0)


def worker_init_info(trainer: NCCLTrainerInitInfo, offset: int) -> NCCLWeightTransferInitInfo:
    """The group as one engine joins it: cut into the same buffers as the sender cuts."""
    return NCCLWeightTransferInitInfo(
        master_address=trainer.master_address,
        master_port=trainer.master_port,
        rank_offset=offset,
        world_size=trainer.world_size,
        packed=trainer.packed,
        packed_buffer_size_bytes=trainer.packed_buffer_size_bytes,
        packed_num_buffers=trainer.packed_num_buffers,
    )


def update_info(chunks: Sequence[WeightChunk]) -> NCCLWeightTransferUpdateInfo:
    """What will be broadcast, in order."""
    return NCCLWeightTransferUpdateInfo(
        names=[name for chunk in chunks for name in chunk.names],
        dtype_names=[dtype for chunk in chunks for dtype in chunk.dtypes],
        shapes=[list(shape) for chunk in chunks for shape in chunk.shapes],
    )


def worker_updates(
    names: Sequence[str],
    tensor_parallel: int,
    trainer: NCCLTrainerInitInfo,
    chunks: Sequence[WeightChunk],
    checksum: str,
) -> dict[str, dict[str, Any]]:
    """What each worker's engine gets as its `update_weights`: plain values, since they may cross to other processes."""
    weights = asdict(update_info(chunks))
    return {
        name: {
            "broadcast": {
                "init": worker_init_payload(worker_init_info(trainer, offset)),
                "update": weights,
                "checksum": checksum,
            }
        }
        for name, offset in rank_offsets(names, tensor_parallel).items()
    }


def tensors_of(chunks: Sequence[WeightChunk], device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
    """What is broadcast: as update_info says, on the device."""
    for chunk in chunks:
        for name, tensor in unpack(chunk):
            yield name, tensor.to(device)


def can_be_packed(chunks: Sequence[WeightChunk]) -> bool:
    """vLLM packs tensors without padding and takes them out as views, which must be aligned: one precision only."""
    return len({dtype for chunk in chunks for dtype in chunk.dtypes}) == 1


# The learner's side.


def commit_and_broadcast(config: Config, hub: Any, version: int, checksum: str, count: int) -> None:
    """Commit the version begun, of `count` chunks, and return when every rollout worker that is up serves it. Weights of
    mixed precisions (a saved policy may have them) are not broadcast: the workers pull them when they load.

    Raises WeightSyncError, naming the workers, when one fails or does not answer within weights.timeout_s. The process
    must then end: a broadcast cannot be called back, and a thread of this process may wait in it for ever.
    """
    workers = _workers_up()
    chunks: list[WeightChunk] = ray.get(ray.get(hub.held_chunks.remote(version)))
    if not workers or not can_be_packed(chunks):
        ray.get(hub.commit.remote(version, checksum, count))
        return
    address, port = ray.util.get_node_ip_address(), get_open_port()
    trainer = trainer_init_info(address, port, len(workers), TENSOR_PARALLEL, config.weights.chunk_mb << 20)
    updates = worker_updates(list(workers), TENSOR_PARALLEL, trainer, chunks, checksum)
    ray.get(hub.commit.remote(version, checksum, count, updates))
    loads = {worker.load.remote(version): name for name, worker in workers.items()}
    sender = ThreadPoolExecutor(1, thread_name_prefix="broadcast")
    try:
        sent = sender.submit(_send, trainer, chunks, torch.cuda.current_device())
        _wait_for(loads, sent, version, config.weights.timeout_s)
        sent.result()
    finally:
        sender.shutdown(wait=False)
        ray.get(hub.end_broadcast.remote())  # failed too: what comes now pulls


def _workers_up() -> dict[str, Any]:
    """Handles of the rollout workers that answer now, by name."""
    names = sorted(name for name in ray.util.list_named_actors() if name.startswith(WORKERS))
    handles = {name: ray.get_actor(name) for name in names}
    answers = {handle.stats.remote(): name for name, handle in handles.items()}
    answered, _ = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_S) if answers else ([], [])
    up = set()
    for answer in answered:
        try:
            ray.get(answer)
            up.add(answers[answer])
        except RayError:  # dead or restarting: not up
            continue
    return {name: handles[name] for name in names if name in up}


def _send(trainer: NCCLTrainerInitInfo, chunks: Sequence[WeightChunk], device: int) -> None:
    """Open the group, which waits until every worker has joined, and broadcast."""
    torch.cuda.set_device(device)  # of this thread
    group = trainer_init(trainer)
    try:
        packed_nccl_broadcast_producer(
            iterator=tensors_of(chunks, torch.device("cuda", device)),
            group=group,
            src=0,
            post_iter_func=lambda named: named[1],
            buffer_size_bytes=trainer.packed_buffer_size_bytes,
            num_buffers=trainer.packed_num_buffers,
        )
    finally:
        group.destroy()


def _wait_for(loads: Mapping[Any, str], sent: Future[None], version: int, timeout_s: float) -> None:
    """Raises WeightSyncError at the first worker that fails, or naming those that have not answered in time; and what
    `sent` raised."""
    deadline = time.monotonic() + timeout_s
    waiting = list(loads)
    while waiting:
        done, waiting = ray.wait(waiting, timeout=POLL_S)
        for load in done:
            try:
                ray.get(load)
            except RayError as error:
                raise WeightSyncError(f"weights version {version}: {loads[load]} did not receive: {error}") from error
        if sent.done():
            sent.result()
        if waiting and time.monotonic() > deadline:
            late = ", ".join(sorted(loads[load] for load in waiting))
            raise WeightSyncError(
                f"weights version {version}: no answer to the broadcast in {timeout_s:g} s from {late}"
            )


# The rollout worker's side, in each process of its engine.


@dataclass
class _Checked:
    """Stands before the model: adds up what is loaded into it."""

    model: Any  # vLLM's
    checksum: Checksum

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.checksum.add(name, tensor)
        self.model.load_weights(weights)


def receive(engine: WeightTransferEngine, init: dict[str, Any], update: dict[str, Any], checksum: str) -> None:
    """Join the broadcast and load it into the model of `engine`, whose update has been started.

    Raises ValueError when what arrived is not what was published; the model must then not serve.
    """
    checked = _Checked(engine.model, Checksum())
    receiver = NCCLWeightTransferEngine(engine.config, engine.vllm_config, engine.device, checked)
    receiver.init_transfer_engine(NCCLWeightTransferInitInfo(**init))
    try:
        receiver.receive_weights(NCCLWeightTransferUpdateInfo(**update))
    finally:
        receiver.shutdown()
    if checked.checksum.hexdigest() != checksum:
        raise ValueError(
            f"the broadcast arrived with checksum {checked.checksum.hexdigest()} but {checksum} was published"
        )
