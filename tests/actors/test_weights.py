"""New weights in running engines: what serves is what was published, after damage, kills and restarts too."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import save_file
from serving_factory import Serving, start_worker

from actors.pool import RolloutPool
from sppo_ray.errors import WeightSyncError
from sppo_ray.types import Prompt, ResponseGroup, Sampling
from sppo_ray.weight_chunks import WeightChunk, pack

GREEDY = Sampling(0.0, 1.0, 32, (0,))
Weights = dict[str, torch.Tensor]


def changed(weights: Weights, seed: int) -> Weights:
    """Other weights that give other words: noise on every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


async def greedy(pool: RolloutPool, prompts: list[Prompt]) -> list[tuple[list[int], float]]:
    async def one(prompt: Prompt) -> tuple[list[int], float]:
        group: ResponseGroup = await (await pool.generate(prompt, GREEDY, 1)).ref
        return group.responses[0].token_ids.tolist(), group.responses[0].logprob

    return await asyncio.gather(*(one(prompt) for prompt in prompts))


async def test_published_weights_equal_a_fresh_engine_on_them(
    serving: Serving, base_weights: Weights, prompts: list[Prompt], policy: Path, tmp_path: Path
) -> None:
    """Both engines: the fresh one is an AsyncLLM with its engine core in another process, which then takes the base
    weights through shared memory. Killed, it leaves no process behind."""
    before = await greedy(serving.pool(), prompts)
    weights = changed(base_weights, 1)
    for file in policy.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rollout = serving.config.rollout.model_copy(update={"engine": "async"})  # the config refuses it on CPU; tests may
    config = serving.config.model_copy(update={"rollout": rollout})
    fresh = start_worker("fresh", config, tmp_path, 10**6, VLLM_ENABLE_V1_MULTIPROCESSING="1")
    fresh_pool = RolloutPool(config, {"fresh": fresh}, serving.hub)

    checksum = serving.publish(weights)
    await serving.pool().load(serving.version)
    stats = await serving.pool().stats()
    assert {(s["version"], s["checksum"]) for s in stats.values()} == {(serving.version, checksum)}
    after = await greedy(serving.pool("rollout-0"), prompts)
    assert after == await greedy(serving.pool("rollout-1"), prompts) != before
    assert after == await greedy(fresh_pool, prompts)  # log-probabilities too, to the last bit

    serving.publish(base_weights)
    await fresh_pool.load(serving.version)
    assert await greedy(fresh_pool, prompts) == before
    await assert_no_process_is_left(fresh)


async def assert_no_process_is_left(worker: object) -> None:
    pid = (await worker.stats.remote())["pid"]  # type: ignore[attr-defined]
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    assert len(processes) > 1  # the engine core is a process of its own here
    ray.kill(worker)
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


async def test_damaged_weights_are_refused_and_the_worker_serves_on(
    serving: Serving, base_weights: Weights, prompts: list[Prompt]
) -> None:
    serving.publish(base_weights)
    pool = serving.pool()
    await pool.load(serving.version)
    before, served = await greedy(pool, prompts), serving.version
    serving.publish(changed(base_weights, 2), damage=True)
    with pytest.raises(WeightSyncError, match=r"rollout-0: .*checksum.*rollout-1: .*checksum"):
        await pool.load(serving.version)
    assert await greedy(pool, prompts) == before
    assert {s["version"] for s in (await pool.stats()).values()} == {served}
    serving.publish(changed(base_weights, 2))
    await pool.load(serving.version)
    assert await greedy(pool, prompts) != before


async def test_incomplete_weights_are_refused_until_complete_ones_come(
    serving: Serving, base_weights: Weights, prompts: list[Prompt]
) -> None:
    """A publish that lacks a layer has a right checksum; only the engine can see it, when it has taken the rest."""
    pool = serving.pool("rollout-0")
    serving.publish(base_weights)
    await pool.load(serving.version)
    before = await greedy(pool, prompts)
    serving.publish({n: w for n, w in changed(base_weights, 3).items() if "layers.2." not in n})
    with pytest.raises(WeightSyncError, match=r"rollout-0: .*hold nothing for .*model\.layers\.2"):
        await pool.load(serving.version)
    with pytest.raises(Exception, match=r"rollout-0: .*interrupted"):
        await greedy(pool, prompts[:1])
    serving.publish(base_weights)
    await pool.load(serving.version)
    assert await greedy(pool, prompts) == before


async def test_a_load_waits_for_running_groups_and_later_ones_see_the_new_weights(
    serving: Serving, base_weights: Weights, prompts: list[Prompt]
) -> None:
    pool = serving.pool("rollout-0")
    serving.publish(base_weights)
    await pool.load(serving.version)
    old = serving.version
    early = [asyncio.create_task(pool.generate(p, Sampling(1.0, 1.0, 100, (0, 50, 100)), 1)) for p in prompts]
    await asyncio.sleep(0.1)
    serving.publish(changed(base_weights, 4))
    load = asyncio.create_task(pool.load(serving.version))
    late = [asyncio.create_task(pool.generate(p, GREEDY, 1)) for p in prompts]
    await load
    versions = [
        {(group.version_start, group.version_end) for group in [await (await task).ref for task in tasks]}
        for tasks in (early, late)
    ]
    assert versions[0] == {(old, old)}
    assert versions[1] <= {(old, old), (serving.version, serving.version)}
    assert (await pool.generate(prompts[0], GREEDY, 1)).receipt.version == serving.version


async def test_a_killed_worker_is_replaced_and_serves_the_current_version(
    serving: Serving, base_weights: Weights, prompts: list[Prompt]
) -> None:
    pool = serving.pool("rollout-1")
    serving.publish(changed(base_weights, 5))
    await pool.load(serving.version)
    before = await greedy(pool, prompts)
    pid = (await pool.stats())["rollout-1"]["pid"]
    running = [asyncio.create_task(pool.generate(p, Sampling(1.0, 1.0, 100, (7, 99)), 1)) for p in prompts]
    await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    receipts = [(await task).receipt for task in running]  # made again on the restarted worker
    assert {receipt.version for receipt in receipts} == {serving.version}
    assert await greedy(pool, prompts) == before
    stats = (await pool.stats())["rollout-1"]
    assert stats["pid"] != pid
    assert stats["version"] == serving.version


async def test_hub_refuses_wrong_order_and_missing_chunks(serving: Serving, base_weights: Weights) -> None:
    hub, version = serving.hub, serving.version + 1
    before = await hub.current.remote()
    (chunk,) = pack([("w", torch.zeros(2))], 100)
    with pytest.raises(WeightSyncError, match=r"put_chunk.*call begin"):
        await hub.put_chunk.remote(version, 0, chunk)
    await hub.begin.remote(version)
    await hub.put_chunk.remote(version, 1, chunk)
    with pytest.raises(WeightSyncError, match=r"missing are \[0\]"):
        await hub.commit.remote(version, "x", 2)
    with pytest.raises(WeightSyncError, match=r"beyond the count are \[1\]"):
        await hub.commit.remote(version, "x", 1)
    after = await hub.current.remote()
    assert after == before  # a half-published version cannot be pulled
    if before is not None:
        with pytest.raises(WeightSyncError, match="versions only grow"):
            await hub.begin.remote(before.version - 1)
    with pytest.raises(WeightSyncError, match=f"version {version} was to be loaded"):
        await serving.pool().load(version)


async def test_chunks_outlive_whoever_put_them(serving: Serving, base_weights: Weights) -> None:
    @ray.remote(num_cpus=0.1)
    class Publisher:
        def publish(self, hub: object, version: int, chunk: WeightChunk) -> None:
            ray.get(hub.put_chunk.remote(version, 0, chunk))  # type: ignore[attr-defined]

    version = serving.version + 1
    (chunk,) = pack([("w", torch.arange(1 << 18, dtype=torch.float32))], 1 << 21)
    await serving.hub.begin.remote(version)
    publisher = Publisher.remote()
    await publisher.publish.remote(serving.hub, version, chunk)
    ray.kill(publisher)
    await serving.hub.commit.remote(version, "x", 1)
    serving.version = version
    time.sleep(0.5)
    published = await serving.hub.current.remote()
    assert (await published.chunk_refs[0]).data.tobytes() == chunk.data.tobytes()
