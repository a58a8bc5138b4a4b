"""Worker pools: many actors behind the `Rollout` and `Judge` protocols of sppo_ray.protocols.

A call goes to the least loaded worker that is up. Only receipts come back here; groups stay references (Ray returns
values below about 100 kB to the caller anyway, which is cheap at that size). Generation and judging are deterministic, so
a call lost with its worker is simply made again, here or on the restarted worker: the group is the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from actors.weights import NAME as HUB
from sppo_ray.config import Config
from sppo_ray.errors import WeightSyncError, WorkerFailed
from sppo_ray.layout import Assignment
from sppo_ray.protocols import Handle
from sppo_ray.types import Prompt, Sampling

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # a call that three workers died of is taken for the cause of it
RESTART_LIMIT_S = 900.0  # for a worker to come back; loading a large model takes minutes
PATIENCE = 3  # refused pings before a worker is taken for gone: the first may still reach the process that died


class _Worker:
    """A worker as the driver sees it."""

    def __init__(self, name: str, handle: ActorHandle) -> None:
        self.name = name
        self.handle = handle
        self.load = 0  # calls in flight
        self.returning: asyncio.Task[None] | None = None  # while it restarts
        self.gone: BaseException | None = None  # why it never comes back

    @property
    def up(self) -> bool:
        return self.gone is None and self.returning is None


class _Workers:
    """Dispatch, failure and return of the workers of one role."""

    def __init__(self, handles: Mapping[str, ActorHandle]) -> None:
        if not handles:
            raise ValueError("a pool needs at least one worker")
        self.all = [_Worker(name, handle) for name, handle in handles.items()]

    async def call(self, method: str, *args: Any) -> Any:
        """Result of a call on some worker. Raises WorkerFailed, which begins with the worker's name."""
        return await self._attempt(lambda bound: bound.remote(*args), method)

    async def call_for_receipt(self, method: str, *args: Any) -> Handle:
        """For methods that return (data, receipt): the reference of the first, the second itself."""

        async def submit(bound: Any) -> Handle:
            data, receipt = bound.options(num_returns=2).remote(*args)
            return Handle(data, await receipt)

        return await self._attempt(submit, method)  # type: ignore[no-any-return]

    async def _attempt(self, submit: Any, method: str) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            worker = await self._least_loaded()
            worker.load += 1
            try:
                return await submit(getattr(worker.handle, method))
            except RayTaskError as error:  # first: one that carries a dead actor's error is not this worker's death
                raise failure(worker.name, error) from error
            except RayActorError as error:
                self.lost(worker, error)
                if attempt == ATTEMPTS:
                    raise WorkerFailed(
                        f"{worker.name}: the actor died in {method}, attempt {ATTEMPTS} of {ATTEMPTS} ({error}). "
                        f"Its log is logs/{worker.name}.log in the run directory."
                    ) from error
            except RayError as error:
                raise failure(worker.name, error) from error
            finally:
                worker.load -= 1
        raise AssertionError("unreachable")

    async def _least_loaded(self) -> _Worker:
        while True:
            ready = [worker for worker in self.all if worker.up]
            if ready:
                return min(ready, key=lambda worker: worker.load)
            returning = [worker.returning for worker in self.all if worker.returning is not None]
            if not returning:
                worker = self.all[0]
                raise WorkerFailed(
                    f"{worker.name}: the actor is dead and is not restarted, and no other worker is left ({worker.gone})"
                ) from worker.gone
            await asyncio.wait(returning, return_when=asyncio.FIRST_COMPLETED)

    def lost(self, worker: _Worker, error: BaseException) -> None:
        """Take a worker out until it answers again."""
        if worker.up:
            logger.warning("%s is lost (%s); waiting for its restart", worker.name, str(error).splitlines()[0])
            worker.returning = asyncio.create_task(self._until_it_returns(worker))

    async def _until_it_returns(self, worker: _Worker) -> None:
        """Ping until it serves (a rollout worker has then caught up with the hub) or is known to be gone."""
        deadline = asyncio.get_running_loop().time() + RESTART_LIMIT_S
        refused = 0
        try:
            while True:
                try:
                    await worker.handle.ping.remote()
                    logger.warning("%s is back", worker.name)
                    return
                except ActorUnavailableError as error:
                    last: RayError = error
                except ActorDiedError as error:
                    last, refused = error, refused + 1
                except RayError as error:
                    last, refused = error, PATIENCE  # it answers, but cannot serve
                if refused >= PATIENCE or asyncio.get_running_loop().time() > deadline:
                    worker.gone = last
                    logger.error("%s does not come back: %s", worker.name, last)
                    return
                await asyncio.sleep(0.5)
        finally:
            worker.returning = None

    async def on_each(self, method: str, *args: Any) -> dict[str, Any]:
        """The method's result on every worker, by name. Raises WorkerFailed."""
        results = await asyncio.gather(*(self.on(worker, method, *args) for worker in self.all))
        return dict(zip((worker.name for worker in self.all), results, strict=True))

    async def on(self, worker: _Worker, method: str, *args: Any) -> Any:
        """A call on this very worker; tried once more after its restart."""
        for last_try in (False, True):
            if worker.returning is not None:
                await asyncio.wait([worker.returning])
            if worker.gone is not None:
                raise failure(worker.name, worker.gone) from worker.gone
            try:
                return await getattr(worker.handle, method).remote(*args)
            except RayTaskError as error:
                raise failure(worker.name, error) from error
            except RayActorError as error:
                self.lost(worker, error)
                if last_try:
                    raise failure(worker.name, error) from error
            except RayError as error:
                raise failure(worker.name, error) from error
        raise AssertionError("unreachable")


def failure(name: str, error: BaseException) -> WorkerFailed:
    """What the user reads: the actor's name, then its own error, then (as a note) the traceback inside the actor."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = str(cause).strip()
    text = text.removeprefix(f"{name}:").strip()  # errors of rollout workers begin with their name already
    failed = WorkerFailed(f"{name}: {type(cause).__name__}: {text}")
    if isinstance(error, RayTaskError):
        failed.add_note(str(error))
    return failed


async def call(actor: ActorHandle, name: str, method: str, *args: Any) -> Any:
    """One call on one actor, not tried again. Raises WorkerFailed, which begins with `name`."""
    try:
        return await getattr(actor, method).remote(*args)
    except RayError as error:
        raise failure(name, error) from error


class RolloutPool:
    """`sppo_ray.protocols.Rollout` over RolloutWorker actors."""

    def __init__(self, config: Config, workers: Mapping[str, ActorHandle], hub: ActorHandle) -> None:
        """`workers` by actor name."""
        self._timeout_s = config.weights.timeout_s
        self._workers = _Workers(workers)
        self._hub = hub

    async def ready(self) -> None:
        """Returns when every worker serves; raises WorkerFailed for one that could not start."""
        await self._workers.on_each("ping")

    async def generate(self, prompt: Prompt, sampling: Sampling, iteration: int) -> Handle:
        return await self._workers.call_for_receipt("generate", prompt, sampling, iteration)

    async def load(self, version: int) -> None:
        """All workers at once, within the time limit. Raises WeightSyncError naming each worker that does not serve it."""
        published = await call(self._hub, HUB, "current")
        if published is None or published.version != version:
            has = "nothing" if published is None else f"version {published.version}"
            raise WeightSyncError(f"weights: version {version} was to be loaded but {has} is published")
        checksums = await self._within_limit({w.name: self._workers.on(w, "load", version) for w in self._workers.all})
        wrong = [f"{name} has {got}" for name, got in checksums.items() if got != published.checksum]
        if wrong:
            raise WeightSyncError(
                f"weights version {version} was published with checksum {published.checksum}, but {', '.join(wrong)}"
            )

    async def _within_limit(self, calls: Mapping[str, Awaitable[str]]) -> dict[str, str]:
        tasks = {name: asyncio.ensure_future(call) for name, call in calls.items()}
        try:
            _, late = await asyncio.wait(tasks.values(), timeout=self._timeout_s)
        finally:
            for task in tasks.values():
                task.cancel()  # nothing for those that are done
        problems = [f"{name}: no answer in {self._timeout_s:g} s" for name, task in tasks.items() if task in late]
        finished = {name: task for name, task in tasks.items() if task not in late}
        errors = [error for task in finished.values() if (error := task.exception()) is not None]
        problems += [str(error) for error in errors]
        if problems:
            failed = WeightSyncError("weights did not reach every worker. " + "; ".join(problems))
            for note in (note for error in errors for note in getattr(error, "__notes__", ())):
                failed.add_note(note)  # the tracebacks inside the workers
            raise failed
        return {name: task.result() for name, task in finished.items()}

    async def sleep(self) -> None:
        await self._workers.on_each("sleep")

    async def where(self) -> list[Assignment]:
        """Where every worker is."""
        return list((await self._workers.on_each("where")).values())

    async def stats(self) -> dict[str, dict[str, Any]]:
        """RolloutWorker.stats by worker."""
        return await self._workers.on_each("stats")


class JudgePool:
    """`sppo_ray.protocols.Judge` over JudgeWorker actors."""

    def __init__(self, config: Config, workers: Mapping[str, ActorHandle]) -> None:
        """`workers` by actor name. `config` is unused: both pools are built alike."""
        self._workers = _Workers(workers)

    async def ready(self) -> None:
        """Returns when every worker serves; raises WorkerFailed for one that could not start."""
        await self._workers.on_each("ping")

    async def judge(self, group: Handle) -> Handle:
        return await self._workers.call_for_receipt("judge", group.ref, group.receipt)

    async def score(self, source: str, candidates: Sequence[str]) -> np.ndarray:
        """Float32 [K, K] logits of any texts, for evaluation."""
        scores: np.ndarray = await self._workers.call("score", source, list(candidates))
        return scores

    async def where(self) -> list[Assignment]:
        """Where every worker is."""
        return list((await self._workers.on_each("where")).values())

    async def stats(self) -> dict[str, dict[str, Any]]:
        """JudgeWorker.stats by worker."""
        return await self._workers.on_each("stats")
