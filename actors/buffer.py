"""The buffer actor: waiting and batching around the plain `TrainingBuffer`, and the single writer of metrics.jsonl."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.process import redirect_output
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError
from sppo_ray.layout import Assignment
from sppo_ray.metrics import MetricsLog
from sppo_ray.types import JudgedGroup, LearnerTask, Receipt, ResumePoint, SliceSummary, TrainedIteration

NAME = "buffer"


class BufferActor:
    """Async actor. Every method that changes the record returns only when the change is on disk."""

    def __init__(self, config: Config) -> None:
        redirect_output(config.run.dir, NAME)
        self._config = config
        self._buffer = TrainingBuffer(config)
        self._metrics = MetricsLog(Path(config.run.dir) / "metrics.jsonl")
        self._waiting: list[tuple[JudgedGroup, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._learner: list[Assignment] | None = None
        self._gave_up = ""
        self._step_line: Mapping[str, Any] = {}

    def __repr__(self) -> str:
        return f"BufferActor({NAME}, cpu)"

    async def ready(self) -> str:
        return NAME

    # Called by the schedule.

    async def held(self, iteration: int) -> frozenset[str]:
        return frozenset(self._buffer.held(iteration))

    async def add(self, judged: JudgedGroup, receipt: Receipt) -> None:
        """Acknowledges when the group is on disk; groups that arrive within `buffer.flush_s` share a shard."""
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((judged, acknowledged))
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_soon())
        await acknowledged

    async def seal(self, iteration: int, prompt_ids: Sequence[str]) -> SliceSummary:
        return await asyncio.to_thread(self._buffer.seal, iteration, prompt_ids)

    async def train(self, iteration: int) -> TrainedIteration:
        """Lets the learner work on the sealed iteration and waits until its policy is saved. Raises LearnerError."""
        self._buffer.release(iteration)
        await self._notify()
        async with self._changed:
            await self._changed.wait_for(lambda: self._gave_up or self._buffer.ledger.trained(iteration))
        if self._gave_up:
            raise LearnerError(self._gave_up)
        trained = self._buffer.ledger.trained(iteration)
        assert trained is not None
        return trained

    async def learner_placed(self) -> list[Assignment]:
        """Waits until the learner's ranks are ready; where they are."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._learner is not None)
        assert self._learner is not None
        return self._learner

    async def last_trained(self) -> TrainedIteration | None:
        return self._buffer.last_trained()

    # Called by the learner.

    async def learner_ready(self, ranks: list[Assignment]) -> None:
        self._learner = ranks
        await self._notify()

    async def resume_point(self) -> ResumePoint:
        return self._buffer.resume_point()

    async def next_task(self, step: int) -> LearnerTask:
        """Waits until there is something to do after `step` updates."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._buffer.next_task(step) is not None)
        task = self._buffer.next_task(step)
        assert task is not None
        return task

    async def give_up(self, reason: str) -> None:
        """The learner cannot go on, and trying again would not help."""
        self._gave_up = reason
        await self._notify()

    async def record_reference(self, iteration: int, logps: Sequence[tuple[float, ...]]) -> None:
        await asyncio.to_thread(self._buffer.record_reference, iteration, logps)
        await self._notify()

    async def record_step(self, metrics: Mapping[str, Any]) -> None:
        self._metrics.write(metrics)
        self._step_line = metrics

    async def saved(self, trained: TrainedIteration) -> None:
        await asyncio.to_thread(self._buffer.saved, trained)
        await self._notify()

    # Called by the driver.

    async def record(self, line: Mapping[str, Any]) -> bool:
        """Append a line to metrics.jsonl; False if its event and iteration are already there."""
        return self._metrics.write(line)

    async def metrics(self) -> list[dict[str, Any]]:
        return self._metrics.lines

    async def last_step(self) -> Mapping[str, Any]:
        """The newest step's line, for the progress display."""
        return self._step_line

    # Inside.

    async def _flush_soon(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._config.buffer.shard_groups:
                await asyncio.sleep(self._config.buffer.flush_s)
            batch = self._waiting[: self._config.buffer.shard_groups]
            del self._waiting[: len(batch)]
            try:
                await asyncio.to_thread(self._buffer.add, [judged for judged, _ in batch])
            except Exception as error:  # noqa: BLE001 - handed to every waiting caller, which fails the run with it
                for _, acknowledged in batch:
                    acknowledged.set_exception(error)
            else:
                for _, acknowledged in batch:
                    acknowledged.set_result(None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
