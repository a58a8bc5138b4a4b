"""The weights hub: a named actor that owns the published weights, so that they outlive the learner that made them.

A reference dies with the process that put it. The learner's rank 0 may be restarted at any time, so its chunks are put
again here. The hub holds one published version, plus the one being published. Of weights published by way of the disk it
knows the folder only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray

from actors.process import begin
from actors.stacks import Place, here
from sppo_ray.config import Config
from sppo_ray.errors import WeightSyncError
from sppo_ray.types import WeightChunk

NAME = "weights"  # the actor's name in the run's namespace


@dataclass(frozen=True, slots=True)
class Published:
    """One complete set of weights, ready to be pulled."""

    version: int
    checksum: str  # of all tensors, as in weight_chunks.Checksum
    chunk_refs: tuple[ray.ObjectRef, ...]  # of WeightChunk, owned by the hub; empty: they are in `folder`
    folder: str | None = None  # policy folder on a file system that the workers see
    # By rollout worker: how to receive the broadcast that is under way (nccl_channel.worker_updates); others pull.
    broadcast: Mapping[str, dict[str, Any]] | None = None


class WeightsHub:
    """begin -> put_chunk (any order) -> commit, or begin -> commit_folder. Only what is committed can be pulled; a
    half-published version cannot.

    Use as `ray.remote(WeightsHub).options(name=NAME, ...)`.
    """

    def __init__(self, config: Config) -> None:
        begin(config.run.dir, NAME)
        self._published: Published | None = None
        self._pending: int | None = None
        self._chunks: dict[int, ray.ObjectRef] = {}

    def __repr__(self) -> str:
        return f"WeightsHub({NAME}, cpu)"

    async def begin(self, version: int) -> None:
        """Start to publish `version`; whatever an interrupted publish left is dropped.

        The same version may come again: a learner restarted before its checkpoint was committed trains it again.
        """
        if self._published is not None and version < self._published.version:
            raise WeightSyncError(
                f"weights: version {version} was begun after version {self._published.version} was published; "
                "versions only grow. Two learners may be running: stop one."
            )
        self._pending = version
        self._chunks = {}

    async def put_chunk(self, version: int, index: int, chunk: WeightChunk) -> None:
        """Take chunk `index` (from 0) of the version begun. A chunk put twice replaces the first."""
        self._require_pending(version, "put_chunk")
        # The argument belongs to the caller and dies with it; a new put makes this process the owner.
        self._chunks[index] = ray.put(chunk)

    async def commit(
        self, version: int, checksum: str, chunks: int, broadcast: Mapping[str, dict[str, Any]] | None = None
    ) -> None:
        """Publish the version begun, of `chunks` chunks; the version before it is dropped here.

        A worker that is still pulling the dropped version holds references, which keep its chunks alive.
        broadcast: as in Published, until end_broadcast.
        """
        self._require_pending(version, "commit")
        missing = [index for index in range(chunks) if index not in self._chunks]
        extra = sorted(index for index in self._chunks if not 0 <= index < chunks)
        if missing or extra or chunks < 1:
            raise WeightSyncError(
                f"weights: version {version} was committed with {chunks} chunks, but missing are {missing} and "
                f"beyond the count are {extra}: put every chunk once between begin and commit."
            )
        refs = tuple(self._chunks[index] for index in range(chunks))
        self._publish(Published(version, checksum, refs, broadcast=broadcast))

    async def held_chunks(self, version: int) -> list[ray.ObjectRef]:
        """References to the chunks put so far of the version begun, in order."""
        self._require_pending(version, "held_chunks")
        return [self._chunks[index] for index in sorted(self._chunks)]

    async def commit_folder(self, version: int, checksum: str, folder: str) -> None:
        """Publish the version begun, from a policy folder that stays as it is until two later versions are published."""
        self._require_pending(version, "commit_folder")
        self._publish(Published(version, checksum, (), folder=folder))

    async def end_broadcast(self) -> None:
        """Who loads the published weights from now on pulls them."""
        if self._published is not None:
            self._published = replace(self._published, broadcast=None)

    async def ping(self) -> Place:
        """Where its process is: that it is there."""
        return here()

    async def current(self) -> Published | None:
        """What is published; None before the first commit (the workers then serve the model folder they started from)."""
        return self._published

    def _publish(self, published: Published) -> None:
        self._published = published
        self._pending = None
        self._chunks = {}

    def _require_pending(self, version: int, step: str) -> None:
        if self._pending != version:
            begun = "nothing was begun" if self._pending is None else f"version {self._pending} was begun"
            raise WeightSyncError(f"weights: {step}({version}) but {begun}: call begin({version}) first.")
