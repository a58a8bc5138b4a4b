"""The buffer actor: `BufferService` with a name, a log and object references resolved."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import ray

from actors.process import redirect_output
from sppo_ray.buffer_service import BufferService
from sppo_ray.config import Config

NAME = "buffer"


class BufferActor(BufferService):
    """Async actor."""

    def __init__(self, config: Config, slices: Sequence[Sequence[str]] | None) -> None:
        redirect_output(config.run.dir, NAME)
        super().__init__(config, slices)

    def __repr__(self) -> str:
        return f"BufferActor({NAME}, cpu)"

    async def ready(self) -> str:
        return NAME

    async def add_all(self, judged: Sequence[ray.ObjectRef]) -> None:
        """`add` of what the references stand for."""
        await self.add(await asyncio.gather(*judged))
