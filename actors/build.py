"""From a config to a running system: which actors, in which order, with which resources and names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayError

from actors.bookkeepers import answered
from actors.buffer import NAME as BUFFER
from actors.buffer import BufferActor
from actors.buffer_client import BufferClient
from actors.judge import JudgeWorker
from actors.learner import NAME as LEARNER
from actors.learner import LearnerActor
from actors.learner_process import LearnerProcess
from actors.policy_folder import local_folder
from actors.pool import JudgePool, RolloutPool
from actors.process import JUDGE_KERNELS, KERNELS, environment
from actors.publish import publish_folder
from actors.rollout import RolloutWorker
from actors.stacks import Place
from actors.weights import NAME as HUB
from actors.weights import WeightsHub
from actors.workers import call, failure
from sppo_ray.config import Config
from sppo_ray.errors import GroupLost, WorkerFailed
from sppo_ray.evaluation import HeldOutEvaluator, Oracle
from sppo_ray.layout import Layout, RoleLayout, check_placement
from sppo_ray.protocols import Handle, System
from sppo_ray.scaling import ScaledRole
from sppo_ray.types import Prompt, ResponseGroup, TrainedIteration

LIGHT = RoleLayout(workers=1, gpus=0, cpus=0)  # actors that wait more than they work


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
    create: Callable[[ScaledRole, str], ActorHandle]  # one more rollout or judge worker, by role and name
    places: Mapping[str, Place]  # of the processes of buffer, hub and learner, by name

    @property
    def system(self) -> System:
        """What a schedule works with."""
        assert self.learner is not None, "started without a learner"
        return System(self.rollout, self.judge, self.buffer, self.learner, self.evaluator)

    @property
    def version(self) -> int:
        """Of the weights that the rollout workers begin with."""
        return self.done.version if self.done else 0


@asynccontextmanager
async def running(
    config: Config, layout: Layout, heldout: Sequence[Prompt], slices: Sequence[Sequence[Prompt]] | None
) -> AsyncIterator[Running]:
    """Start every actor, wait until all serve, and let the learner finish on the way out. The actors end with the driver's
    connection to Ray. slices: the prompts of each iteration; None: nothing is trained, and there is no learner."""
    hub = _actor(WeightsHub, HUB, config, LIGHT).remote(config)
    try:
        now = await _started(config, layout, heldout, slices, hub)
    except WorkerFailed:
        await answered(
            HUB, call(hub, HUB, "ping")
        )  # raises WorkerDied: without it no worker starts; that was the cause
        raise
    yield now
    if now.learner:
        await now.learner.join(timeout_s=120)


async def _started(
    config: Config,
    layout: Layout,
    heldout: Sequence[Prompt],
    slices: Sequence[Sequence[Prompt]] | None,
    hub: ActorHandle,
) -> Running:
    buffer = BufferClient(_actor(BufferActor, BUFFER, config, LIGHT).remote(config, _ids(slices)))
    done = await answered(BUFFER, buffer.last_trained(), patience_s=config.run.storage_patience_s)
    policy, version = (done.policy_dir, done.version) if done else (config.policy.model, 0)

    def create(role: ScaledRole, name: str) -> ActorHandle:
        if role == "rollout":
            return _actor(RolloutWorker, name, config, layout.rollout).remote(name, config, policy, version, HUB)
        return _actor(JudgeWorker, name, config, layout.judge).remote(name, config)

    # Rollouts, learner, judges, each when those before have their GPUs: on shared GPUs Ray's packing then gives one of each
    # per GPU. Where they take turns, the rollouts sleep while the learner loads, and get their weights back from the hub.
    rollouts = {name: create("rollout", name) for name in (f"rollout-{n}" for n in range(layout.rollout.workers))}
    at_once = config.schedule.mode == "sync"
    rollout = RolloutPool(config, rollouts, hub, at_once, partial(create, "rollout"), layout.takes_turns)
    if layout.takes_turns:
        await rollout.ready()
        await _publish_start(config, hub, policy, version)
        await rollout.sleep()
    learner = None
    if slices is not None:
        actor = _actor(LearnerActor, LEARNER, config, LIGHT).remote(config, layout, buffer.actor, hub)
        learner = LearnerProcess(actor, buffer.actor, config.learner.timeout_s)
    placed = await learner.placed() if learner and layout.gpus else []
    judges = {name: create("judge", name) for name in (f"judge-{n}" for n in range(layout.judge.workers))}
    judge = JudgePool(config, judges, create=partial(create, "judge"))
    await judge.ready()
    await rollout.ready()
    if layout.takes_turns:
        await rollout.load(version)
    if layout.gpus:
        check_placement(layout, [*await rollout.where(), *placed, *await judge.where()])
    evaluator = HeldOutEvaluator(config, heldout, rollout, judge, fetch, buffer.record, oracle_of(config))
    places = {HUB: await answered(HUB, call(hub, HUB, "ping")), BUFFER: await answered(BUFFER, buffer.ping())}
    if learner:
        places[LEARNER] = await answered(LEARNER, learner.ping())
    return Running(rollout, judge, buffer, evaluator, hub, learner, done, create, places)


async def _publish_start(config: Config, hub: ActorHandle, policy: str, version: int) -> None:
    """Raises WorkerDied if the hub is no more."""
    try:
        await asyncio.to_thread(publish_folder, config, hub, Path(local_folder(policy)), version)
    except RayError as error:
        raise failure(HUB, error) from error


def _ids(slices: Sequence[Sequence[Prompt]] | None) -> list[list[str]] | None:
    return None if slices is None else [[prompt.prompt_id for prompt in part] for part in slices]


def _actor(kind: type, name: str, config: Config, role: RoleLayout) -> Any:
    """An actor class with its name, resources and environment, ready for `.remote(...)`. Ray restarts none of them: the
    pools start their workers again."""
    kernels = JUDGE_KERNELS if kind is JudgeWorker else KERNELS
    return ray.remote(kind).options(
        name=name,
        num_cpus=role.cpus,
        num_gpus=role.gpus,
        max_restarts=0,
        runtime_env={"env_vars": environment(role.gpus > 0, config.cluster.threads, kernels)},
    )


async def fetch(handle: Handle) -> ResponseGroup:
    """The group itself, for evaluation. Raises GroupLost if it died with its node."""
    try:
        group: ResponseGroup = await handle.ref
    except ObjectLostError as error:
        raise GroupLost(f"a held-out group was lost before it was read: {error}") from error
    return group


def oracle_of(config: Config) -> Oracle | None:
    """The known rule of the domain, if it has one."""
    if config.evaluation.oracle == "tiny":
        from sppo_ray.tiny import oracle

        return oracle
    return None
