"""The learner: one long Ray Train run whose loop pulls its tasks from the buffer. The driver's side of it is in
`learner_process.py`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import secrets
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from actors import stacks
from actors.cleaner import use_ending_cleaner
from actors.learner_failures import NAME, FirstCause, Teller, describe_failure
from actors.process import assignment, begin, environment
from actors.rank_pulse import Member, Watchman, start_pulse
from actors.ranks import Ranks, Way, key_of
from actors.train_reports import place, report
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError, WorkerDied
from sppo_ray.layout import Layout
from sppo_ray.rank_watch import Place
from sppo_ray.storage import Storage, StorageError
from sppo_ray.types import (
    Publication,
    PublishTask,
    ReferenceTask,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainTask,
)

# Collectives give up by themselves so much later than the watchman, who names the rank: if he himself is gone.
COLLECTIVE_GRACE_S = 60
POLL_S = 0.5  # in which Ray Train takes one report, and hears of a rank that ended
LOOK_LIMIT_S = 30.0  # for the buffer to say how far the run is
logger = logging.getLogger(__name__)


def learner_loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every rank: `_loop`, with the traceback noted on what it raises, which Ray Train loses.

    An error of our own, e.g. a non-finite loss, would come again: it ends the run instead of being tried again by Ray Train.
    """
    try:
        _loop(**settings)
    except (LearnerError, StorageError) as error:
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(settings["buffer"].give_up.remote(f"{NAME}-0: {error}"))
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _loop(config: Config, buffer: Any, hub: Any, watcher: Any, takes_turns: bool) -> None:
    """Rank 0 alone talks to the buffer and the hub (actor handles); all ranks do what it is told, in step."""
    rank, way = ray.train.get_context().get_world_rank(), Way()
    start_pulse(rank, way, watcher, config.learner.timeout_s)
    begin(config.run.dir, f"{NAME}-{rank}")
    # Imported here, in the worker: deepspeed and torch must see the worker's environment.
    from actors.checkpoint import Checkpoints
    from actors.policy_folder import local_folder
    from actors.trainer_engine import TrainingEngine

    way.at("joining the other ranks")
    group = ray.get_runtime_context().get_placement_group_id()
    ranks = replace(Ranks.join(ray.get(watcher.ranks_key.remote(group))), way=way)
    ranks.way.at("waiting for the buffer", limited=False)
    start = ranks.broadcast(ray.get(buffer.resume_point.remote()) if ranks.first else None)
    source = local_folder(start.policy_dir)
    ranks.way.at("loading the policy", start.step)
    engine = TrainingEngine(config, source, ranks, takes_turns)

    def hear(trouble: str) -> None:
        buffer.report_trouble.remote(f"{NAME}-{ranks.rank}", trouble)

    storage = Storage(config.run.storage_patience_s, hear)
    checkpoints = Checkpoints(config, ranks, engine.state, storage, report)
    step = checkpoints.resume(start)
    outlet = _Outlet(config, buffer, hub, ranks, engine, source, storage)
    engine.offload()
    placed = ranks.gather(assignment("learner", f"{NAME}-{ranks.rank}"))
    if ranks.first:
        ray.get(buffer.learner_ready.remote(placed))
    _work(outlet, checkpoints, step)


def _work(outlet: _Outlet, checkpoints: Any, step: int) -> None:
    """One task after the other, from `step` updates on, until there are none."""
    config, buffer, ranks, engine = outlet.config, outlet.buffer, outlet.ranks, outlet.engine
    while True:
        ranks.way.at("waiting for the buffer", step, limited=False)
        task = ranks.broadcast(ray.get(buffer.next_task.remote(step)) if ranks.first else None)
        ranks.way.at(f"beginning its {type(task).__name__}")
        match task:
            case ReferenceTask(iteration, examples):
                engine.reload()
                logps = engine.reference(examples)
                ranks.way.at("recording the reference", limited=False)
                if ranks.first:
                    ray.get(buffer.record_reference.remote(iteration, logps))
            case TrainTask():
                engine.reload()
                metrics = engine.step(task)
                step += 1
                ranks.way.at("recording the step", step, limited=False)
                if ranks.first:
                    ray.get(buffer.record_step.remote(metrics))
                every = config.learner.checkpoint_every
                # Counted like publishes, from the iteration's beginning: a checkpoint is of weights that were published.
                if every and (task.step_in_iteration + 1) % every == 0:
                    checkpoints.save(task)
            case PublishTask():
                engine.reload()
                outlet.publish(task)
            case SaveTask():
                engine.reload()
                outlet.save(task)
                checkpoints.iteration_ended()
            case StopTask():
                ranks.way.at("the end", limited=False)
                return


@dataclass(frozen=True, slots=True)
class _Outlet:
    """The way of one rank's weights out of the learner. Collective: all ranks call the same, rank 0 tells the others."""

    config: Config
    buffer: Any
    hub: Any
    ranks: Any
    engine: Any
    source: str  # folder the policy was started from
    storage: Storage

    def publish(self, task: PublishTask) -> None:
        """In the middle of a slice: the weights to the hub, and word of it to the buffer."""
        from actors.publish import publish

        probe = self.engine.probe(task.probe)
        started, tensors = time.perf_counter(), self.engine.consolidated_state()
        checksum = publish(self.config, self.hub, self.ranks, task.version, tensors, self.source, self.storage)
        seconds = time.perf_counter() - started
        self.ranks.way.at("recording the publish", limited=False)
        if self.ranks.first:
            publication = Publication(task.version, task.step, task.iteration, False, checksum, seconds, probe)
            ray.get(self.buffer.published.remote(publication))

    def save(self, task: SaveTask) -> None:
        """At the end of a slice: the policy to its folder, from there to the hub, and word of it to the buffer. Leaves the
        engine offloaded."""
        from actors.policy_folder import write_policy
        from actors.publish import publish_folder

        probe = self.engine.probe(task.probe)
        folder = Path(self.config.run.dir) / f"iter_{task.iteration}" / "policy"
        tensors, checksum, seconds = self.engine.consolidated_state(), "", 0.0
        if self.ranks.first:
            write_policy(folder, self.source, self.config.policy.dtype, tensors, self.storage)
            started = time.perf_counter()
            checksum = publish_folder(self.config, self.hub, folder, task.version)
            seconds = time.perf_counter() - started
        else:
            for _ in tensors:  # take part in the gathering
                pass
        self.engine.offload()
        self.ranks.barrier()  # every rank has left its GPU before the rollouts are told to wake up
        self.ranks.way.at("recording the publish", limited=False)
        if self.ranks.first:
            trained = TrainedIteration(task.iteration, task.version, task.step, checksum, str(folder))
            publication = Publication(task.version, task.step, task.iteration, True, checksum, seconds, probe)
            ray.get(self.buffer.saved.remote(trained, publication))
        report(self.ranks, task.step, folder)


class LearnerActor:
    """Holds the Ray Train run, so that the learner has a name and a log of its own beside its ranks, over which it watches.
    Async actor."""

    def __init__(self, config: Config, layout: Layout, buffer: Any, hub: Any) -> None:
        """buffer, hub: actor handles."""
        self._ranks = f"{layout.learner.workers} ranks on {'gpu' if layout.learner.gpus else 'cpu'}"
        begin(config.run.dir, NAME)
        self._watchman, self._cause = Watchman(config.learner.timeout_s, config.run.dir), FirstCause()
        self._buffer, self._ranks_secret = buffer, secrets.token_bytes(32)
        # Ray Train ends ranks that do not answer, but names none: not before the watchman has.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.learner.timeout_s + COLLECTIVE_GRACE_S)
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = str(POLL_S)
        use_ending_cleaner()
        watcher = ray.get_runtime_context().current_actor
        self._trainer = _trainer(config, layout, {"buffer": buffer, "hub": hub, "watcher": watcher})

    def __repr__(self) -> str:
        return f"LearnerActor({NAME}, {self._ranks})"

    async def ping(self) -> stacks.Place:
        """Where its process is: that it is there."""
        return stacks.here()

    async def ranks_key(self, group: str) -> bytes:
        """That of the ranks' messages to each other. group: a name for all that were started together, as in `Member`."""
        return key_of(self._ranks_secret, group)

    async def beat(self, member: Member, place: Place) -> None:
        """A rank's sign of life."""
        self._watchman.heard(member, place)

    async def failed(self, ranks: str) -> None:
        """From Ray Train's controller, before it starts the ranks again."""
        logger.error("%s", text := self._with_hung(ranks))
        self._cause.failed(text, await self._updates())

    async def _updates(self) -> int:
        """Done in the run, as far as the buffer that is there now has heard of them."""
        try:
            async with asyncio.timeout(LOOK_LIMIT_S):
                look = await self._buffer.look.remote()
        except (RayError, TimeoutError):  # the buffer died: all actors are about to be started again
            return 0
        return int(look.step.get("step", 0))

    def _with_hung(self, failure: str) -> str:
        return "\n".join(filter(None, [self._watchman.said, failure]))

    async def fit(self) -> None:
        """Returns at the StopTask. Raises WorkerDied with the failing rank's own error, or the names of those that hung; of
        failures that followed each other without an update between them, with the first."""
        try:
            await self._watchman.over(asyncio.to_thread(self._train))
        except (TrainingFailedError, RayError) as error:
            last = self._with_hung(describe_failure(error))
            raise WorkerDied(self._cause.of(last, await self._updates())) from None

    def _train(self) -> None:
        result = self._trainer.fit()
        logger.info("Ray Train ended; the last checkpoint reported to it: %s", result.checkpoint)


def _trainer(config: Config, layout: Layout, handles: dict[str, Any]) -> TorchTrainer:
    role, gpus = layout.learner, layout.learner.gpus > 0
    resources = {"CPU": role.cpus} | ({"GPU": role.gpus} if gpus else {})
    settings = {"config": config, "takes_turns": layout.takes_turns} | handles
    collectives_s = math.ceil(config.learner.timeout_s) + COLLECTIVE_GRACE_S
    return TorchTrainer(
        learner_loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=role.workers, use_gpu=gpus, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=collectives_s),
        run_config=RunConfig(
            **place(config.run.dir),
            # Without the second limit a cluster that can never hold the workers is asked for ever.
            failure_config=FailureConfig(max_failures=config.learner.max_restarts, controller_failure_limit=3),
            callbacks=[Teller(handles["watcher"])],
            worker_runtime_env={"env_vars": environment(gpus, config.cluster.threads)},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
