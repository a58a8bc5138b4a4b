"""Weight chunks: what goes in comes out, in any chunking, and the checksum sees every kind of difference."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.policy_folder import read_policy, write_policy
from sppo_ray.weight_chunks import ALIGNMENT, Checksum, WeightChunk, pack, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embed": torch.randn(13, 7, generator=generator).bfloat16(),
        "layer.0": torch.randn(5, generator=generator),
        "scalar": torch.tensor(2.5),
        "strided": torch.randn(4, 6, generator=generator).T,
        "empty": torch.zeros(0, 3),
    }


def checksum(named: dict[str, torch.Tensor], chunk_bytes: int = 1 << 20) -> str:
    total = Checksum()
    for chunk in pack(named.items(), chunk_bytes):
        total.update(chunk)
    return total.hexdigest()


@settings(max_examples=60)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6), st.integers(1, 400), st.integers(0, 99))
def test_unpack_inverts_pack(specs: list[tuple[tuple[int, ...], torch.dtype]], chunk_bytes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    named = {
        f"w{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (shape, dtype) in enumerate(specs)
    }
    chunks = list(pack(named.items(), chunk_bytes))
    out = dict(pair for chunk in chunks for pair in unpack(chunk))
    assert list(out) == list(named)
    assert all(out[name].dtype == named[name].dtype and torch.equal(out[name], named[name]) for name in named)
    # A chunk exceeds the limit only when one tensor alone does.
    assert all(chunk.data.nbytes <= chunk_bytes or len(chunk.names) == 1 for chunk in chunks)


def test_unpack_is_zero_copy_and_silent_on_read_only_arrays() -> None:
    (chunk,) = pack(weights().items(), 1 << 20)
    chunk.data.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = dict(unpack(chunk))
    start = chunk.data.ctypes.data
    pointers = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    assert all(start <= pointer < start + chunk.data.nbytes for pointer in pointers)
    assert all((pointer - start) % ALIGNMENT == 0 for pointer in pointers)


def test_a_chunk_is_at_most_an_eighth_of_those_before_it() -> None:
    """Tensors of 64 bytes, at most 16 KiB a chunk: the first hold 16 KiB / 256 = 64 bytes, one tensor, until 16 are packed;
    then eight times two, four and so on up to 256."""
    chunks = pack(((f"w{i}", torch.zeros(16)) for i in range(3000)), 1 << 14)
    doubled = [size for size in (2, 4, 8, 16, 32, 64, 128) for _ in range(8)]
    assert [len(chunk.names) for chunk in chunks] == [1] * 16 + doubled + [256] * 3 + [184]


def test_a_chunk_carries_only_its_own_bytes() -> None:
    (chunk,) = pack([("w", torch.zeros(10))], 1 << 26)
    assert len(pickle.dumps(chunk, protocol=5)) < 1000


def test_sources_may_be_freed_as_soon_as_the_next_tensor_is_asked_for() -> None:
    def gathered() -> object:
        for i in range(4):
            tensor = torch.full((8,), float(i))
            yield f"w{i}", tensor
            tensor.fill_(-1)

    (chunk,) = pack(gathered(), 1 << 20)  # type: ignore[arg-type]
    assert [tensor[0].item() for _, tensor in unpack(chunk)] == [0, 1, 2, 3]


def test_checksum_ignores_chunking_and_order() -> None:
    named = weights()
    backwards = dict(reversed(named.items()))
    assert len({checksum(named, 1), checksum(named, 200), checksum(named), checksum(backwards, 100)}) == 1


def test_checksum_is_the_same_in_chunks_one_by_one_and_from_a_folder(tmp_path: Path) -> None:
    named = weights()
    (tmp_path / "config.json").write_text("{}")
    write_policy(tmp_path / "folder", str(tmp_path), "float32", reversed(named.items()))
    one_by_one = Checksum()
    for name, tensor in named.items():
        one_by_one.add(name, tensor)
    read = dict(read_policy(tmp_path / "folder"))
    assert list(read) != list(named)  # a folder has an order of its own
    assert {checksum(named), checksum(read), checksum(read, 100)} == {one_by_one.hexdigest()}


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text("{}")
    (tmp_path / "runs/.policy.1.tmp").mkdir(parents=True)
    (tmp_path / "runs/.policy.1.tmp/model-00001.safetensors").write_bytes(b"half")
    (tmp_path / "runs/.sealed.json.1.tmp").touch()  # another writer's
    write_policy(tmp_path / "runs/policy", str(tmp_path / "source"), "float32", weights().items())
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"policy", ".sealed.json.1.tmp"}


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "bytes", "missing", "swapped"])
def test_checksum_sees(change: str) -> None:
    named, before = weights(), checksum(weights())
    if change == "name":
        named["other"] = named.pop("layer.0")
    elif change == "dtype":
        named["layer.0"] = named["layer.0"].view(torch.int32)
    elif change == "shape":
        named["embed"] = named["embed"].reshape(7, 13)
    elif change == "bytes":
        named["embed"].view(torch.uint8)[3, 3] ^= 1
    elif change == "missing":
        del named["empty"]
    else:
        named["a"], named["b"] = torch.zeros(2), torch.ones(2)
        before = checksum(named)
        named["a"], named["b"] = named["b"], named["a"]
    assert checksum(named) != before


def test_a_tensor_that_comes_twice_is_refused() -> None:
    total = Checksum()
    (chunk,) = pack([("w", torch.zeros(2))], 100)
    total.update(chunk)
    with pytest.raises(ValueError, match="'w' comes twice"):
        total.update(chunk)
    with pytest.raises(ValueError, match="'w' comes twice"):
        total.add("w", torch.zeros(2))


def test_a_short_array_is_refused() -> None:
    (chunk,) = pack([("a", torch.zeros(2)), ("b", torch.zeros(2))], 1 << 20)
    cut = WeightChunk(chunk.names, chunk.dtypes, chunk.shapes, np.copy(chunk.data[:-1]))
    with pytest.raises(ValueError, match="ends before tensor 'b'"):
        list(unpack(cut))


def test_chunk_bytes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        next(pack([], 0))
