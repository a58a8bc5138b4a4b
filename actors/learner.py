"""The learner: one long Ray Train run whose loop pulls its tasks from the buffer, and the driver's side of it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from actors.process import assignment, environment, redirect_output
from actors.workers import failure
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError, SppoError, WorkerFailed
from sppo_ray.layout import Assignment, Layout
from sppo_ray.types import (
    Publication,
    PublishTask,
    ReferenceTask,
    ResumePoint,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainTask,
)

NAME = "learner"
PROGRESS = "progress.json"


def learner_loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every rank: `_loop`, with the traceback noted on what it raises, which Ray Train loses.

    An error of our own, e.g. a non-finite loss, would come again: it ends the run instead of being tried again by Ray Train.
    """
    try:
        _loop(**settings)
    except LearnerError as error:
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(settings["buffer"].give_up.remote(f"{NAME}-0: {error}"))
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _loop(config: Config, buffer: Any, hub: Any, takes_turns: bool) -> None:
    """Rank 0 alone talks to the buffer and the hub (actor handles); all ranks do what it is told, in step."""
    # Imported here, in the worker: deepspeed and torch must see the worker's environment.
    from actors.policy_folder import local_folder
    from actors.ranks import Ranks
    from actors.trainer_engine import TrainingEngine

    redirect_output(config.run.dir, f"{NAME}-{ray.train.get_context().get_world_rank()}")
    ranks = Ranks.join()
    start = ranks.broadcast(ray.get(buffer.resume_point.remote()) if ranks.first else None)
    source = local_folder(start.policy_dir)
    engine = TrainingEngine(config, source, ranks, takes_turns)
    step = _resume_within_iteration(engine, start)
    outlet = _Outlet(config, buffer, hub, ranks, engine, source)
    engine.offload()
    placed = ranks.gather(assignment("learner", f"{NAME}-{ranks.rank}"))
    if ranks.first:
        ray.get(buffer.learner_ready.remote(placed))

    while True:
        task = ranks.broadcast(ray.get(buffer.next_task.remote(step)) if ranks.first else None)
        match task:
            case ReferenceTask(iteration, examples):
                engine.reload()
                logps = engine.reference(examples)
                if ranks.first:
                    ray.get(buffer.record_reference.remote(iteration, logps))
            case TrainTask():
                engine.reload()
                metrics = engine.step(task)
                step += 1
                if ranks.first:
                    ray.get(buffer.record_step.remote(metrics))
                # Counted like publishes, from the iteration's beginning: a checkpoint is of weights that were published.
                if (
                    config.learner.checkpoint_every
                    and (task.step_in_iteration + 1) % config.learner.checkpoint_every == 0
                ):
                    _report(engine, step, within_iteration=True)
            case PublishTask():
                engine.reload()
                outlet.publish(task)
            case SaveTask():
                engine.reload()
                outlet.save(task)
                _report(engine, step, within_iteration=False)
            case StopTask():
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

    def publish(self, task: PublishTask) -> None:
        """In the middle of a slice: the weights to the hub, and word of it to the buffer."""
        from actors.publish import publish

        probe = self.engine.probe(task.probe)
        started, tensors = time.perf_counter(), self.engine.consolidated_state()
        checksum = publish(self.config, self.hub, self.ranks, task.version, tensors, self.source)
        seconds = time.perf_counter() - started
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
            write_policy(folder, self.source, self.config.policy.dtype, tensors)
            started = time.perf_counter()
            checksum = publish_folder(self.config, self.hub, folder, task.version)
            seconds = time.perf_counter() - started
        else:
            for _ in tensors:  # take part in the gathering
                pass
        self.engine.offload()
        self.ranks.barrier()  # every rank has left its GPU before the rollouts are told to wake up
        if self.ranks.first:
            trained = TrainedIteration(task.iteration, task.version, task.step, checksum, str(folder))
            publication = Publication(task.version, task.step, task.iteration, True, checksum, seconds, probe)
            ray.get(self.buffer.saved.remote(trained, publication))


def _resume_within_iteration(engine: Any, start: ResumePoint) -> int:
    """The step to go on from: that of Ray Train's newest checkpoint if beyond the last iteration's end, and usable."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return start.step
    with checkpoint.as_directory() as folder:
        progress = json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8"))
        # DeepSpeed's state is of so many ranks at one stage; for others the iteration starts again from its beginning.
        beyond = start.up_to is not None and progress["step"] > start.up_to
        if progress["step"] <= start.step or beyond or progress["state_of"] != engine.state_kind:
            return start.step
        engine.load_checkpoint(Path(folder))
    return int(progress["step"])


def _report(engine: Any, step: int, within_iteration: bool) -> None:
    """Hand Ray Train a checkpoint, all ranks together. Only within an iteration does it hold DeepSpeed's state: at an
    iteration's end the policy folder is the checkpoint, and this one lets Ray Train drop the one before."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        progress = {"step": step, "state_of": engine.state_kind if within_iteration else None}
        (folder / PROGRESS).write_text(json.dumps(progress))
        if within_iteration:
            engine.save_checkpoint(folder)
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(temporary))


class LearnerActor:
    """Holds the Ray Train run, so that the learner has a name and a log of its own beside its ranks."""

    def __init__(self, config: Config, layout: Layout, buffer: Any, hub: Any) -> None:
        """buffer, hub: actor handles."""
        redirect_output(config.run.dir, NAME)
        self._ranks = f"{layout.learner.workers} ranks on {'gpu' if layout.learner.gpus else 'cpu'}"
        self._trainer = _trainer(config, layout, buffer, hub)

    def __repr__(self) -> str:
        return f"LearnerActor({NAME}, {self._ranks})"

    def fit(self) -> None:
        """Returns at the StopTask. Raises WorkerFailed with the failing rank's own error."""
        try:
            self._trainer.fit()
        except (TrainingFailedError, RayError) as error:
            raise WorkerFailed(describe_failure(error)) from None


class LearnerProcess:
    """The driver's side: `protocols.Learner` over the learner actor and the buffer, which knows what is trained."""

    def __init__(self, actor: Any, buffer: Any) -> None:
        """actor, buffer: handles of the LearnerActor and the buffer."""
        self._buffer = buffer
        self._fit = actor.fit.remote()

    async def placed(self) -> list[Assignment]:
        """Waits until every rank has loaded the policy (and offloaded it, where it takes turns). Raises WorkerFailed."""
        return await self._answer(self._buffer.learner_placed.remote(), "every rank was ready")

    async def train(self, iteration: int) -> TrainedIteration:
        """Raises LearnerError or WorkerFailed if the learner ends before the iteration's policy is published."""
        return await self._answer(self._buffer.train.remote(iteration), f"iteration {iteration} was trained")

    def check(self) -> None:
        """Raises WorkerFailed if the learner has failed."""
        if ray.wait([self._fit], timeout=0)[0]:
            _result(self._fit)

    async def join(self, timeout_s: float) -> None:
        """Wait until the learner is at its StopTask. Raises WorkerFailed if it failed, TimeoutError if it goes on."""
        await asyncio.to_thread(_result, self._fit, timeout_s)

    async def _answer(self, reference: Any, event: str) -> Any:
        """The buffer's answer, which comes with `event`, unless the learner ends first."""
        answer, fit = asyncio.ensure_future(_awaited(reference)), asyncio.ensure_future(_awaited(self._fit))
        try:
            await asyncio.wait([answer, fit], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                _result(self._fit)
                # It ended of itself: after its last iteration, or giving up, and the buffer has been told.
                await asyncio.wait([answer], timeout=30)
            if answer.done():
                return _result(reference)
            raise WorkerFailed(f"{NAME}: stopped before {event}")
        finally:
            answer.cancel()
            fit.cancel()


async def _awaited(reference: Any) -> Any:
    return await reference


def _result(reference: Any, timeout_s: float | None = None) -> Any:
    """What a finished call gave; our own errors as they were raised in the actor, Ray's as WorkerFailed."""
    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError:
        raise TimeoutError(f"{NAME}: still running after {timeout_s} s") from None
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, SppoError) else failure(NAME, error)) from None
    except RayError as error:
        raise failure(NAME, error) from error


def _trainer(config: Config, layout: Layout, buffer: Any, hub: Any) -> TorchTrainer:
    role, gpus = layout.learner, layout.learner.gpus > 0
    resources = {"CPU": role.cpus} | ({"GPU": role.gpus} if gpus else {})
    settings = {"config": config, "buffer": buffer, "hub": hub, "takes_turns": layout.takes_turns}
    return TorchTrainer(
        learner_loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=role.workers, use_gpu=gpus, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        run_config=RunConfig(
            name=NAME,
            storage_path=str(Path(config.run.dir).resolve() / "checkpoints"),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            # Without the second limit a cluster that can never hold the workers is asked for ever.
            failure_config=FailureConfig(max_failures=config.learner.max_restarts, controller_failure_limit=3),
            worker_runtime_env={"env_vars": environment(gpus, config.cluster.threads)},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def describe_failure(error: BaseException) -> str:
    """One text, the cause first: the traceback of the rank that failed by itself, before those that lost a peer."""
    if not isinstance(error, WorkerGroupError):
        return f"{NAME}: {error}"
    failures = sorted(error.worker_failures.items(), key=lambda item: (_lost_a_peer(item[1]), item[0]))
    if not failures:  # the group did not start, or was found hanging
        return f"{NAME}: {error}"
    rank, first = failures[0]
    notes = "\n".join(getattr(first, "__notes__", ()))
    others = ", ".join(f"{NAME}-{r}" for r, _ in failures[1:])
    return f"{NAME}-{rank}: {first}\n{notes}" + (f"Also failed: {others}." if others else "")


def _lost_a_peer(failure: BaseException) -> bool:
    text = str(failure)
    return not isinstance(failure, SppoError) and any(word in text for word in ("Connection closed by peer", "gloo"))
