"""The buffer actor: `BufferService` with a name, a log and object references resolved."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import ray
from ray.exceptions import ObjectLostError

from actors.process import begin
from actors.stacks import Place, here
from sppo_ray.buffer_service import BufferService
from sppo_ray.config import Config
from sppo_ray.threads import in_threads

NAME = "buffer"
DISK_THREADS = 2  # while groups are written, the learner's record is too


class BufferActor(BufferService):
    """Async actor."""

    def __init__(self, config: Config, slices: Sequence[Sequence[str]] | None) -> None:
        begin(config.run.dir, NAME)
        super().__init__(config, slices, in_threads(DISK_THREADS, "disk"))

    def __repr__(self) -> str:
        return f"BufferActor({NAME}, cpu)"

    async def ping(self) -> Place:
        """Where its process is, once it serves."""
        return here()

    async def add_all(self, judged: Sequence[ray.ObjectRef]) -> list[str | None]:
        """`add` of what the references stand for. For each: None, or how it was lost with its node (and so not added)."""
        groups = await asyncio.gather(*judged, return_exceptions=True)
        for group in groups:
            if isinstance(group, BaseException) and not isinstance(group, ObjectLostError):
                raise group
        if whole := [group for group in groups if not isinstance(group, BaseException)]:
            await self.add(whole)
        return [str(group) if isinstance(group, BaseException) else None for group in groups]
