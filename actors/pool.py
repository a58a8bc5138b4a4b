"""Worker pools: many actors behind the `Rollout` and `Judge` protocols of sppo_ray.protocols.

Only receipts come back here; groups stay references (Ray returns values below about 100 kB to the caller anyway, which is
cheap at that size). Workers may be added and removed while the pool is in use; actors/fleet.py does.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from actors.revival import Worker, WorkerLost
from actors.weights import NAME as HUB
from actors.weights import Published
from actors.workers import Workers, call
from sppo_ray.config import Config
from sppo_ray.errors import SppoError, WeightSyncError, WorkerFailed
from sppo_ray.layout import Assignment
from sppo_ray.protocols import Handle
from sppo_ray.types import Prompt, Sampling

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.1

Create = Callable[[str], ActorHandle]  # a new actor of this name, as at the start of the run


class Pool:
    """The workers of one role, and how they come and go."""

    def __init__(
        self, config: Config, workers: Mapping[str, ActorHandle], create: Create | None, timeout_s: float
    ) -> None:
        """workers: by actor name. create: for those that die; None: none is started again. timeout_s: after which one that
        has calls and finishes none is taken for hung."""
        restarts, run_dir = config.cluster.max_restarts, config.run.dir
        self._workers = Workers(workers, create, self._rejoin, timeout_s, restarts, run_dir)
        self._changing = asyncio.Lock()  # who is in the pool, and which weights they serve

    @property
    def names(self) -> list[str]:
        """Workers that get calls, or will again after a restart."""
        return [worker.name for worker in self._workers.living]

    @property
    def restarts(self) -> int:
        """Times a worker was started again."""
        return self._workers.revival.restarts

    async def ready(self) -> None:
        """Returns when every worker serves; raises WorkerFailed for one that could not start."""
        await asyncio.gather(*map(self._workers.started, self._workers.all))

    async def add(self, name: str, actor: ActorHandle) -> None:
        """Take a newcomer in once it serves. Raises WorkerFailed or WeightSyncError; it is not in the pool then."""
        # Minutes for a large model, in which the pool may go on loading weights.
        place = await call(actor, name, "ping")
        newcomer = Worker(name, actor, place, member=False)
        async with self._changing:
            await self._prepare(newcomer)
            self._workers.join(newcomer)

    async def _rejoin(self, worker: Worker) -> None:
        """A worker that was started again: like a newcomer, and no publish may pass it by."""
        async with self._changing:
            await self._prepare(worker)
            worker.returning = None

    async def _prepare(self, newcomer: Worker) -> None:
        """What a newcomer needs before its first call."""

    async def remove(self, name: str) -> ActorHandle:
        """No new calls for a worker; returns its actor when its running ones are done. ValueError for the last worker."""
        async with self._changing:
            worker = self._workers.retire(name)
        while worker.load:
            await asyncio.sleep(DRAIN_POLL_S)
        self._workers.left(worker)
        return worker.handle

    async def where(self) -> list[Assignment]:
        """Where every worker is."""
        return list((await self._workers.on_each("where")).values())

    async def stats(self) -> dict[str, dict[str, Any]]:
        """RolloutWorker.stats or JudgeWorker.stats by worker."""
        return await self._workers.on_each("stats")


class RolloutPool(Pool):
    """`sppo_ray.protocols.Rollout` over RolloutWorker actors."""

    def __init__(
        self,
        config: Config,
        workers: Mapping[str, ActorHandle],
        hub: ActorHandle,
        all_at_once: bool = True,
        create: Create | None = None,
        takes_turns: bool = True,
    ) -> None:
        """all_at_once: `load` updates every worker at the same time, for where nobody samples meanwhile (sync, or workers
        that take turns with the learner); else a share of them, `weights.at_once`. takes_turns: `sleep` has something to
        do. The rest as in Pool."""
        super().__init__(config, workers, create, config.rollout.timeout_s)
        self._in_flight = config.rollout.in_flight
        self._timeout_s = config.weights.timeout_s
        self._share = 1.0 if all_at_once else config.weights.at_once
        self._hub, self._takes_turns = hub, takes_turns

    @property
    def slots(self) -> int:
        up = sum(worker.up for worker in self._workers.all)
        return self._in_flight * max(1, up)  # while all restart, calls wait for the first that returns

    @property
    def lost_groups(self) -> int:
        """Groups that a worker had when it died. They are sampled again."""
        return self._workers.lost_calls["generate"]

    async def generate(
        self, prompt: Prompt, sampling: Sampling, iteration: int, epoch: int = 0, protected: bool = False
    ) -> Handle:
        return await self._workers.call_for_receipt("generate", prompt, sampling, iteration, epoch, protected)

    async def score(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> tuple[np.ndarray, int]:
        scored: tuple[np.ndarray, int] = await self._workers.call("score", prompt_ids, response_ids)
        return scored

    async def load(self, version: int) -> dict[str, dict[str, Any]]:
        """Returns version, checksum and seconds by worker. Each worker's own load has the time limit `weights.timeout_s`.

        Raises WeightSyncError naming each worker that does not serve the weights. One that dies meanwhile, or does not
        answer in time, is left out, as are those that are gone or being started again: they load the newest weights before
        they are back. If a later version is published meanwhile, the workers whose turn comes then take that one.
        """
        async with self._changing:
            self._workers.refuse_if_all_gone()
            await self._published(version)
            workers = [worker for worker in self._workers.all if worker.up]
            turns = asyncio.Semaphore(max(1, math.floor(self._share * len(workers))))

            async def in_turn(worker: Worker) -> dict[str, Any] | None:
                async with turns:
                    return await self._serve(worker, version) if worker.up else None

            results = await asyncio.gather(*map(in_turn, workers), return_exceptions=True)
        errors = [result for result in results if isinstance(result, BaseException)]
        _raise_together([error for error in errors if not isinstance(error, WorkerLost)])
        loaded = {w.name: figures for w, figures in zip(workers, results, strict=True) if isinstance(figures, dict)}
        if absent := [worker.name for worker in self._workers.all if worker.name not in loaded]:
            logger.warning("version %d is served without %s", version, ", ".join(absent))
        return loaded

    async def _prepare(self, newcomer: Worker) -> None:
        """It caught up with the hub when it started; what was published since would be missed."""
        published = await self._current()
        if published is not None:
            await self._serve(newcomer, published.version)

    async def _serve(self, worker: Worker, version: int) -> dict[str, Any]:
        """One worker's load of this version or a later one, with its figures."""
        began = time.perf_counter()
        worker.loading = True
        try:
            published, checksum = await self._load_newest(worker, version)
        finally:
            worker.loading = False
        if checksum != published.checksum:
            raise WeightSyncError(
                f"{worker.name}: has checksum {checksum}, but version {published.version} was published with checksum "
                f"{published.checksum}"
            )
        return {"version": published.version, "checksum": checksum, "seconds": time.perf_counter() - began}

    async def _load_newest(self, worker: Worker, version: int) -> tuple[Published, str]:
        while True:
            published = await self._published(version)
            try:
                return published, await self._workers.once(worker, "load", published.version, limit_s=self._timeout_s)
            except WorkerLost:
                raise
            except WorkerFailed:
                # Workers refuse a version that the hub holds no longer: the learner may have published in between.
                if (await self._published(version)).version == published.version:
                    raise

    async def _published(self, version: int) -> Published:
        """What the hub holds, which is at least `version`."""
        published = await self._current()
        if published is None or published.version < version:
            has = "nothing" if published is None else f"version {published.version}"
            raise WeightSyncError(f"weights: version {version} was to be loaded but {has} is published")
        return published

    async def _current(self) -> Published | None:
        try:
            async with asyncio.timeout(self._timeout_s):
                published: Published | None = await call(self._hub, HUB, "current")
        except TimeoutError:
            raise WeightSyncError(f"{HUB}: no answer in {self._timeout_s:g} s") from None
        return published

    async def sleep(self) -> None:
        """Nothing may run: there is a time limit, `weights.timeout_s`, after which a worker is started again."""
        if self._takes_turns:
            # After its return, if one is being started again.
            await self._workers.on_each("sleep", limit_s=self._timeout_s)


def _raise_together(errors: Sequence[BaseException]) -> None:
    """One WeightSyncError of all workers' problems; anything that is not such a problem is raised as it is."""
    for error in errors:
        if not isinstance(error, SppoError):
            raise error
    if errors:
        failed = WeightSyncError("weights did not reach every worker. " + "; ".join(map(str, errors)))
        for note in (note for error in errors for note in getattr(error, "__notes__", ())):
            failed.add_note(note)  # the tracebacks inside the workers
        raise failed


class JudgePool(Pool):
    """`sppo_ray.protocols.Judge` over JudgeWorker actors."""

    def __init__(self, config: Config, workers: Mapping[str, ActorHandle], create: Create | None = None) -> None:
        super().__init__(config, workers, create, config.judge.timeout_s)

    async def judge(self, group: Handle) -> Handle:
        return await self._workers.call_for_receipt("judge", group.ref, group.receipt)

    async def score(self, source: str, candidates: Sequence[str]) -> np.ndarray:
        """Float32 [K, K] logits of any texts, for evaluation."""
        scores: np.ndarray = await self._workers.call("score", source, list(candidates))
        return scores
