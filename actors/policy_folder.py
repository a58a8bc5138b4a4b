"""The saved policy: a Hugging Face folder, written as the weights arrive."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sppo_ray.atomic import sync

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"
# What a folder holds beside weights: config, generation config, tokenizer, chat template, remote code if trusted.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")


def local_folder(model: str) -> str:
    """The folder of a model given as a folder or a hub name (safetensors only, from the cache where it is there)."""
    if Path(model).is_dir():
        return model
    return snapshot_download(model, allow_patterns=["*.safetensors", *SMALL_FILES])


def write_policy(folder: Path, source: str, dtype: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `tensors` and the small files of `source` to `folder`, which is afterwards whole or as it was before.

    At most one shard of tensors is held in memory. dtype: torch name of the weights' precision, for config.json.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _copy_small_files(Path(source), temporary, dtype)
        _write_shards(temporary, tensors)
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # of a save that was interrupted before it was recorded
        temporary.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """model.safetensors, or numbered shards and their index: the names Hugging Face gives."""
    shards: list[list[str]] = []
    total = 0
    filling: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if filling and _bytes(filling.values()) + _bytes([tensor]) > SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), filling))
            filling = {}
        filling[name] = tensor.contiguous()
        total += _bytes([tensor])
    shards.append(_write_shard(folder, len(shards), filling))
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
    return list(tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
