"""What the engines do around vLLM, with a stand-in for it: failing steps, the order of an update, the gate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import actors.engines as engines
from actors.engine_base import EngineDied, requests
from sppo_ray.errors import WeightSyncError
from sppo_ray.types import Sampling
from sppo_ray.weight_chunks import WeightChunk

CHUNK = WeightChunk((), (), (), np.zeros(0, np.uint8))


class FakeLLM:
    """Finishes a request `steps` steps after it was added; records calls; raises what it is told to."""

    def __init__(self, steps: int = 3) -> None:
        self.label = "default"  # of the weights, as in vLLM
        self.steps, self.running, self.calls = steps, {}, []  # type: ignore[var-annotated]
        self.fail: dict[str, Exception] = {}

    def add_request(self, request_id: str, prompt: Any, params: Any) -> None:
        self.running[request_id] = (self.steps, params)

    def step(self) -> list[Any]:
        if "step" in self.fail:
            raise self.fail["step"]
        self.running = {name: (left - 1, params) for name, (left, params) in self.running.items()}
        done = [name for name, (left, _) in self.running.items() if left <= 0]
        return [self._output(name, self.running.pop(name)[1]) for name in done]

    def _output(self, name: str, params: Any) -> Any:
        return SimpleNamespace(request_id=name, outputs=[self._completion(params.seed + i) for i in range(params.n)])

    def _completion(self, token: int) -> Any:
        return SimpleNamespace(
            token_ids=[token],
            text="",
            finish_reason="stop",
            cumulative_logprob=-0.5,
            logprobs=[{token: SimpleNamespace(logprob=-0.5)}],
            weight_versions=[SimpleNamespace(version=self.label, start=0, end=1)],
        )

    def abort_request(self, names: list[str]) -> None:
        time.sleep(0.05)  # that nobody waits for it must not go unseen
        self.calls.append("abort")
        for name in names:
            self.running.pop(name, None)

    def collective_rpc(self, method: str, kwargs: Any) -> None:
        self.calls.append(method)
        if method in self.fail:
            raise self.fail.pop(method)

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        assert reset_running_requests
        self.calls.append("reset_prefix_cache")

    def set_weight_version(self, label: str) -> None:
        self.label = label

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {tags}")


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    fake = FakeLLM()
    monkeypatch.setattr(engines, "EngineArgs", dict)
    monkeypatch.setattr(engines.LLMEngine, "from_engine_args", lambda *args, **kwargs: fake)
    return fake


def chunks() -> AsyncIterator[WeightChunk]:
    async def two() -> AsyncIterator[WeightChunk]:
        for _ in range(2):
            yield CHUNK

    return two()


def sampling(*seeds: int) -> Sampling:
    return Sampling(1.0, 1.0, 8, seeds)


async def in_the_engine(llm: FakeLLM, requests: int) -> None:
    """Returns when so many run there."""
    async with asyncio.timeout(60):
        while len(llm.running) < requests:
            await asyncio.sleep(0.001)


UPDATE = ["abandon_weight_update", "start_weight_update", "update_weights", "update_weights", "finish_weight_update"]


def test_requests_from_seeds() -> None:
    assert [(r.n, r.seed) for r in requests(sampling(7, 8, 9))] == [(3, 7)]
    assert [(r.n, r.seed) for r in requests(sampling(0, 50, 100))] == [(1, 0), (1, 50), (1, 100)]
    assert [(r.n, r.seed) for r in requests(sampling(8, 7))] == [(1, 8), (1, 7)]
    assert [(r.n, r.temperature) for r in requests(Sampling(0.0, 1.0, 8, (3,)))] == [(1, 0.0)]
    with pytest.raises(ValueError, match="greedy"):
        requests(Sampling(0.0, 1.0, 8, (3, 4)))


async def test_outputs_come_in_the_order_of_the_seeds(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 4)
    groups = await asyncio.gather(engine.generate([1], sampling(0, 50, 100)), engine.generate([1], sampling(5, 6)))
    assert [[output.token_ids[0] for output in group] for group in groups] == [[0, 50, 100], [5, 6]]
    assert {output.version for group in groups for output in group} == {4}


async def test_a_failed_step_reaches_everyone_who_waits(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0)
    llm.steps = 10**9
    waiting = [asyncio.create_task(engine.generate([1], sampling(i, i + 50))) for i in range(3)]
    await in_the_engine(llm, 6)
    llm.fail["step"] = RuntimeError("broken kernel")
    for task in waiting:
        with pytest.raises(EngineDied, match="broken kernel"):
            await task
    with pytest.raises(EngineDied):  # and whoever comes later
        await engine.generate([1], sampling(1))


async def test_a_cancelled_group_is_aborted_in_the_engine(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0)
    llm.steps = 10**9
    task = asyncio.create_task(engine.generate([1], sampling(0, 50)))
    await in_the_engine(llm, 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.calls == ["abort", "abort"]
    await asyncio.wait_for(engine.update_weights(1, chunks), 60)  # nobody is left inside


async def test_an_update_waits_for_running_groups_and_holds_later_ones(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0)
    llm.steps = 50
    early = asyncio.create_task(engine.generate([1], sampling(1)))
    await asyncio.sleep(0)
    update = asyncio.create_task(engine.update_weights(1, chunks))
    await asyncio.sleep(0)
    late = asyncio.create_task(engine.generate([1], sampling(1)))
    assert ((await early)[0].version, (await late)[0].version) == (0, 1)
    await update
    assert llm.calls == [*UPDATE, "reset_prefix_cache"]


async def test_an_update_that_fails_half_way_is_made_again_from_the_start(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0)
    llm.fail["update_weights"] = RuntimeError("lost")
    await engine.update_weights(1, chunks)
    assert llm.calls == [*UPDATE[:3], *UPDATE, "reset_prefix_cache"]
    assert (await engine.generate([1], sampling(1)))[0].version == 1


async def test_after_a_failed_update_nothing_is_served_until_one_succeeds(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0)

    async def broken() -> AsyncIterator[WeightChunk]:
        yield CHUNK
        raise OSError("no such chunk")

    with pytest.raises(OSError, match="no such chunk"):
        await engine.update_weights(1, broken)
    with pytest.raises(WeightSyncError, match="version 1 was interrupted"):
        await engine.generate([1], sampling(1))
    await engine.update_weights(2, chunks)
    assert (await engine.generate([1], sampling(1)))[0].version == 2


async def test_sleep_drops_the_weights_and_an_update_wakes_in_vllms_order(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0, can_sleep=True)
    await engine.sleep()
    await engine.sleep()
    with pytest.raises(WeightSyncError, match="sleeps"):
        await engine.generate([1], sampling(1))
    llm.fail["finish_weight_update"] = RuntimeError("once")
    await engine.update_weights(1, chunks)
    woken = ["sleep 2", "wake ['weights']", *UPDATE, *UPDATE, "reset_prefix_cache", "wake ['kv_cache']"]
    assert llm.calls == woken
    assert (await engine.generate([1], sampling(1)))[0].version == 1


async def test_a_cpu_engine_does_not_sleep(llm: FakeLLM) -> None:
    engine = engines.InProcessEngine({}, 0)
    await engine.sleep()
    assert (await engine.generate([1], sampling(1)))[0].version == 0
    assert llm.calls == []
