"""What pools are tested over: workers that cost next to nothing, a gate that holds calls up, a hub that has a version."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import ray

from actors.stacks import Place, here
from sppo_ray.errors import GroupAborted, WeightSyncError
from sppo_ray.types import Receipt
from sppo_ray.weight_chunks import WeightChunk


class Gate:
    """Where calls wait until they are let through; knows who waits and how many waited at most."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.most = 0
        self.passes = asyncio.Semaphore(0)

    async def enter(self, name: str) -> None:
        self.inside.append(name)
        self.most = max(self.most, len(self.inside))
        await self.passes.acquire()
        self.inside.remove(name)

    async def open(self, passes: int) -> None:
        for _ in range(passes):
            self.passes.release()

    async def state(self) -> tuple[list[str], int]:
        return self.inside, self.most


async def waiting(gate: Any, count: int) -> list[str]:
    """Who waits at the gate, once `count` do."""
    async with asyncio.timeout(300):
        while True:
            inside, _ = await gate.state.remote()
            if len(inside) == count:
                return inside
            await asyncio.sleep(0.05)


def start(name: str, **behaviour: Any) -> Any:
    """A stand-in for a worker: `die_at` seed, `checksum` to answer a load with, `load_s` to take for it, `gate` where
    loads and the groups of seed 77 wait, `holds` the version that it knows the hub to hold, `broken` what its constructor
    raises."""

    class Worker:
        def __init__(self) -> None:
            if "broken" in behaviour:
                raise ValueError(behaviour["broken"])

        async def generate(self, prompt: Any, sampling: Any, iteration: int, epoch: int, protected: bool) -> Any:
            import os

            seed = sampling.seeds[0]
            if seed == behaviour.get("die_at"):
                os._exit(1)
            if seed == 66:
                raise ValueError("prompt too long")
            if seed == 67 and not protected:
                raise GroupAborted(f"{name}: version 3 came")
            if seed == 77:
                await behaviour["gate"].enter.remote(name)
            await asyncio.sleep(0.05)
            return [name] * 200_000, Receipt(prompt.prompt_id, name, 1, 0, 0, iteration, epoch)

        async def load(self, version: int) -> str:
            if "gate" in behaviour:
                await behaviour["gate"].enter.remote(name)
            await asyncio.sleep(behaviour.get("load_s", 0))
            if version != behaviour.get("holds", version):
                raise WeightSyncError(f"{name}: the hub has another version")
            return str(behaviour.get("checksum", "right"))

        async def ping(self) -> Place:
            return here()

        async def score(self, source: Any, candidates: Any) -> Any:
            scores = np.ones((len(candidates), len(candidates)), np.float32)
            return (
                scores if isinstance(source, str) else (scores[0], 7)
            )  # a judge's; a rollout worker's, with its version

    return ray.remote(Worker).options(name=name, namespace="pool", num_cpus=0.01, max_concurrency=100).remote()


def publish(hub: Any, version: int) -> None:
    ray.get(hub.begin.remote(version))
    ray.get(hub.put_chunk.remote(version, 0, WeightChunk((), (), (), np.zeros(0, np.uint8))))
    ray.get(hub.commit.remote(version, "right", 1))
