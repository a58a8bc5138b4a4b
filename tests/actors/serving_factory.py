"""Rollout workers and a hub to test with, and what they sample."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import RayActorError

from actors.pool import RolloutPool
from actors.process import environment
from actors.rollout import RolloutWorker
from actors.weights import NAME
from sppo_ray.config import Config
from sppo_ray.types import Prompt, ResponseGroup, Sampling
from sppo_ray.weight_chunks import Checksum, WeightChunk, pack

ROOT = Path(__file__).parents[2]


def start_worker(name: str, config: Config, folder: Path, version: int) -> Any:
    """A rollout worker actor as the system makes them."""
    actor = ray.remote(RolloutWorker).options(
        name=name,
        num_cpus=0.1,
        max_concurrency=100,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **environment(gpus=False, threads=1)}},
    )
    return actor.remote(name, config, str(folder), version, NAME)


async def dead(actor: Any) -> None:
    """Returns when Ray knows that a killed actor is no more: for a moment it may still answer."""
    async with asyncio.timeout(60):
        with suppress(RayActorError):
            while True:
                await actor.__ray_ready__.remote()


@dataclass
class Serving:
    """Two workers, the hub, and a way to publish."""

    config: Config
    hub: Any
    workers: dict[str, Any]
    version: int = field(default=0)  # published last

    def pool(self, *names: str) -> RolloutPool:
        """A new pool (its tasks belong to the test's event loop) over the named workers, or both."""
        workers = {n: self.workers[n] for n in names or self.workers}
        return RolloutPool(self.config, workers, self.hub, create=self.create)

    def create(self, name: str) -> Any:
        """As at the start: from the embedded policy."""
        self.workers[name] = start_worker(name, self.config, Path(self.config.policy.model), 0)
        return self.workers[name]

    def publish(self, weights: dict[str, torch.Tensor], damage: bool = False) -> str:
        """Publish in several chunks, as the learner does; returns the checksum. `damage`: flip a byte on the way."""
        self.version += 1
        ray.get(self.hub.begin.remote(self.version))
        checksum, count = Checksum(), 0
        for chunk in pack(weights.items(), 300_000):
            checksum.update(chunk)
            if damage and count == 3:
                data = chunk.data.copy()
                data[1000] ^= 1
                chunk = WeightChunk(chunk.names, chunk.dtypes, chunk.shapes, data)
            ray.get(self.hub.put_chunk.remote(self.version, count, chunk))
            count += 1
        assert count > 5
        ray.get(self.hub.commit.remote(self.version, checksum.hexdigest(), count))
        return checksum.hexdigest()


def sampled(i: int, k: int = 5) -> Sampling:
    return Sampling(0.7, 0.9, 48, tuple(range(1024 * i, 1024 * i + k)))


async def groups(pool: RolloutPool, prompts: list[Prompt], order: list[int]) -> list[ResponseGroup]:
    """Group i of prompt i, asked for in `order`, returned by i."""
    handles = await asyncio.gather(*(pool.generate(prompts[i], sampled(i), 1) for i in order))
    fetched = {i: await handle.ref for i, handle in zip(order, handles, strict=True)}
    return [fetched[i] for i in range(len(prompts))]


async def gone(pid: int) -> None:
    """Returns when the process has ended: Ray gives a stopped one a few seconds."""
    async with asyncio.timeout(60):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.1)


def tokens(group: ResponseGroup) -> list[tuple[list[int], float, str]]:
    return [(r.token_ids.tolist(), r.logprob, r.text) for r in group.responses]
