"""`protocols.Buffer` over the buffer actor, and the driver's way to its record."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from ray.actor import ActorHandle

from actors.buffer import NAME
from actors.stacks import Place
from actors.workers import call
from sppo_ray.errors import GroupLost
from sppo_ray.protocols import Handle
from sppo_ray.types import Look, Publication, SliceSummary, Ticket, TrainedIteration


class BufferClient:
    """Each method is a call on the actor; `add` puts groups that are handed in at the same time into one."""

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor
        self._outbox: list[tuple[Any, asyncio.Future[None]]] = []
        self._sending: set[asyncio.Task[list[str | None]]] = set()

    async def held(self, iteration: int) -> frozenset[str]:
        return await self._call("held", iteration)

    async def add(self, judged: Handle) -> None:
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outbox.append((judged.ref, acknowledged))
        if len(self._outbox) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        await acknowledged

    async def seal(self, iteration: int, prompt_ids: Sequence[str]) -> SliceSummary:
        return await self._call("seal", iteration, prompt_ids)

    async def admit(self, room: int) -> Sequence[Ticket]:
        return await self._call("admit", room)

    async def resample(self, ticket: Ticket) -> None:
        await self._call("resample", ticket)

    async def collected(self, iteration: int) -> None:
        await self._call("collected", iteration)

    async def publication(self, after: int) -> Publication:
        return await self._call("publication", after)

    async def evaluated(self, iteration: int) -> None:
        await self._call("evaluated", iteration)

    async def serving(self, version: int) -> None:
        await self._call("serving", version)

    async def record_publish(self, publication: Publication, figures: Mapping[str, Any]) -> None:
        await self._call("record_publish", publication, figures)

    async def last_trained(self) -> TrainedIteration | None:
        return await self._call("last_trained")

    async def record(self, line: Mapping[str, Any]) -> bool:
        return await self._call("record", line)

    async def ping(self) -> Place:
        return await self._call("ping")

    async def look(self) -> Look:
        return await self._call("look")

    async def _call(self, method: str, *args: Any) -> Any:
        return await call(self.actor, NAME, method, *args)

    def _send(self) -> None:
        batch, self._outbox = self._outbox, []
        self._sending.add(sending := asyncio.create_task(self._call("add_all", [ref for ref, _ in batch])))
        sending.add_done_callback(lambda done: self._sent(done, [acknowledged for _, acknowledged in batch]))

    def _sent(self, sending: asyncio.Task[list[str | None]], acknowledged: Sequence[asyncio.Future[None]]) -> None:
        self._sending.discard(sending)
        error = None if sending.cancelled() else sending.exception()
        lost = [None] * len(acknowledged) if sending.cancelled() or error else sending.result()
        for waiting, how in zip(acknowledged, lost, strict=True):
            if waiting.done():  # its caller was cancelled
                continue
            if error is not None:
                waiting.set_exception(error)
            elif how is not None:
                waiting.set_exception(GroupLost(f"a judged group was lost before it was on disk: {how}"))
            else:
                waiting.set_result(None)
