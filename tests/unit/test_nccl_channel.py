"""The wiring of the NCCL broadcast, through vLLM's own dataclasses and packing. The broadcast itself is in tests/gpu."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors, unpack_tensor

from actors.nccl_channel import _Checked, can_be_packed, rank_offsets, tensors_of, trainer_init_info, worker_updates
from sppo_ray.weight_chunks import Checksum, WeightChunk, pack

NAMES = ["rollout-0", "rollout-1", "rollout-10"]


def named() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(13, 7, generator=generator).bfloat16(),
        "norm": torch.randn(5, generator=generator).bfloat16(),
        "up": torch.randn(4, 6, generator=generator).bfloat16(),
        "down": torch.randn(6, 4, generator=generator).bfloat16(),
    }


def chunks(chunk_bytes: int = 200) -> list[WeightChunk]:
    made = list(pack(named().items(), chunk_bytes))
    assert len(made) > 1
    return made


@pytest.mark.parametrize(
    ("tensor_parallel", "expected", "world"),
    [(1, [1, 2, 3], 4), (2, [1, 3, 5], 7), (4, [1, 5, 9], 13)],
)
def test_every_gpu_has_its_own_rank_and_the_learner_is_rank_0(
    tensor_parallel: int, expected: list[int], world: int
) -> None:
    offsets = rank_offsets(NAMES, tensor_parallel)
    assert list(offsets.values()) == expected
    trainer = trainer_init_info("10.0.0.1", 4321, len(NAMES), tensor_parallel, 1 << 20)
    assert (trainer.world_size, trainer.is_sender, trainer.packed) == (world, True, True)
    # What vLLM's processes make of it: offset + rank within the engine.
    ranks = [offset + within for offset in offsets.values() for within in range(tensor_parallel)]
    assert [0, *ranks] == list(range(world))


def test_what_a_worker_gets_is_what_the_sender_opens_and_survives_a_process_boundary() -> None:
    trainer = trainer_init_info("10.0.0.1", 4321, len(NAMES), 2, 300)
    updates = worker_updates(NAMES, 2, trainer, chunks(), "sum")
    assert list(updates) == NAMES
    assert json.loads(json.dumps(updates)) == updates
    inits = [NCCLWeightTransferInitInfo(**update["broadcast"]["init"]) for update in updates.values()]
    assert [init.rank_offset for init in inits] == [1, 3, 5]
    for init in inits:
        assert (init.master_address, init.master_port, init.world_size) == ("10.0.0.1", 4321, 7)
        assert (init.packed, init.packed_buffer_size_bytes, init.packed_num_buffers) == (
            trainer.packed,
            trainer.packed_buffer_size_bytes,
            trainer.packed_num_buffers,
        )
    assert {update["broadcast"]["checksum"] for update in updates.values()} == {"sum"}
    update = NCCLWeightTransferUpdateInfo(**updates["rollout-10"]["broadcast"]["update"])
    assert update.names == ["embed", "norm", "up", "down"]
    assert update.dtype_names == ["bfloat16"] * 4
    assert update.shapes == [[13, 7], [5], [4, 6], [6, 4]]


def test_mixed_precisions_are_not_broadcast() -> None:
    """vLLM packs without padding: after an odd number of bfloat16 values it cannot view float32."""
    assert can_be_packed(chunks())
    assert not can_be_packed(list(pack([("a", torch.zeros(3).bfloat16()), ("b", torch.zeros(2))], 100)))


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
@pytest.mark.parametrize("buffer_bytes", [1, 100, 1 << 20])
def test_the_stream_unpacks_by_the_names_dtypes_and_shapes_that_were_announced(buffer_bytes: int) -> None:
    """vLLM's packing of what is sent, cut up again by what the worker was told, as its consumer does."""
    trainer = trainer_init_info("h", 1, 1, 1, buffer_bytes)
    update = NCCLWeightTransferUpdateInfo(
        **worker_updates(["rollout-0"], 1, trainer, chunks(), "")["rollout-0"]["broadcast"]["update"]
    )
    announced = zip(update.names, [getattr(torch, name) for name in update.dtype_names], update.shapes, strict=True)
    total, received = Checksum(), _Model()
    checked = _Checked(received, total)
    for packed in packed_buffers(tensors_of(chunks(), "cpu"), buffer_bytes):
        told = [next(announced) for _ in packed.names]
        sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in told]
        names, dtypes, shapes = (list(column) for column in zip(*told, strict=True))
        checked.load_weights(unpack_tensor(packed.packed_tensor, names, shapes, dtypes, sizes))
    assert list(announced) == []
    assert list(received.loaded) == list(named())
    assert all(torch.equal(received.loaded[name], tensor) for name, tensor in named().items())
    expected = Checksum()
    for name, tensor in named().items():
        expected.add(name, tensor)
    assert total.hexdigest() == expected.hexdigest()


class _Model:
    """Takes weights as vLLM's models do."""

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded.update(weights)


def packed_buffers(tensors: Iterator[tuple[str, torch.Tensor]], buffer_bytes: int) -> Iterator:
    while (packed := pack_tensors(tensors, lambda pair: pair[1], buffer_bytes)) is not None:
        yield packed
