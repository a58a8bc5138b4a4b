"""A slow disk or a slow learner holds sampling back: what is in the object store stays within what may be in flight, however
long the run."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import secrets
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Ray reads the mode when it is imported.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
# As the runs themselves set it: objects that nobody holds are gone at once, and not at the next look, a second later.
os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")

import pytest
import ray
from ray._private.internal_api import node_stats

from actors.access import stay_on_loopback
from actors.buffer import BufferActor
from actors.buffer_client import BufferClient
from actors.process import environment
from sppo_ray.config import Config
from sppo_ray.protocols import Handle, System
from sppo_ray.schedules import asynchronous
from sppo_ray.schedules.synchronous import sample_and_judge
from sppo_ray.types import (
    JudgedGroup,
    Publication,
    PublishTask,
    Receipt,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainTask,
)
from tests.unit.groups import config, judged, prompt

ROOT = Path(__file__).parents[2]
GROUPS, IN_FLIGHT, WORKERS, MIB = 96, 4, 2, 1 << 20
LINGERING = IN_FLIGHT * WORKERS  # groups that are on disk, but word of it has not come to all that hold references


@pytest.fixture
def a_ray() -> Iterator[None]:
    """The session's, or one of our own."""
    if ray.is_initialized():
        yield
        return
    stay_on_loopback()
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


def large(name: str, iteration: int, version: int, mib: int) -> JudgedGroup:
    """About so much text. The prompt ids here have three characters, or one or two more."""
    group = judged(name, iteration, version=version)
    responses = tuple(dataclasses.replace(r, text=f"{name} " * (mib * MIB // 5 // 4)) for r in group.group.responses)
    return dataclasses.replace(group, group=dataclasses.replace(group.group, responses=responses))


class Sampler:
    """Rollout, judge and evaluator in one, without limits of their own."""

    slots = IN_FLIGHT * WORKERS

    def __init__(self, mib: int = 1, together: int = 1) -> None:
        """mib: a group's size. together: that many groups exist before any of them is handed on."""
        self._large, self._mib, self._all = ray.remote(large).options(num_cpus=0.1), mib, asyncio.Barrier(together)
        self.version = self.sampled = 0

    async def generate(self, asked, sampling, iteration, epoch=0, protected=False):
        version, self.sampled = self.version, self.sampled + 1
        ref = self._large.remote(asked.prompt_id, iteration, version, self._mib)
        await asyncio.to_thread(ray.wait, [ref], fetch_local=False)
        await self._all.wait()
        return Handle(ref, Receipt(asked.prompt_id, "rollout-0", 1, 0, version, iteration, epoch))

    async def judge(self, group):
        return group

    async def load(self, version):
        self.version = version
        return {"rollout-0": {"version": version}}

    async def evaluate(self, iteration):
        pass


class SlowLearner:
    """It takes its time for every update."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.step = 0

    async def train(self, iteration):
        return await self._buffer.train.remote(iteration)

    async def learn(self) -> None:
        while True:
            task = await self._buffer.next_task.remote(self.step)
            match task:
                case TrainTask():
                    await asyncio.sleep(0.5)
                    self.step += 1
                case PublishTask():
                    await self._buffer.published.remote(self._publication(task, ends=False))
                case SaveTask():
                    trained = TrainedIteration(task.iteration, task.version, self.step, "", "elsewhere")
                    await self._buffer.saved.remote(trained, self._publication(task, ends=True))
                case StopTask():
                    return

    def _publication(self, task: PublishTask | SaveTask, ends: bool) -> Publication:
        return Publication(task.version, self.step, task.iteration, ends, "", 0.0, None)


WATCH = SimpleNamespace(
    sampling=lambda *a, **k: None,
    sampled=lambda receipt: None,
    judged=lambda receipt: None,
    sealed=lambda summary: None,
    trained=lambda trained: None,
)


def store() -> Any:
    (node,) = (node for node in ray.nodes() if node["Alive"])
    stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return stats.store_stats


def in_store() -> int:
    """Bytes."""
    return store().object_store_bytes_used


def in_memory() -> int:
    """Bytes. Where spilling is slower than what comes, Ray maps files from disk beyond its store and counts them as used."""
    stats = store()
    return stats.object_store_bytes_used - stats.object_store_bytes_fallback


def high(seen: list[float]) -> float:
    """What nine readings in ten stay within."""
    return statistics.quantiles(seen, n=10)[-1]


class Measured:
    """What the object store holds, in MiB beyond what it held before, while the body runs."""

    def __init__(self, held: Callable[[], int] = in_store) -> None:
        """held: in bytes."""
        self._held = held

    async def __aenter__(self) -> Measured:
        self._before, self.seen = self._held(), []
        self._measuring = asyncio.create_task(self._measure())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._measuring.cancel()
        with suppress(asyncio.CancelledError):
            await self._measuring
        assert len(self.seen) > 10

    async def _measure(self) -> None:
        while True:
            self.seen.append((await asyncio.to_thread(self._held) - self._before) / MIB)
            await asyncio.sleep(0.05)

    def is_flat_within(self, bound: float) -> None:
        """bound: MiB. The second half of the time it held no more than the first, but for half of what is in flight.
        The time counts from the first group: the processes that make them take long to start on a busy machine."""
        seen = self.seen[next(n for n, held in enumerate(self.seen) if held > 0.5) :]
        first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
        print(f"object store: {max(seen):.1f} MiB at most, {bound:.0f} in flight, of {GROUPS} groups of 1 MiB")
        # Where the raylet itself is held up for a moment, so is word of what is free: one reading in ten may show that.
        assert bound / 4 < high(seen) <= bound + LINGERING
        assert high(second) <= high(first) + bound / 2
        assert max(seen) <= GROUPS / 2


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
    prompts = [prompt(f"p{n:02d}") for n in range(GROUPS)]
    async with Measured() as measured:
        await sample_and_judge(system, prompts, 1, cfg, WATCH)
    measured.is_flat_within(IN_FLIGHT * WORKERS)
    assert len(await buffer.held(1)) == GROUPS


async def test_what_does_not_fit_into_the_object_store_spills(a_ray, tmp_path):
    """Groups so large that those in flight are half as much again as the store: memory stays within its size, nothing is lost."""
    cfg = config(tmp_path, rollout__in_flight=IN_FLIGHT, rollout__num_workers=WORKERS, buffer__shard_groups=1)
    buffer = BufferClient(ray.remote(SlowBuffer).options(num_cpus=0).remote(cfg))
    before, size = store().spilled_bytes_total, store().object_store_bytes_avail
    in_flight = IN_FLIGHT * WORKERS
    sampler = Sampler(mib=math.ceil(1.5 * size / MIB / in_flight), together=in_flight)
    system = SimpleNamespace(rollout=sampler, judge=sampler, buffer=buffer)
    prompts = [prompt(f"p{n:02d}") for n in range(2 * in_flight)]
    async with Measured(in_memory) as measured:
        await sample_and_judge(system, prompts, 1, cfg, WATCH)
    print(
        f"object store: {max(measured.seen):.0f} of {size / MIB:.0f} MiB, {store().spilled_bytes_total - before >> 20} MiB spilled"
    )
    assert size / MIB / 2 < max(measured.seen) <= size / MIB
    assert store().spilled_bytes_total > before
    assert len(await buffer.held(1)) == len(prompts)


async def test_the_object_store_stays_flat_while_the_learner_is_slow(a_ray, tmp_path):
    """Async: sampling could be done long before, but is held to what may be one version ahead."""
    batch = 8
    cfg = config(
        tmp_path,
        schedule__mode="async",
        schedule__iterations=2,
        schedule__max_staleness=1,
        weights__publish_every=1,
        learner__batch_size=batch,
        learner__epochs=1,
        rollout__in_flight=IN_FLIGHT,
        rollout__num_workers=WORKERS,
        buffer__flush_s=0.01,
    )
    slices = [[prompt(f"p{t}-{n:02d}") for n in range(GROUPS // 2)] for t in (1, 2)]
    ids = [[one.prompt_id for one in part] for part in slices]
    actor = ray.remote(BufferActor).options(num_cpus=0).remote(cfg, ids)
    sampler, learner = Sampler(), SlowLearner(actor)
    learning = asyncio.create_task(learner.learn())
    ahead = []

    def sampled(receipt: Receipt) -> None:
        ahead.append(sampler.sampled - batch * learner.step)

    watch = SimpleNamespace(**(vars(WATCH) | {"sampled": sampled}))
    async with Measured() as measured:
        await asynchronous.run(System(sampler, sampler, BufferClient(actor), learner, sampler), slices, cfg, watch)
    await learning
    measured.is_flat_within(IN_FLIGHT * WORKERS)
    assert sampler.sampled == GROUPS
    assert batch < max(ahead) <= 2 * batch  # it was the learner that held sampling back
