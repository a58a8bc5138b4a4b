"""A slow disk holds sampling back: what is in the object store stays within what may be in flight, however long the run."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

# Ray reads the mode when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import pytest
import ray
from ray._private.internal_api import node_stats

from actors.buffer import BufferActor
from actors.buffer_client import BufferClient
from actors.process import environment
from sppo_ray.config import Config
from sppo_ray.protocols import Handle
from sppo_ray.schedules.synchronous import sample_and_judge
from sppo_ray.types import JudgedGroup, Receipt
from tests.unit.groups import config, judged, prompt

ROOT = Path(__file__).parents[2]
GROUPS, IN_FLIGHT, WORKERS, MIB = 96, 4, 2, 1 << 20
# On disk already, but their references wait for Python's garbage collector in one of the processes.
LINGERING = 24  # groups


@pytest.fixture
def a_ray() -> Iterator[None]:
    """The session's, or one of our own."""
    if ray.is_initialized():
        yield
        return
    variables = {"PYTHONPATH": str(ROOT), **environment(gpus=False, threads=1)}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 * MIB,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


class SlowBuffer(BufferActor):
    """On a disk that takes its time."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, None)
        store = self._buffer.store

        def slowly(fresh):
            time.sleep(0.2)
            return store(fresh)

        self._buffer.store = slowly


def large(name: str) -> JudgedGroup:
    """About one MiB of text."""
    group = judged(name)
    responses = tuple(dataclasses.replace(r, text=f"{name} " * (MIB // 5 // 4)) for r in group.group.responses)
    return dataclasses.replace(group, group=dataclasses.replace(group.group, responses=responses))


class Sampler:
    """Rollout and judge in one, without limits of its own."""

    def __init__(self) -> None:
        self._large = ray.remote(large).options(num_cpus=0.1)

    async def generate(self, asked, sampling, iteration):
        ref = self._large.remote(asked.prompt_id)
        await asyncio.to_thread(ray.wait, [ref], fetch_local=False)
        return Handle(ref, Receipt(asked.prompt_id, "rollout-0", 1, 0, 0))

    async def judge(self, group):
        return group


def in_store() -> int:
    """Bytes."""
    (node,) = (node for node in ray.nodes() if node["Alive"])
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return stats.store_stats.object_store_bytes_used


async def test_the_object_store_stays_flat_while_the_disk_is_slow(a_ray, tmp_path):
    cfg = config(
        tmp_path,
        rollout__in_flight=IN_FLIGHT,
        rollout__num_workers=WORKERS,
        buffer__flush_s=0.01,
        buffer__shard_groups=4,
    )
    buffer = BufferClient(ray.remote(SlowBuffer).options(num_cpus=0).remote(cfg))
    sampler = Sampler()
    system = SimpleNamespace(rollout=sampler, judge=sampler, buffer=buffer)
    watch = SimpleNamespace(sampling=lambda *a, **k: None, sampled=lambda r: None, judged=lambda r: None)
    prompts = [prompt(f"p{n:02d}") for n in range(GROUPS)]
    before, seen = in_store(), []

    async def measure() -> None:
        while True:
            seen.append(await asyncio.to_thread(in_store) - before)
            await asyncio.sleep(0.05)

    measuring = asyncio.create_task(measure())
    await sample_and_judge(system, prompts, 1, cfg, watch)
    measuring.cancel()
    half, bound = len(seen) // 2, IN_FLIGHT * WORKERS * MIB
    print(f"object store: {max(seen) / MIB:.1f} MiB at most, {bound / MIB:.0f} in flight, of {GROUPS} groups of 1 MiB")
    assert bound / 4 < max(seen) <= bound + LINGERING * MIB
    assert max(seen[half:]) <= max(seen[:half]) + 2 * bound  # flat: it does not grow with what was done
    assert len(await buffer.held(1)) == GROUPS
