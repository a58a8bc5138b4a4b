"""vLLM's engine in a process of its own, as on GPUs, is killed or hangs: its rollout worker is replaced."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import psutil
import ray
from serving_factory import Serving, gone, groups, start_worker, tokens

from actors.pool import RolloutPool
from sppo_ray.types import Prompt
from tests.actors.job_runs import titled


def pool_with_engine_apart(name: str, serving: Serving, policy: Path, **rollout_settings: Any) -> RolloutPool:
    """Of one worker, which is starting."""
    rollout = serving.config.rollout.model_copy(update={"engine": "async"} | rollout_settings)
    config = serving.config.model_copy(update={"rollout": rollout})

    def create(name: str) -> Any:
        return start_worker(name, config, policy, serving.version)

    return RolloutPool(config, {name: create(name)}, serving.hub, create=create)


def engine_cores(of: psutil.Process) -> set[psutil.Process]:
    return set(titled("EngineCore", of.children(recursive=True)))


async def test_a_worker_whose_engine_hangs_or_is_killed_is_replaced_and_the_engine_ends_with_it(
    serving: Serving, prompts: list[Prompt], policy: Path
) -> None:
    """AsyncLLM, as on GPUs: the actor lives on without its engine, and its calls do not come back."""
    pool = pool_with_engine_apart("rollout-async", serving, policy, timeout_s=20)
    await pool.ready()
    order = list(range(len(prompts)))
    before = await groups(pool, prompts, order)
    ended = []
    for restarts, end in enumerate((signal.SIGSTOP, signal.SIGKILL), start=1):
        pid = (await pool.stats())["rollout-async"]["pid"]
        (core,) = engine_cores(of=psutil.Process(pid))
        core.send_signal(end)
        after = await groups(pool, prompts, order)
        assert [tokens(group) for group in after] == [tokens(group) for group in before]
        assert pool.restarts == restarts
        await gone(pid)
        await gone(core.pid)
        ended.append((pid, core.pid))
    stacks = (Path(serving.config.run.dir) / "logs/rollout-async.stacks.txt").read_text()
    (hung, engine), (killed, _) = ended
    assert f"rollout-async, process {hung} on node" in stacks
    assert f"Process {engine}" in stacks  # which is what hangs
    assert f"process {killed} on node" not in stacks
    ray.kill(ray.get_actor("rollout-async"))


async def test_a_worker_whose_engine_is_killed_while_it_starts_is_started_again(serving: Serving, policy: Path) -> None:
    """At the very first start too, where an error of the engine's own would end the run."""
    ours = psutil.Process()
    before = engine_cores(ours)
    pool = pool_with_engine_apart("rollout-killed", serving, policy)
    ready = asyncio.create_task(pool.ready())
    while not (starting := engine_cores(ours) - before):
        assert not ready.done(), "it was up before it could be killed"
        await asyncio.sleep(0.05)
    for engine in starting:
        engine.kill()
    await ready
    assert pool.restarts == 1
    log = (Path(serving.config.run.dir) / "logs/rollout-killed.log").read_text()
    assert "vLLM's engine process was killed" in log
    ray.kill(ray.get_actor("rollout-killed"))
