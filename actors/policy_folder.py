"""The saved policy: a Hugging Face folder, written as the weights arrive."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sppo_ray.atomic import make_folder, sync
from sppo_ray.storage import Storage

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
# What a folder holds beside weights: config, generation config, tokenizer, chat template, remote code if trusted.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def local_folder(model: str) -> str:
    """The folder of a model given as a folder or a hub name (safetensors only, from the cache where it is there)."""
    if Path(model).is_dir():
        return model
    return snapshot_download(model, allow_patterns=["*.safetensors", *SMALL_FILES])


def write_policy(
    folder: Path, source: str, dtype: str, tensors: Iterable[tuple[str, Tensor]], storage: Storage | None = None
) -> None:
    """Write `tensors` and the small files of `source` to `folder`, which is afterwards whole and on disk, or as it was before.

    At most one shard of tensors is held in memory. dtype: torch name of the weights' precision, for config.json. storage:
    waits out a fault shard by shard, since the tensors come only once; raises StorageError in the end.
    """
    storage = storage or Storage()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        storage.patiently("a policy", temporary, partial(_begin, folder, temporary, Path(source), dtype))
        _write_shards(temporary, tensors, storage)
        storage.patiently("a policy", folder, partial(_put_in_place, temporary, folder))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _begin(folder: Path, temporary: Path, source: Path, dtype: str) -> None:
    make_folder(temporary.parent)
    # Of an earlier try on a full disk, or of a rank that was killed.
    for left in temporary.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    _copy_small_files(source, temporary, dtype)
    for path in temporary.iterdir():
        sync(path)


def _put_in_place(temporary: Path, folder: Path) -> None:
    if temporary.exists():  # else it was renamed, and only the last line failed
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # of a save that was interrupted before it was recorded
        temporary.rename(folder)
    sync(folder.parent)


def read_policy(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a policy folder, one at a time, in the order of its shards."""
    index = folder / INDEX
    # A folder may hold other safetensors beside the model's, e.g. the same weights under their makers' names.
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for path in (folder / name for name in sorted(names)):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a mapping
                yield name, shard.get_tensor(name)


def _copy_small_files(source: Path, target: Path, dtype: str) -> None:
    for pattern in SMALL_FILES:
        for path in source.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the older name of the key
    (target / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], storage: Storage) -> None:
    """model.safetensors, or numbered shards and their index: the names Hugging Face gives."""
    shards: list[list[str]] = []
    total = 0
    filling: dict[str, Tensor] = {}

    def write() -> None:
        path = folder / f"part-{len(shards)}.safetensors"
        storage.patiently("a policy's shard", path, partial(_write_shard, path, filling))
        shards.append(list(filling))

    for name, tensor in tensors:
        if filling and _bytes(filling.values()) + _bytes([tensor]) > SHARD_BYTES:
            write()
            filling = {}
        filling[name] = tensor.contiguous()
        total += _bytes([tensor])
    write()
    storage.patiently("a policy", folder, partial(_name_shards, folder, shards, total))


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sync(folder / INDEX)
    for i, name in enumerate(names):
        if (part := folder / f"part-{i}.safetensors").exists():
            part.rename(folder / name)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """On disk when this returns: the tensors are not there any more to be written again. Raises OSError."""
    path.unlink(missing_ok=True)
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # "Error while serializing: I/O error: No space left on device (os error 28)"
        if number := re.search(r"os error (\d+)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise
    sync(path)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
