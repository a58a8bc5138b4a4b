"""Pools over cheap actors: dispatch, the words of a failure, deaths, time limits."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest
import ray

from actors import pool as pool_module
from actors.pool import JudgePool, RolloutPool, call
from actors.weights import NAME, WeightsHub
from sppo_ray.config import Config
from sppo_ray.errors import WeightSyncError, WorkerFailed
from sppo_ray.types import Prompt, Receipt, Sampling
from sppo_ray.weight_chunks import WeightChunk

PROMPT = Prompt("p", "text", "templated", np.zeros(3, np.int32))


def sampling(seed: int = 0) -> Sampling:
    return Sampling(1.0, 1.0, 4, (seed,))


def start(name: str, max_restarts: int = 3, **behaviour: Any) -> Any:
    """A stand-in for a worker: `die_at` seed, `checksum` to answer a load with, `load_s` to take for it."""

    class Worker:
        async def generate(self, prompt: Any, sampling: Any, iteration: int) -> tuple[Any, Any]:
            import os

            if sampling.seeds[0] == behaviour.get("die_at"):
                os._exit(1)
            if sampling.seeds[0] == 66:
                raise ValueError("prompt too long")
            await asyncio.sleep(0.05)
            return [name] * 200_000, Receipt(prompt.prompt_id, name, 1, 0, 0)

        async def load(self, version: int) -> str:
            await asyncio.sleep(behaviour.get("load_s", 0))
            return str(behaviour.get("checksum", "right"))

        async def ping(self) -> str:
            return name

        async def score(self, source: str, candidates: list[str]) -> Any:
            return np.ones((len(candidates), len(candidates)), np.float32)

    return ray.remote(Worker).options(num_cpus=0.01, max_restarts=max_restarts, max_concurrency=100).remote()


@pytest.fixture(scope="module")
def hub(ray_local: None, actor_config: Config) -> Any:
    hub = ray.remote(WeightsHub).options(num_cpus=0).remote(actor_config)
    ray.get(hub.begin.remote(1))
    ray.get(hub.put_chunk.remote(1, 0, WeightChunk((), (), (), np.zeros(0, np.uint8))))
    ray.get(hub.commit.remote(1, "right", 1))
    yield hub
    ray.kill(hub)


@pytest.fixture
def config(actor_config: Config) -> Config:
    return actor_config.model_copy(update={"weights": actor_config.weights.model_copy(update={"timeout_s": 3.0})})


@pytest.fixture(scope="module")
def good(hub: Any) -> Any:
    workers = {name: start(name) for name in ("good-0", "good-1")}
    yield workers
    for worker in workers.values():
        ray.kill(worker)


async def test_the_least_loaded_worker_is_taken(config: Config, good: Any, hub: Any) -> None:
    pool = RolloutPool(config, good, hub)
    await pool.ready()
    handles = await asyncio.gather(*(pool.generate(PROMPT, sampling(), 1) for _ in range(10)))
    names = [handle.receipt.worker for handle in handles]
    assert sorted(names) == ["good-0"] * 5 + ["good-1"] * 5
    assert isinstance(handles[0].ref, ray.ObjectRef)
    assert (await JudgePool(config, good).score("x", ["a", "b"])).shape == (2, 2)


async def test_an_error_begins_with_the_workers_name(config: Config, good: Any, hub: Any) -> None:
    with pytest.raises(WorkerFailed, match=r"^good-0: ") as caught:
        await RolloutPool(config, {"good-0": good["good-0"]}, hub).generate(PROMPT, sampling(66), 1)
    assert str(caught.value) == "good-0: ValueError: prompt too long"
    assert "in generate" in caught.value.__notes__[0]  # the traceback inside the actor
    with pytest.raises(WorkerFailed, match=r"^weights: WeightSyncError: .*call begin"):
        await call(hub, NAME, "commit", 9, "x", 1)


async def test_a_lost_call_is_made_again_on_another_worker(config: Config, good: Any, hub: Any) -> None:
    mortal = start("mortal", die_at=13)
    pool = RolloutPool(config, {"mortal": mortal, "good-0": good["good-0"]}, hub)
    await pool.ready()
    assert (await pool.generate(PROMPT, sampling(13), 1)).receipt.worker == "good-0"
    async with asyncio.timeout(30):
        while (await pool.generate(PROMPT, sampling(1), 1)).receipt.worker != "mortal":
            await asyncio.sleep(0.2)  # it comes back by itself
    ray.kill(mortal)


async def test_a_call_that_kills_every_worker_ends(config: Config, hub: Any) -> None:
    mortal = start("mortal", max_restarts=5, die_at=13)
    pool = RolloutPool(config, {"mortal": mortal}, hub)
    await pool.ready()
    with pytest.raises(WorkerFailed, match=r"^mortal: the actor died in generate, attempt 3 of 3 .*logs/mortal\.log"):
        await pool.generate(PROMPT, sampling(13), 1)
    assert (await pool.generate(PROMPT, sampling(1), 1)).receipt.worker == "mortal"
    ray.kill(mortal)


async def test_a_worker_that_is_gone_for_good(config: Config, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PATIENCE", 2)
    mortal = start("mortal", max_restarts=0, die_at=13)
    pool = RolloutPool(config, {"mortal": mortal}, hub)
    await pool.ready()
    with pytest.raises(WorkerFailed, match=r"^mortal: the actor is dead and is not restarted"):
        await pool.generate(PROMPT, sampling(13), 1)


async def test_load_checks_every_checksum(config: Config, good: Any, hub: Any) -> None:
    await RolloutPool(config, good, hub).load(1)
    liar = start("liar", checksum="wrong")
    with pytest.raises(WeightSyncError, match=r"checksum right, but liar has wrong"):
        await RolloutPool(config, good | {"liar": liar}, hub).load(1)
    with pytest.raises(WeightSyncError, match=r"version 2 was to be loaded but version 1"):
        await RolloutPool(config, good, hub).load(2)
    ray.kill(liar)


async def test_load_names_who_does_not_answer(config: Config, good: Any, hub: Any) -> None:
    slow = start("slow", load_s=60)
    pool = RolloutPool(config, good | {"slow": slow}, hub)
    await pool.ready()
    began = time.monotonic()
    with pytest.raises(WeightSyncError, match=r"slow: no answer in 3 s$"):
        await pool.load(1)
    assert time.monotonic() - began < 10
    ray.kill(slow)
