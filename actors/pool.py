"""Worker pools: many actors behind the `Rollout` and `Judge` protocols of sppo_ray.protocols.

Only receipts come back here; groups stay references (Ray returns values below about 100 kB to the caller anyway, which is
cheap at that size). Workers may be added and removed while the pool is in use; actors/fleet.py does.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ray.actor import ActorHandle

from actors.weights import NAME as HUB
from actors.weights import Published
from actors.workers import Worker, Workers, call
from sppo_ray.config import Config
from sppo_ray.errors import SppoError, WeightSyncError, WorkerFailed
from sppo_ray.layout import Assignment
from sppo_ray.protocols import Handle
from sppo_ray.types import Prompt, Sampling

DRAIN_POLL_S = 0.1


class Pool:
    """The workers of one role, and how they come and go."""

    def __init__(self, workers: Mapping[str, ActorHandle]) -> None:
        self._workers = Workers(workers)
        self._changing = asyncio.Lock()  # who is in the pool, and which weights they serve

    @property
    def names(self) -> list[str]:
        """Workers that get calls, or will again after a restart."""
        return [worker.name for worker in self._workers.all]

    async def ready(self) -> None:
        """Returns when every worker serves; raises WorkerFailed for one that could not start."""
        await self._workers.on_each("ping")

    async def add(self, name: str, actor: ActorHandle) -> None:
        """Take a newcomer in once it serves. Raises WorkerFailed or WeightSyncError; it is not in the pool then."""
        await call(actor, name, "ping")  # minutes for a large model, in which the pool may go on loading weights
        async with self._changing:
            newcomer = Worker(name, actor)
            await self._prepare(newcomer)
            self._workers.all.append(newcomer)

    async def _prepare(self, newcomer: Worker) -> None:
        """What a newcomer needs before its first call."""

    async def remove(self, name: str) -> ActorHandle:
        """No new calls for a worker; returns its actor when its running ones are done. ValueError for the last worker."""
        async with self._changing:
            worker = self._workers.retire(name)
        while worker.load:
            await asyncio.sleep(DRAIN_POLL_S)
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
        self, config: Config, workers: Mapping[str, ActorHandle], hub: ActorHandle, all_at_once: bool = True
    ) -> None:
        """`workers` by actor name. all_at_once: `load` updates every worker at the same time, for where nobody samples
        meanwhile (sync, or workers that take turns with the learner); else a share of them, `weights.at_once`."""
        super().__init__(workers)
        self._in_flight = config.rollout.in_flight
        self._timeout_s = config.weights.timeout_s
        self._share = 1.0 if all_at_once else config.weights.at_once
        self._hub = hub

    @property
    def slots(self) -> int:
        up = sum(worker.up for worker in self._workers.all)
        return self._in_flight * max(1, up)  # while all restart, calls wait for the first that returns

    async def generate(
        self, prompt: Prompt, sampling: Sampling, iteration: int, epoch: int = 0, protected: bool = False
    ) -> Handle:
        return await self._workers.call_for_receipt("generate", prompt, sampling, iteration, epoch, protected)

    async def score(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> np.ndarray:
        logprobs: np.ndarray = await self._workers.call("score", prompt_ids, response_ids)
        return logprobs

    async def load(self, version: int) -> dict[str, dict[str, Any]]:
        """Returns version, checksum and seconds by worker. Each worker's own load has the time limit `weights.timeout_s`.

        Raises WeightSyncError naming each worker that does not serve the weights. If a later version is published
        meanwhile, the workers whose turn comes then take that one.
        """
        async with self._changing:
            await self._published(version)
            workers = list(self._workers.all)
            turns = asyncio.Semaphore(max(1, math.floor(self._share * len(workers))))

            async def in_turn(worker: Worker) -> dict[str, Any]:
                async with turns:
                    return await self._serve(worker, version)

            results = await asyncio.gather(*map(in_turn, workers), return_exceptions=True)
        _raise_together([result for result in results if isinstance(result, BaseException)])
        return {w.name: figures for w, figures in zip(workers, results, strict=True) if isinstance(figures, dict)}

    async def _prepare(self, newcomer: Worker) -> None:
        """It caught up with the hub when it started; what was published since would be missed."""
        published = await call(self._hub, HUB, "current")
        if published is not None:
            await self._serve(newcomer, published.version)

    async def _serve(self, worker: Worker, version: int) -> dict[str, Any]:
        """One worker's load of this version or a later one, with its figures."""
        if worker.returning is not None:  # a restart has a time limit of its own
            await asyncio.wait([worker.returning])
        began = time.perf_counter()
        worker.loading = True
        try:
            async with asyncio.timeout(self._timeout_s):
                published, checksum = await self._load_newest(worker, version)
        except TimeoutError:
            raise WeightSyncError(f"{worker.name}: no answer in {self._timeout_s:g} s") from None
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
                return published, await self._workers.on(worker, "load", published.version)
            except WorkerFailed:
                # Workers refuse a version that the hub holds no longer: the learner may have published in between.
                if (await self._published(version)).version == published.version:
                    raise

    async def _published(self, version: int) -> Published:
        """What the hub holds, which is at least `version`."""
        published: Published | None = await call(self._hub, HUB, "current")
        if published is None or published.version < version:
            has = "nothing" if published is None else f"version {published.version}"
            raise WeightSyncError(f"weights: version {version} was to be loaded but {has} is published")
        return published

    async def sleep(self) -> None:
        await self._workers.on_each("sleep")


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

    def __init__(self, config: Config, workers: Mapping[str, ActorHandle]) -> None:
        """`workers` by actor name. `config` is unused: both pools are built alike."""
        super().__init__(workers)

    async def judge(self, group: Handle) -> Handle:
        return await self._workers.call_for_receipt("judge", group.ref, group.receipt)

    async def score(self, source: str, candidates: Sequence[str]) -> np.ndarray:
        """Float32 [K, K] logits of any texts, for evaluation."""
        scores: np.ndarray = await self._workers.call("score", source, list(candidates))
        return scores
