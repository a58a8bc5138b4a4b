"""The learner: one long Ray Train run whose loop pulls its tasks from the buffer, and the driver's side of it."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from actors.process import assignment, environment, redirect_output
from sppo_ray.config import Config
from sppo_ray.errors import SppoError, WorkerFailed
from sppo_ray.layout import Assignment, Layout
from sppo_ray.types import ReferenceTask, SaveTask, StopTask, TrainedIteration, TrainTask

NAME = "learner"
PROGRESS = "progress.json"


def learner_loop(settings: dict[str, Any]) -> None:
    """What Ray Train calls on every rank: `_loop`, with the traceback noted on what it raises, which Ray Train loses."""
    try:
        _loop(**settings)
    except Exception as error:
        error.add_note(traceback.format_exc())
        raise


def _loop(config: Config, buffer: Any, hub: Any, takes_turns: bool) -> None:
    """Rank 0 alone talks to the buffer and the hub (actor handles); all ranks do what it is told, in step."""
    # Imported here, in the worker: deepspeed and torch must see the worker's environment.
    from actors.policy_folder import local_folder, publish_policy, write_policy
    from actors.ranks import Ranks
    from actors.trainer_engine import TrainingEngine

    redirect_output(config.run.dir, f"{NAME}-{ray.train.get_context().get_world_rank()}")
    ranks = Ranks.join()
    start = ranks.broadcast(ray.get(buffer.resume_point.remote()) if ranks.first else None)
    source = local_folder(start.policy_dir)
    engine = TrainingEngine(config, source, ranks, takes_turns)
    step = _resume_within_iteration(engine, start.step)
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
                if config.learner.checkpoint_every and step % config.learner.checkpoint_every == 0:
                    _report(engine, step, within_iteration=True)
            case SaveTask(iteration=iteration, version=version):
                folder = Path(config.run.dir) / f"iter_{iteration}" / "policy"
                tensors = engine.consolidated_state()
                if ranks.first:
                    write_policy(folder, source, config.policy.dtype, tensors)
                    checksum = publish_policy(hub, folder, version, config.weights.chunk_mb << 20)
                else:
                    for _ in tensors:  # take part in the gathering
                        pass
                engine.offload()  # before the rollouts are told to wake up
                if ranks.first:
                    trained = TrainedIteration(iteration, version, step, checksum, str(folder))
                    ray.get(buffer.saved.remote(trained))
                _report(engine, step, within_iteration=False)
            case StopTask():
                return


def _resume_within_iteration(engine: Any, step: int) -> int:
    """The step to go on from: that of Ray Train's newest checkpoint if beyond `step`, the last iteration's end."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return step
    with checkpoint.as_directory() as folder:
        progress = json.loads((Path(folder) / PROGRESS).read_text(encoding="utf-8"))
        if progress["step"] <= step or not progress["within_iteration"]:
            return step
        engine.load_checkpoint(Path(folder))
    return int(progress["step"])


def _report(engine: Any, step: int, within_iteration: bool) -> None:
    """Hand Ray Train a checkpoint, all ranks together. Only within an iteration does it hold DeepSpeed's state: at an
    iteration's end the policy folder is the checkpoint, and this one lets Ray Train drop the one before."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / PROGRESS).write_text(json.dumps({"step": step, "within_iteration": within_iteration}))
        if within_iteration:
            engine.save_checkpoint(folder)
        ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(temporary))


class LearnerProcess:
    """The driver's side: starts the run in a thread, waits for iterations, tells what went wrong."""

    def __init__(self, config: Config, layout: Layout, buffer: Any, hub: Any) -> None:
        """buffer, hub: actor handles."""
        self._buffer = buffer
        self._trainer = _trainer(config, layout, buffer, hub)
        self._failure: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._fit, name=NAME, daemon=True)
        self._thread.start()

    async def placed(self) -> list[Assignment]:
        """Waits until every rank has loaded the policy (and offloaded it, where it takes turns). Raises WorkerFailed."""
        return await self._answer(self._buffer.learner_placed.remote(), "every rank was ready")

    async def trained(self, iteration: int) -> TrainedIteration:
        """Waits until the iteration's policy is saved and published. Raises WorkerFailed if the learner ends before."""
        return await self._answer(self._buffer.trained.remote(iteration), f"iteration {iteration} was trained")

    def check(self) -> None:
        """Raises WorkerFailed if the learner has failed."""
        if self._failure is not None:
            raise WorkerFailed(describe_failure(self._failure)) from self._failure

    async def _answer(self, reference: Any, event: str) -> Any:
        """The buffer's answer, which comes with `event`, unless the learner ends first."""
        done = asyncio.ensure_future(_awaited(reference))
        try:
            while not self._ended.is_set():
                finished, _ = await asyncio.wait([done], timeout=0.5)
                if finished:
                    return done.result()
            # It ended: with a failure, or of itself after its last iteration, which the buffer then knows of.
            if not done.done():
                self.check()
            try:
                return await asyncio.wait_for(done, timeout=30)
            except TimeoutError:
                raise WorkerFailed(f"{NAME}: stopped before {event}") from None
        finally:
            done.cancel()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the learner is at its StopTask. Raises WorkerFailed if it failed, TimeoutError if it goes on."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"{NAME}: still running after {timeout} s")
        self.check()

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # noqa: BLE001 - kept for, and raised in, the thread that waits
            self._failure = error
        finally:
            self._ended.set()


async def _awaited(reference: Any) -> Any:
    return await reference


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
