"""The rollout and judge workers as `protocols.Rollout` and `protocols.Judge`, with the pools' rules: least loaded first, an
update of the weights a few workers at a time, `weights.pause` as in actors/pause.py; but all groups of a worker are in its
engine and drained with it, where the real one drains only those that found a place."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sppo_ray.config import Config
from sppo_ray.errors import GroupAborted
from sppo_ray.protocols import Handle
from sppo_ray.seeds import derive
from sppo_ray.simulation.gpu import Engine, Gpu, Queue
from sppo_ray.simulation.rates import RateCard
from sppo_ray.simulation.workload import Workload
from sppo_ray.types import JudgedGroup, Prompt, Receipt, Response, ResponseGroup, Sampling


class RolloutWorker:
    def __init__(self, name: str, gpu: Gpu, card: RateCard, config: Config) -> None:
        self.name, self.pause = name, config.weights.pause
        self.engine = Engine(gpu, card, config.rollout.max_num_seqs)
        self.version = 0
        self.loading = False
        self.load = 0  # calls in flight
        self.updating_s = 0.0  # spent on new weights, drained
        self._open = asyncio.Event()
        self._open.set()
        self._inside: dict[asyncio.Task[None], bool] = {}  # task -> must finish

    async def generate(self, prompt_tokens: int, lengths: Sequence[int], protected: bool) -> int:
        """The version the group is sampled from (its oldest). Raises GroupAborted."""
        while not self._open.is_set():
            await self._open.wait()
        version = self.version
        task = asyncio.create_task(self.engine.sample(prompt_tokens, lengths))
        self._inside[task] = protected and self.pause != "keep"
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise GroupAborted(self.name)
            return version
        finally:
            del self._inside[task]

    async def update(self, version: int, seconds: float) -> None:
        self._open.clear()
        if self.pause == "abort":
            for task, must_finish in self._inside.items():
                if not must_finish:
                    task.cancel()
        if self.pause == "keep":
            self.engine.hold(True)
        await self.drained(everything=self.pause != "keep")
        await asyncio.sleep(seconds)
        self.updating_s += seconds
        self.version = version
        self.engine.hold(False)
        self._open.set()

    async def drained(self, everything: bool = True) -> None:
        while waited := [task for task, must_finish in self._inside.items() if everything or must_finish]:
            await asyncio.wait(waited)
            await asyncio.sleep(0)  # their callers leave


class RolloutPool:
    def __init__(self, config: Config, card: RateCard, workers: Sequence[RolloutWorker], work: Workload) -> None:
        self.config, self.card, self.workers, self._work = config, card, workers, work
        self.takes_turns = config.cluster.layout == "colocated"
        self.hub = 0  # newest published version
        share = 1.0 if config.schedule.mode == "sync" else config.weights.at_once
        self._at_once = max(1, math.floor(share * len(workers)))

    @property
    def slots(self) -> int:
        return self.config.rollout.in_flight * len(self.workers)

    async def generate(
        self, prompt: Prompt, sampling: Sampling, iteration: int, epoch: int = 0, protected: bool = False
    ) -> Handle:
        lengths = self._work.of(prompt.prompt_id, epoch)
        worker = min(self.workers, key=lambda w: (w.loading, w.load))
        worker.load += 1
        try:
            version = await worker.generate(int(prompt.token_ids[0]), lengths.tolist(), protected)
        finally:
            worker.load -= 1
        group = ResponseGroup(prompt, iteration, _responses(lengths), version, version, worker.name, epoch)
        return Handle(group, Receipt(prompt.prompt_id, worker.name, int(lengths.sum()), 0, version, iteration, epoch))

    async def load(self, version: int) -> dict[str, Any]:
        turns = asyncio.Semaphore(self._at_once)

        async def in_turn(worker: RolloutWorker) -> None:
            async with turns:
                worker.loading = True
                wake = self.card.wake_s if self.takes_turns else 0.0
                await worker.update(self.hub, self.card.load_s + wake)
                worker.loading = False

        await asyncio.gather(*map(in_turn, self.workers))
        return {}

    async def sleep(self) -> None:
        if self.takes_turns:
            await asyncio.gather(*(worker.drained() for worker in self.workers))
            await asyncio.sleep(self.card.sleep_s)

    async def score(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> tuple[np.ndarray, int]:
        raise NotImplementedError("objective.mismatch_groups is 0 in a simulation")


class JudgePool:
    def __init__(self, config: Config, card: RateCard, queues: Sequence[Queue]) -> None:
        self.queues, k = queues, config.rollout.responses_per_prompt
        self._seconds, self._k = card.judge_s(k * (k - 1)), k
        self._load = [0] * len(queues)

    async def judge(self, group: Handle) -> Handle:
        n = min(range(len(self.queues)), key=self._load.__getitem__)
        self._load[n] += 1
        await self.queues[n].run(self._seconds)
        self._load[n] -= 1
        receipt = group.receipt
        logits = _logits(receipt.prompt_id, receipt.epoch, self._k)
        return Handle(JudgedGroup(group.ref, logits, f"judge-{n}"), receipt)


def _logits(prompt_id: str, epoch: int, k: int) -> NDArray[np.float32]:
    return np.random.default_rng(derive(prompt_id, epoch)).normal(size=(k, k)).astype(np.float32)


def _responses(lengths: NDArray[np.int32]) -> tuple[Response, ...]:
    """A response's only token is its length: what the learner needs of it."""
    nats = np.zeros(1, dtype=np.float32)
    return tuple(Response(lengths[k : k + 1], "", "stop", 0.0, nats, k) for k in range(len(lengths)))
