"""Waiting and batching around the plain buffers, in asyncio and nothing else: the buffer actor is this with a name. It is
also the single writer of metrics.jsonl.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sppo_ray.async_buffer import AsyncBuffer
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError, SppoError
from sppo_ray.layout import Assignment
from sppo_ray.ledger import LedgerDamaged
from sppo_ray.metrics import MetricsLog
from sppo_ray.storage import StorageError
from sppo_ray.types import (
    JudgedGroup,
    LearnerTask,
    Look,
    Publication,
    ResumePoint,
    SliceSummary,
    StopTask,
    Ticket,
    TrainedIteration,
    TrainTask,
)

T = TypeVar("T")


class BufferService:
    """Every method that changes the record returns only when the change is on disk.

    Where the disk refuses, such a method waits in its thread and those that write nothing go on answering; when the disk's
    patience (`run.storage_patience_s`) is at its end, the method raises StorageError and the run ends with it.
    """

    def __init__(
        self,
        config: Config,
        slices: Sequence[Sequence[str]] | None,
        in_thread: Callable[..., Awaitable[Any]] = asyncio.to_thread,
    ) -> None:
        """slices: prompt ids of each iteration; None: nothing is trained. in_thread: how to run what waits for the disk (a
        simulation runs it inline)."""
        self._config, self._in_thread = config, in_thread
        streams = config.schedule.mode == "async" and slices is not None
        self._async = AsyncBuffer(config, slices or []) if streams else None
        self._buffer = self._async or TrainingBuffer(config)
        self._metrics = MetricsLog(Path(config.run.dir) / "metrics.jsonl", self._buffer.ledger.storage)
        self._metrics.forget(self._buffer.of_lost_history)
        self._troubles: dict[str, str] = {}  # of other processes' storage, by process
        self._waiting: list[tuple[JudgedGroup, asyncio.Future[None]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._changed = asyncio.Condition()
        self._learner: list[Assignment] | None = None
        self._learner_starts = self._repeated = 0
        self._record = asyncio.Lock()  # whoever begins reads the record as it is when no change is being written
        self._gave_up, self._damaged = "", False  # damaged: a new start would help
        self._step_line: Mapping[str, Any] = {}

    # Called by the schedule.

    async def held(self, iteration: int) -> frozenset[str]:
        async with self._record:
            return frozenset(await self._durably(self._buffer.held, iteration))

    async def add(self, judged: Sequence[JudgedGroup]) -> None:
        """Acknowledges when the groups are on disk; groups that arrive within `buffer.flush_s` share a shard."""
        loop = asyncio.get_running_loop()
        acknowledged = [loop.create_future() for _ in judged]
        self._waiting += zip(judged, acknowledged, strict=True)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_soon())
        await asyncio.gather(*acknowledged)

    async def seal(self, iteration: int, prompt_ids: Sequence[str]) -> SliceSummary:
        async with self._record:
            summary: SliceSummary = await self._durably(self._buffer.seal, iteration, prompt_ids)
            await self._durably(self._metrics.write, {"event": "slice"} | dataclasses.asdict(summary))
        await self._notify()
        return summary

    async def train(self, iteration: int) -> TrainedIteration:
        """Lets the learner work on the sealed iteration and waits until its policy is saved. Raises LearnerError."""
        self._buffer.release(iteration)
        await self._notify()
        return await self._when(lambda: self._buffer.trained(iteration))

    async def last_trained(self) -> TrainedIteration | None:
        return self._buffer.last_trained()

    async def admit(self, room: int) -> list[Ticket]:
        """See `protocols.Buffer`."""
        buffer = self._of_async()
        return await self._when(lambda: buffer.admit(room) or ([] if buffer.admission.exhausted else None))

    async def resample(self, ticket: Ticket) -> None:
        self._of_async().resample(ticket)
        await self._notify()

    async def collected(self, iteration: int) -> None:
        buffer = self._of_async()
        await self._when(lambda: buffer.collected(iteration) or None)

    async def publication(self, after: int) -> Publication:
        buffer = self._of_async()

        def newer() -> Publication | None:
            return buffer.publication if buffer.publication and buffer.publication.version > after else None

        return await self._when(newer)

    async def evaluated(self, iteration: int) -> None:
        self._of_async().evaluated(iteration)
        await self._notify()

    async def serving(self, version: int) -> None:
        self._of_async().serve(version)
        await self._notify()

    async def record_publish(self, publication: Publication, figures: Mapping[str, Any]) -> None:
        """A line of metrics."""
        await self._durably(
            self._metrics.write,
            {
                "event": "publish",
                "iteration": publication.iteration,
                "after_step": publication.step,
                "version": publication.version,
                "checksum": publication.checksum,
                "learner_seconds": publication.seconds,
                **self._of_async().resamples,
                **figures,
            },
        )

    # Called by the learner.

    async def learner_ready(self, ranks: list[Assignment]) -> None:
        self._learner = ranks
        self._troubles.clear()  # of ranks that are no more
        await self._notify()

    async def learner_placed(self) -> list[Assignment]:
        """Waits until the learner's ranks are ready; where they are. Raises LearnerError."""
        return await self._when(lambda: self._learner)

    async def resume_point(self) -> ResumePoint:
        """Asked for by the learner's first rank whenever the ranks are started."""
        self._learner_starts += 1
        async with self._record:
            return self._buffer.resume_point()

    async def next_task(self, step: int) -> LearnerTask:
        """Waits until there is something to do after `step` updates."""
        task: LearnerTask = await self._when(lambda: self._task(step), even_if_given_up=True)
        if isinstance(task, TrainTask):
            await self._durably(self._buffer.ledger.settle_batches)
            await self._notify()  # a batch was cut: the iteration may be complete
        return task

    def _task(self, step: int) -> LearnerTask | None:
        """Called while `_changed` is held."""
        before = self._async.resamples if self._async else None
        try:
            return self._buffer.next_task(step)
        except SppoError as error:  # asking again would not help
            self._gave_up, self._damaged = str(error), isinstance(error, LedgerDamaged)
            return StopTask()
        finally:
            if self._gave_up or (self._async and self._async.resamples != before):
                self._changed.notify_all()  # groups that were too old are to be sampled again

    async def give_up(self, reason: str) -> None:
        """The learner cannot go on, and trying again would not help."""
        self._gave_up = reason
        await self._notify()

    async def record_reference(self, iteration: int, logps: Sequence[tuple[float, ...]]) -> None:
        async with self._record:
            await self._durably(self._buffer.record_reference, iteration, logps)
        await self._notify()

    async def record_step(self, metrics: Mapping[str, Any]) -> None:
        self._repeated += not await self._durably(self._metrics.write, metrics)
        self._step_line = metrics

    async def published(self, publication: Publication) -> None:
        """The hub holds these weights, in the middle of an iteration."""
        self._of_async().published(publication)
        await self._notify()

    async def saved(self, trained: TrainedIteration, publication: Publication) -> None:
        """The hub holds the weights that end an iteration, and its policy is saved."""
        async with self._record:
            await self._durably(self._buffer.saved, trained)
            if self._async:
                self._async.published(publication)
        await self._notify()

    # Called by the driver.

    async def record(self, line: Mapping[str, Any]) -> bool:
        """Append a line to metrics.jsonl; False if its event is already there."""
        return await self._durably(self._metrics.write, line)

    async def look(self) -> Look:
        own = self._buffer.ledger.storage.trouble
        trouble = "; ".join([own] if own else self._troubles.values())
        return Look(self._step_line, trouble, max(0, self._learner_starts - 1), self._repeated)

    async def report_trouble(self, process: str, text: str) -> None:
        """Called by processes that write to the run directory themselves: `Storage.trouble` of theirs."""
        self._troubles.pop(process, None)
        if text:
            self._troubles[process] = f"{process}: {text}"

    # Inside.

    async def _durably(self, write: Callable[..., T], *args: Any) -> T:
        """A write, in a thread. The run ends if the disk does not take it."""
        try:
            return await self._in_thread(write, *args)
        except StorageError as error:
            self._gave_up = str(error)
            await self._notify()
            raise

    def _of_async(self) -> AsyncBuffer:
        assert self._async is not None, "schedule.mode is not async"
        return self._async

    async def _when(self, answer: Callable[[], T | None], even_if_given_up: bool = False) -> T:
        """Waits until there is an answer. Raises LearnerError once the learner has given up."""
        async with self._changed:
            while True:
                if self._gave_up and not even_if_given_up:
                    raise LedgerDamaged(self._gave_up) if self._damaged else LearnerError(self._gave_up)
                if (found := answer()) is not None:
                    return found
                await self._changed.wait()

    async def _flush_soon(self) -> None:
        while self._waiting:
            if len(self._waiting) < self._config.buffer.shard_groups:
                await asyncio.sleep(self._config.buffer.flush_s)
            batch = self._waiting[: self._config.buffer.shard_groups]
            del self._waiting[: len(batch)]
            try:
                fresh = self._buffer.fresh([judged for judged, _ in batch])
                self._buffer.accept(fresh, await self._durably(self._buffer.store, fresh))
            except Exception as error:  # noqa: BLE001 - handed to every waiting caller, which fails the run with it
                for acknowledged in _awaited(batch):
                    acknowledged.set_exception(error)
            else:
                for acknowledged in _awaited(batch):
                    acknowledged.set_result(None)
            await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _awaited(batch: Sequence[tuple[JudgedGroup, asyncio.Future[None]]]) -> list[asyncio.Future[None]]:
    """Those whose callers still wait."""
    return [acknowledged for _, acknowledged in batch if not acknowledged.done()]
