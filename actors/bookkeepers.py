"""The actors of which there is one, and nobody stands in for them: the buffer, the weights hub, and the learner's, which keeps
watch over the ranks. What hangs there would hang the run. A call to them has a time limit, and one that hangs leaves its stacks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from actors.stacks import Place, dump
from sppo_ray.errors import WorkerDied

ANSWER_LIMIT_S = 300.0  # after a restart the buffer reads whole tables
T = TypeVar("T")


async def answered(
    name: str, asked: Awaitable[T], place: Place | None = None, run_dir: str = "", patience_s: float = 0.0
) -> T:
    """What was asked of an actor. Raises WorkerDied for one that hangs, with its stacks in `run_dir` where its place is known.
    patience_s: how much longer it may take, since it waits for the disk before it answers."""
    limit_s = ANSWER_LIMIT_S + patience_s
    try:
        async with asyncio.timeout(limit_s):
            return await asked
    except TimeoutError:
        stacks = f" Its stacks are in {await dump(name, place.node_id, place.pid, run_dir)}." if place else ""
        raise WorkerDied(f"{name}: hangs: no answer in {limit_s:g} s.{stacks}") from None
