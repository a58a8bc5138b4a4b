"""From the learner's weights, or a saved policy, to the hub: `weights.channel`.

ray    packed chunks in the object store; workers pull them
disk   a policy folder under <run.dir>/weights, on a file system that all nodes share; workers read it
nccl   as `ray`, so that a worker that was away can pull; those that are up get them by one broadcast from the learner's
       GPU (nccl_channel), and serve them when `publish` returns
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from actors.policy_folder import read_policy, write_policy
from actors.ranks import Ranks
from sppo_ray.config import Config
from sppo_ray.storage import Storage
from sppo_ray.weight_chunks import Checksum, pack

KEPT = 4  # folders of the disk channel: a worker may still be reading one of those before the newest


def publish(
    config: Config,
    hub: Any,
    ranks: Ranks,
    version: int,
    tensors: Iterator[tuple[str, Tensor]],
    source: str,
    storage: Storage | None = None,
) -> str:
    """Publish `tensors` (TrainingEngine.consolidated_state) as `version`; their checksum on rank 0, "" on the others.

    Collective: gathering the tensors is. Beside the model rank 0 holds a layer and a chunk (disk: a shard) of them.
    source: folder the policy was started from, for the small files of a policy folder. storage: see `write_policy`.
    Raises WeightSyncError when the hub refuses, and under `nccl` when a rollout worker has not received in time.
    """
    if not ranks.first:
        for _ in tensors:  # take part in the gathering
            pass
        return ""
    if config.weights.channel != "disk":
        return _stream(config, hub, version, tensors)
    ray.get(hub.begin.remote(version))
    folder = _new_folder(Path(config.run.dir) / "weights", version)
    checksum = Checksum()
    write_policy(folder, source, config.policy.dtype, _added(tensors, checksum), storage)
    return _commit_folder(config, hub, version, checksum, folder)


def publish_folder(config: Config, hub: Any, folder: Path, version: int) -> str:
    """Publish a saved policy as `version`, from one process; returns the checksum.

    By way of the disk nothing is copied: the workers read the folder itself, so it must stay. One outside the run directory
    may be on this node only, so it goes through the object store.
    """
    in_run = folder.resolve().is_relative_to(Path(config.run.dir).resolve())
    if config.weights.channel != "disk" or not in_run:
        return _stream(config, hub, version, read_policy(folder))
    ray.get(hub.begin.remote(version))
    checksum = Checksum()
    for name, tensor in read_policy(folder):
        checksum.add(name, tensor)
    return _commit_folder(config, hub, version, checksum, folder)


def _stream(config: Config, hub: Any, version: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Through the object store, chunk by chunk."""
    ray.get(hub.begin.remote(version))
    checksum, count = Checksum(), 0
    for chunk in pack(tensors, config.weights.chunk_mb << 20):
        checksum.update(chunk)
        stored = ray.put(chunk)
        del chunk  # or it would stay beside its two copies in the store, and while the next one is filled
        ray.get(hub.put_chunk.remote(version, count, stored))
        del stored
        count += 1
    # A process without a GPU of its own, like the driver of `sppo eval`, has nothing to broadcast from.
    if config.weights.channel == "nccl" and ray.get_gpu_ids():
        from actors import nccl_channel  # imports vllm, which the learner needs for nothing else

        nccl_channel.commit_and_broadcast(config, hub, version, checksum.hexdigest(), count)
    else:
        ray.get(hub.commit.remote(version, checksum.hexdigest(), count))
    return checksum.hexdigest()


def _added(tensors: Iterable[tuple[str, Tensor]], checksum: Checksum) -> Iterator[tuple[str, Tensor]]:
    """The tensors, added to the checksum on their way: it is of what was trained, not of what the disk gives back."""
    for name, tensor in tensors:
        checksum.add(name, tensor)
        yield name, tensor


def _new_folder(weights: Path, version: int) -> Path:
    """Not one that is there: a version published again after a restart must not be written over what workers read."""
    return next(
        folder
        for attempt in itertools.count()
        if not (folder := weights / (f"v{version}" if attempt == 0 else f"v{version}.{attempt}")).exists()
    )


def _commit_folder(config: Config, hub: Any, version: int, checksum: Checksum, folder: Path) -> str:
    ray.get(hub.commit_folder.remote(version, checksum.hexdigest(), str(folder)))
    for old in sorted((Path(config.run.dir) / "weights").glob("*"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)  # what is left of it goes with the next one's
    return checksum.hexdigest()
