"""New weights in running engines: what serves is what was published, after damage, kills and restarts too."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import save_file
from serving_factory import Serving, dead, start_worker

from actors.pool import RolloutPool
from actors.publish import publish, publish_folder
from actors.ranks import Ranks
from sppo_ray.config import Config
from sppo_ray.errors import WeightSyncError
from sppo_ray.types import Prompt, ResponseGroup, Sampling
from sppo_ray.weight_chunks import Checksum, WeightChunk, pack

pytestmark = pytest.mark.timeout(900)  # with the start of the engines that all tests share, and of more
ALONE = Ranks(rank=0, world=1, group=None, key=b"")  # a learner of one rank
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
    rollout = serving.config.rollout.model_copy(update={"engine": "async"})
    config = serving.config.model_copy(update={"rollout": rollout})
    fresh = start_worker("fresh", config, tmp_path, 10**6)
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
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


async def test_damaged_weights_are_refused_and_the_worker_serves_on(
    serving: Serving, base_weights: Weights, prompts: list[Prompt]
) -> None:
    pool = serving.pool()
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
    old = serving.version
    early = [asyncio.create_task(pool.generate(p, Sampling(1.0, 1.0, 100, (0, 50, 100)), 1)) for p in prompts]
    await asyncio.sleep(0.1)
    serving.publish(changed(base_weights, 4))

    async def versions() -> tuple[int, int]:
        group: ResponseGroup = await (await pool.generate(prompts[0], GREEDY, 1)).ref
        return group.version_start, group.version_end

    one_after_another = [await versions()]
    load = asyncio.create_task(pool.load(serving.version))
    while not load.done():
        one_after_another.append(await versions())
    await load
    one_after_another.append(await versions())
    assert {(g.version_start, g.version_end) for g in [await (await task).ref for task in early]} == {(old, old)}
    # No group is a mixture, and once the new weights have served the old ones never do again.
    before, after = (old, old), (serving.version, serving.version)
    assert one_after_another == sorted(one_after_another)
    assert set(one_after_another) == {before, after}
    assert (one_after_another[0], one_after_another[-1]) == (before, after)


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


def through(channel: str, serving: Serving, run_dir: Path) -> Config:
    """The config with another channel, and a run directory of the test's own."""
    weights = serving.config.weights.model_copy(update={"channel": channel, "chunk_mb": 1})
    run = serving.config.run.model_copy(update={"dir": str(run_dir)})
    return serving.config.model_copy(update={"weights": weights, "run": run})


def published(config: Config, serving: Serving, weights: Weights, policy: Path) -> str:
    serving.version += 1
    return publish(config, serving.hub, ALONE, serving.version, iter(weights.items()), str(policy))


async def test_every_channel_serves_the_same(
    serving: Serving, base_weights: Weights, prompts: list[Prompt], policy: Path, tmp_path: Path
) -> None:
    """The disk channel keeps the newest folders only; a saved policy is served from its own."""
    pool, by_disk = serving.pool(), through("disk", serving, tmp_path)
    weights = changed(base_weights, 6)

    checksums = {published(through("ray", serving, tmp_path), serving, weights, policy)}
    await pool.load(serving.version)
    served = await greedy(pool, prompts)
    published(by_disk, serving, base_weights, policy)
    await pool.load(serving.version)
    assert await greedy(pool, prompts) != served
    checksums.add(published(by_disk, serving, dict(reversed(weights.items())), policy))
    await pool.load(serving.version)
    assert await greedy(pool, prompts) == served
    assert {s["checksum"] for s in (await pool.stats()).values()} == checksums
    current = await serving.hub.current.remote()
    assert (current.folder, current.chunk_refs) == (str(tmp_path / f"weights/v{serving.version}"), ())

    checksums.add(published(by_disk, serving, weights, policy))
    last = serving.version
    assert {f.name for f in (tmp_path / "weights").iterdir()} == {f"v{last - n}" for n in range(3)}
    serving.version += 1
    checksums.add(publish_folder(by_disk, serving.hub, tmp_path / "weights" / f"v{last}", serving.version))
    assert len(checksums) == 1
    assert (await serving.hub.current.remote()).folder == str(tmp_path / f"weights/v{last}")
    # The same version again, as after a restart of the learner: not over the folder that is read.
    assert publish(by_disk, serving.hub, ALONE, serving.version, iter(weights.items()), str(policy)) in checksums
    assert publish(by_disk, serving.hub, ALONE, serving.version, iter(weights.items()), str(policy)) in checksums
    newest = {f"v{last - 1}", f"v{last}", f"v{serving.version}", f"v{serving.version}.1"}
    assert {f.name for f in (tmp_path / "weights").iterdir()} == newest
    # What is outside the run directory may not be seen by all nodes.
    serving.version += 1
    publish_folder(by_disk, serving.hub, policy, serving.version)
    current = await serving.hub.current.remote()
    assert current.folder is None
    assert current.chunk_refs


def test_other_ranks_take_part_in_the_gathering_and_leave_the_hub_alone(actor_config: Config) -> None:
    tensors = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    assert publish(actor_config, None, Ranks(rank=1, world=2, group=None, key=b""), 1, tensors, "") == ""
    assert next(tensors, None) is None


@pytest.mark.parametrize("damage", ["byte", "cut", "gone"])
async def test_a_damaged_folder_is_refused_and_the_worker_serves_on(
    damage: str, serving: Serving, base_weights: Weights, prompts: list[Prompt], policy: Path, tmp_path: Path
) -> None:
    pool, by_disk = serving.pool("rollout-0"), through("disk", serving, tmp_path)
    published(by_disk, serving, base_weights, policy)
    await pool.load(serving.version)
    before, served = await greedy(pool, prompts), serving.version
    published(by_disk, serving, changed(base_weights, 7), policy)
    file = tmp_path / f"weights/v{serving.version}/model.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[-1000] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-1000])
    else:
        file.unlink()
    reason = "checksum" if damage == "byte" else "failed: .*Error"
    with pytest.raises(WeightSyncError, match=f"rollout-0: .*{reason}"):
        await pool.load(serving.version)
    assert await greedy(pool, prompts) == before
    assert (await pool.stats())["rollout-0"]["version"] == served


async def test_a_broadcast_that_fails_is_not_repeated_and_pulling_heals(
    serving: Serving, base_weights: Weights, prompts: list[Prompt]
) -> None:
    """No GPU here, so it fails before anything is sent; a worker that the broadcast is not for pulls."""
    pool, hub = serving.pool(), serving.hub
    before = await greedy(pool, prompts)
    serving.version += 1
    await hub.begin.remote(serving.version)
    (chunk,) = pack(changed(base_weights, 8).items(), 1 << 30)
    await hub.put_chunk.remote(serving.version, 0, chunk)
    checksum = Checksum()
    checksum.update(chunk)
    incomplete = {"rollout-0": {"broadcast": {"init": {}, "update": {}, "checksum": checksum.hexdigest()}}}
    await hub.commit.remote(serving.version, checksum.hexdigest(), 1, incomplete)
    with pytest.raises(WeightSyncError, match=r"rollout-0: .*broadcast failed half-way"):
        await pool.load(serving.version)
    with pytest.raises(Exception, match=r"rollout-0: .*interrupted"):
        await greedy(serving.pool("rollout-0"), prompts[:1])
    pulled = await greedy(serving.pool("rollout-1"), prompts)
    assert pulled != before
    await hub.end_broadcast.remote()
    await pool.load(serving.version)
    assert await greedy(serving.pool("rollout-0"), prompts) == pulled


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
    await dead(publisher)
    await serving.hub.commit.remote(version, "x", 1)
    serving.version = version
    published = await serving.hub.current.remote()
    assert (await published.chunk_refs[0]).data.tobytes() == chunk.data.tobytes()
