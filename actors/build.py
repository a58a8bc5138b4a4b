"""From a config to a running system: which actors, in which order, with which resources and names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.buffer import NAME as BUFFER
from actors.buffer import BufferActor
from actors.judge import JudgeWorker
from actors.learner import NAME as LEARNER
from actors.learner import LearnerActor, LearnerProcess
from actors.policy_folder import local_folder, publish_policy
from actors.pool import JudgePool, RolloutPool, call
from actors.process import environment
from actors.rollout import RolloutWorker
from actors.weights import NAME as HUB
from actors.weights import WeightsHub
from sppo_ray.config import Config
from sppo_ray.evaluation import HeldOutEvaluator, Oracle
from sppo_ray.layout import Layout, RoleLayout, check_placement
from sppo_ray.protocols import Handle, System
from sppo_ray.types import Prompt, ResponseGroup, SliceSummary, TrainedIteration

RESTARTS = 3  # of a rollout or judge worker, by Ray; past it the run fails with the worker's error
LIGHT = RoleLayout(workers=1, gpus=0, cpus=0)  # actors that wait more than they work


class BufferClient:
    """`protocols.Buffer` over the buffer actor, and the driver's way to its record."""

    def __init__(self, actor: ActorHandle) -> None:
        self.actor = actor

    async def held(self, iteration: int) -> frozenset[str]:
        return await call(self.actor, BUFFER, "held", iteration)

    async def add(self, judged: Handle) -> None:
        await call(self.actor, BUFFER, "add", judged.ref, judged.receipt)

    async def seal(self, iteration: int, prompt_ids: Sequence[str]) -> SliceSummary:
        return await call(self.actor, BUFFER, "seal", iteration, prompt_ids)

    async def last_trained(self) -> TrainedIteration | None:
        return await call(self.actor, BUFFER, "last_trained")

    async def record(self, line: Mapping[str, Any]) -> bool:
        return await call(self.actor, BUFFER, "record", line)

    async def last_step(self) -> Mapping[str, Any]:
        return await call(self.actor, BUFFER, "last_step")


@dataclass(frozen=True, slots=True)
class Running:
    """The running parts."""

    rollout: RolloutPool
    judge: JudgePool
    buffer: BufferClient
    evaluator: HeldOutEvaluator
    hub: ActorHandle
    learner: LearnerProcess | None  # None where nothing is trained
    done: TrainedIteration | None  # the last iteration trained before; the rollout workers serve its policy

    @property
    def system(self) -> System:
        """What a schedule works with."""
        assert self.learner is not None, "started without a learner"
        return System(self.rollout, self.judge, self.buffer, self.learner, self.evaluator)


@asynccontextmanager
async def running(
    config: Config, layout: Layout, heldout: Sequence[Prompt], learn: bool = True
) -> AsyncIterator[Running]:
    """Start every actor (`learn`: the learner too), wait until all serve, and let the learner finish on the way out.
    The actors end with the driver's connection to Ray."""
    buffer = BufferClient(_actor(BufferActor, BUFFER, config, LIGHT).remote(config))
    hub = _actor(WeightsHub, HUB, config, LIGHT).remote(config)
    done = await buffer.last_trained()
    policy, version = (done.policy_dir, done.version) if done else (config.policy.model, 0)

    # Rollouts, learner, judges, each when those before have their GPUs: on shared GPUs Ray's packing then gives one of each
    # per GPU. Where they take turns, the rollouts sleep while the learner loads, and get their weights back from the hub.
    rollouts = {
        name: _actor(RolloutWorker, name, config, layout.rollout).remote(name, config, policy, version, HUB)
        for name in (f"rollout-{n}" for n in range(layout.rollout.workers))
    }
    rollout = RolloutPool(config, rollouts, hub)
    if layout.takes_turns:
        await rollout.ready()
        await asyncio.to_thread(publish_policy, hub, Path(local_folder(policy)), version, config.weights.chunk_mb << 20)
        await rollout.sleep()
    learner = None
    if learn:
        actor = _actor(LearnerActor, LEARNER, config, LIGHT).remote(config, layout, buffer.actor, hub)
        learner = LearnerProcess(actor, buffer.actor)
    placed = await learner.placed() if learner and layout.gpus else []
    judges = {
        name: _actor(JudgeWorker, name, config, layout.judge).remote(name, config)
        for name in (f"judge-{n}" for n in range(layout.judge.workers))
    }
    judge = JudgePool(config, judges)
    await judge.ready()
    await rollout.ready()
    if layout.takes_turns:
        await rollout.load(version)
    if layout.gpus:
        check_placement(layout, [*await rollout.where(), *placed, *await judge.where()])
    evaluator = HeldOutEvaluator(config, heldout, rollout, judge, fetch, buffer.record, oracle_of(config))
    yield Running(rollout, judge, buffer, evaluator, hub, learner, done)
    if learner:
        await learner.join(timeout_s=120)


def _actor(kind: type, name: str, config: Config, role: RoleLayout) -> Any:
    """An actor class with its name, resources and environment, ready for `.remote(...)`."""
    return ray.remote(kind).options(
        name=name,
        num_cpus=role.cpus,
        num_gpus=role.gpus,
        max_restarts=0 if role is LIGHT else RESTARTS,
        runtime_env={"env_vars": environment(gpus=role.gpus > 0, threads=config.cluster.threads)},
    )


async def fetch(handle: Handle) -> ResponseGroup:
    """The group itself, for evaluation."""
    group: ResponseGroup = await handle.ref
    return group


def oracle_of(config: Config) -> Oracle | None:
    """The known rule of the domain, if it has one."""
    if config.evaluation.oracle == "tiny":
        from sppo_ray.tiny import oracle

        return oracle
    return None
