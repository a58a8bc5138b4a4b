"""Pools over cheap actors: dispatch, the words of a failure, deaths, rolling updates, time limits, workers that leave.

Deaths in a row (tests/unit/test_workers.py, test_blame.py) and hanging (test_hung_workers.py) are tested in virtual time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.pool import JudgePool, RolloutPool, call
from actors.weights import NAME, WeightsHub
from sppo_ray.config import Config
from sppo_ray.errors import GroupAborted, WeightSyncError, WorkerFailed
from sppo_ray.types import Prompt, Sampling
from tests.actors.pool_workers import Gate, publish, start, waiting

PROMPT = Prompt("p", "text", "templated", np.zeros(3, np.int32))


def sampling(seed: int = 0) -> Sampling:
    return Sampling(1.0, 1.0, 4, (seed,))


@pytest.fixture
def gate(ray_local: None) -> Any:
    gate = ray.remote(Gate).options(num_cpus=0).remote()
    yield gate
    ray.kill(gate)


@pytest.fixture(scope="module")
def hub(ray_local: None, actor_config: Config) -> Any:
    hub = ray.remote(WeightsHub).options(num_cpus=0).remote(actor_config)
    publish(hub, 1)
    yield hub
    ray.kill(hub)


def limited(config: Config, **weights: float) -> Config:
    return config.model_copy(update={"weights": config.weights.model_copy(update=weights)})


@pytest.fixture
def config(actor_config: Config) -> Config:
    return limited(actor_config, timeout_s=60)


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
    assert (await pool.generate(PROMPT, sampling(), 2, epoch=4)).receipt.epoch == 4
    logprobs, version = await pool.score(np.zeros(2, np.int32), np.zeros(3, np.int32))
    assert (logprobs.shape, version) == ((3,), 7)
    assert (await JudgePool(config, good).score("x", ["a", "b"])).shape == (2, 2)


async def test_an_error_begins_with_the_workers_name(config: Config, good: Any, hub: Any) -> None:
    with pytest.raises(WorkerFailed, match=r"^good-0: ") as caught:
        await RolloutPool(config, {"good-0": good["good-0"]}, hub).generate(PROMPT, sampling(66), 1)
    assert str(caught.value) == "good-0: ValueError: prompt too long"
    assert "in generate" in caught.value.__notes__[0]  # the traceback inside the actor
    with pytest.raises(WorkerFailed, match=r"^weights: WeightSyncError: .*call begin"):
        await call(hub, NAME, "commit", 9, "x", 1)


async def test_an_aborted_group_is_no_failure(config: Config, good: Any, hub: Any) -> None:
    pool = RolloutPool(config, good, hub)
    with pytest.raises(GroupAborted, match=r"^good-0: version 3 came$") as caught:
        await pool.generate(PROMPT, sampling(67), 1)
    assert type(caught.value) is GroupAborted  # Ray's own error is an instance of it, too
    assert (await pool.generate(PROMPT, sampling(67), 1, protected=True)).receipt.prompt_id == "p"


async def test_a_lost_call_is_made_again_on_another_worker(config: Config, good: Any, hub: Any) -> None:
    made = [start("mortal", die_at=13)]

    def create(name: str) -> Any:
        made.append(start(name))
        return made[-1]

    pool = RolloutPool(config, {"mortal": made[0], "good-0": good["good-0"]}, hub, create=create)
    await pool.ready()
    each = config.rollout.in_flight
    assert pool.slots == 2 * each
    assert (await pool.generate(PROMPT, sampling(13), 1)).receipt.worker == "good-0"
    assert pool.slots == each
    async with asyncio.timeout(300):
        while (await pool.generate(PROMPT, sampling(1), 1)).receipt.worker != "mortal":
            await asyncio.sleep(0.2)  # another is started in its place, under its name
    assert pool.slots == 2 * each
    assert (len(made), pool.restarts) == (2, 1)
    ray.kill(made[1])


async def test_a_call_that_kills_every_worker_ends(config: Config, hub: Any) -> None:
    mortal: list[Any] = []

    def create(name: str) -> Any:
        mortal.append(start(name, die_at=13))
        return mortal[-1]

    pool = RolloutPool(config, {"mortal": create("mortal")}, hub, create=create)
    await pool.ready()
    cause = r"^mortal: the actor died in generate of prompt 'p', .* 3 in all\. .* died unexpectedly .*logs/mortal\.log"
    with pytest.raises(WorkerFailed, match=cause):
        await pool.generate(PROMPT, sampling(13), 1)
    assert (await pool.generate(PROMPT, sampling(1), 1)).receipt.worker == "mortal"
    ray.kill(mortal[-1])


async def test_a_worker_that_is_gone_for_good(config: Config, hub: Any) -> None:
    mortal = start("mortal", die_at=13)
    pool = RolloutPool(config, {"mortal": mortal}, hub)
    await pool.ready()
    with pytest.raises(
        WorkerFailed, match=r"^mortal: died 1 time .*First cause: ActorDiedError: .*No other worker is left"
    ):
        await pool.generate(PROMPT, sampling(13), 1)
    assert pool.slots == config.rollout.in_flight  # enough for a call to find out


async def test_one_that_cannot_start_is_not_tried_again(config: Config, hub: Any) -> None:
    broken = start("broken", broken="no such model")
    pool = RolloutPool(config, {"broken": broken}, hub, create=lambda name: start(name))
    with pytest.raises(
        WorkerFailed, match=r"^broken: could not start: ValueError: no such model\. Its log is logs/broken"
    ):
        await pool.ready()


async def test_load_checks_every_checksum(config: Config, good: Any, hub: Any) -> None:
    report = await RolloutPool(config, good, hub).load(1)
    assert {name: (f["version"], f["checksum"]) for name, f in report.items()} == dict.fromkeys(good, (1, "right"))
    liar = start("liar", checksum="wrong")
    doubtful = RolloutPool(config, good | {"liar": liar}, hub)
    await doubtful.ready()
    with pytest.raises(WeightSyncError, match=r"liar: has checksum wrong, but .* with checksum right"):
        await doubtful.load(1)
    with pytest.raises(WeightSyncError, match=r"version 2 was to be loaded but version 1"):
        await RolloutPool(config, good, hub).load(2)
    ray.kill(liar)


@pytest.mark.parametrize("all_at_once", [True, False])
async def test_who_does_not_answer_a_load_is_left_out(
    config: Config, good: Any, hub: Any, all_at_once: bool, caplog: pytest.LogCaptureFixture
) -> None:
    slow = start("slow", load_s=3600)
    pool = RolloutPool(limited(config, timeout_s=20), {"slow": slow} | good, hub, all_at_once)
    await pool.ready()
    assert (await pool.load(1)).keys() == good.keys()
    assert "version 1 is served without slow" in caplog.text
    async with asyncio.timeout(300):
        while "slow: died 1 time" not in caplog.text:  # none is started in its place here
            await asyncio.sleep(0.05)
    stacks = (Path(config.run.dir) / "logs/slow.stacks.txt").read_text()
    assert "Thread" in stacks and "MainThread" in stacks  # noqa: PT018
    assert "slow: hangs: no answer to load in 20 s." in caplog.text
    assert (await pool.load(1)).keys() == good.keys()


async def test_an_update_rolls_while_the_others_sample(config: Config, hub: Any, gate: Any) -> None:
    config = limited(config, at_once=0.6)
    workers = {f"w-{n}": start(f"w-{n}", gate=gate) for n in range(4)}
    pool = RolloutPool(config, workers, hub, all_at_once=False)
    await pool.ready()
    update = asyncio.create_task(pool.load(1))
    first = await waiting(gate, 2)  # floor(0.6 * 4)
    handles = await asyncio.gather(*(pool.generate(PROMPT, sampling(), 1) for _ in range(8)))
    others = set(workers) - set(first)
    assert {handle.receipt.worker for handle in handles} == others
    assert pool.slots == 4 * config.rollout.in_flight
    await gate.open.remote(4)
    assert list(await update) == list(workers)
    assert await gate.state.remote() == ([], 2)

    update = asyncio.create_task(RolloutPool(config, workers, hub, all_at_once=True).load(1))
    assert set(await waiting(gate, 4)) == set(workers)
    await gate.open.remote(4)
    await update
    for worker in workers.values():
        ray.kill(worker)


async def test_the_time_limit_is_each_workers_own(config: Config, hub: Any) -> None:
    workers = {f"slow-{n}": start(f"slow-{n}", load_s=10) for n in range(2)}  # 20 s in turn, the limit is 19 s
    pool = RolloutPool(limited(config, timeout_s=19), workers, hub, all_at_once=False)
    await pool.ready()
    report = await pool.load(1)
    assert report.keys() == workers.keys()
    assert all(10 <= figures["seconds"] < 19 for figures in report.values())
    for worker in workers.values():
        ray.kill(worker)


async def test_what_is_published_during_an_update_is_served_after_it(config: Config, gate: Any) -> None:
    hub = ray.remote(WeightsHub).options(num_cpus=0).remote(config)
    publish(hub, 1)
    worker = start("w", gate=gate, holds=2)
    pool = RolloutPool(config, {"w": worker}, hub, all_at_once=False)
    await pool.ready()
    update = asyncio.create_task(pool.load(1))
    await waiting(gate, 1)
    publish(hub, 2)
    await gate.open.remote(2)
    assert (await update)["w"]["version"] == 2
    publish(hub, 3)
    await gate.open.remote(1)
    with pytest.raises(WeightSyncError, match="w: WeightSyncError: the hub has another version"):
        await pool.load(3)  # the hub did not move on: the refusal is an error
    for actor in (hub, worker):
        ray.kill(actor)


async def test_a_worker_leaves_when_its_calls_are_done(config: Config, hub: Any, gate: Any) -> None:
    workers = {name: start(name, gate=gate) for name in ("w-0", "w-1")}
    pool = RolloutPool(config, workers, hub, all_at_once=False)
    await pool.ready()
    held = [asyncio.create_task(pool.generate(PROMPT, sampling(77), 1)) for _ in range(2)]
    assert set(await waiting(gate, 2)) == {"w-0", "w-1"}
    leaving = asyncio.create_task(pool.remove("w-1"))
    handles = await asyncio.gather(*(pool.generate(PROMPT, sampling(), 1) for _ in range(4)))
    assert {handle.receipt.worker for handle in handles} == {"w-0"}
    assert pool.names == ["w-0"]
    assert pool.slots == config.rollout.in_flight
    assert not leaving.done()
    await gate.open.remote(2)
    assert {(await call).receipt.worker for call in held} == {"w-0", "w-1"}
    assert await leaving == workers["w-1"]
    with pytest.raises(ValueError, match="w-0 is the last worker"):
        await pool.remove("w-0")
    for worker in workers.values():
        ray.kill(worker)
