"""A worker as the driver sees it, and its life: what its death means, how often it is started again, what hanging is.

Ray restarts nothing (max_restarts=0): the driver does, since it knows whether a worker has done anything since it died last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from actors.stacks import Place, dump
from sppo_ray.errors import SppoError, WorkerDied, WorkerFailed

logger = logging.getLogger(__name__)

# What a call on a dead actor raises; the second: Ray ended it for its memory.
DEATHS = (RayActorError, OutOfMemoryError)
RESTART_LIMIT_S = 900.0  # for a worker to serve, at its first start too; loading a large model takes minutes
LOOK_S = 5.0  # between looks for workers that hang
NAME_FREE_S = 0.2  # between tries to give a dead worker's name to the next: Ray frees it a moment after the death


class WorkerHung(WorkerFailed):
    """It has calls, and answers none of them."""


class WorkerLost(WorkerDied):
    """It died or hung in a call, and is being started again."""


class Worker:
    """What the driver knows of one."""

    def __init__(self, name: str, handle: ActorHandle, place: Place | None = None, member: bool = True) -> None:
        self.name = name
        self.handle = handle
        self.place = place  # of its process; None until it has served
        self.member = member  # it gets calls and is started again; newcomers are not there yet, who leaves is no more
        self.load = 0  # calls in flight
        self.working = 0  # those of them that sample or judge
        self.done = 0  # calls that it finished, in all its lives
        self.waited_s = 0.0  # since one of these ended, as far as anyone looked
        self.loading = False  # it takes new weights: calls wait there
        self.returning: asyncio.Task[None] | None = None  # while it is started again
        self.deaths = 0  # since it finished a call
        self.cause: BaseException | None = None  # of the first of them
        self.gone: WorkerFailed | None = None  # why it never comes back

    @property
    def up(self) -> bool:
        return self.gone is None and self.returning is None and self.member

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Around a call that samples or judges."""
        if not self.working:
            self.waited_s = 0.0
        self.load, self.working = self.load + 1, self.working + 1
        try:
            yield
        finally:
            self.load, self.working = self.load - 1, self.working - 1
            self.waited_s = 0.0

    def finished(self) -> None:
        """A call: whatever it died of before, it can work."""
        self.done += 1
        if self.returning is None:
            self.deaths, self.cause = 0, None


class Revival:
    """Starts workers again, with longer and longer pauses, until one has died too often without finishing a call."""

    def __init__(
        self,
        create: Callable[[str], ActorHandle] | None,
        rejoin: Callable[[Worker], Awaitable[None]],
        max_restarts: int,
        run_dir: str,
    ) -> None:
        """create(name): a new actor; None: nothing is started again. rejoin(worker): what a worker that serves again needs
        before its first call; then it sets `returning` to None. Raises SppoError."""
        self.restarts = 0  # so far
        self.first_gone: WorkerFailed | None = None
        self._create, self._rejoin = create, rejoin
        self._max_restarts, self._run_dir = max_restarts if create else 0, run_dir

    def lost(self, worker: Worker, handle: ActorHandle, cause: BaseException) -> None:
        """Take a worker out, and start it again if it is of the pool. Every call it had reports the same death: only the
        first counts. handle: the actor that died."""
        if worker.handle is handle and worker.returning is None and worker.gone is None:
            self._died(worker, cause)
            worker.returning = asyncio.create_task(self._bring_back(worker, cause))
            worker.returning.add_done_callback(lambda task: self._ended(worker, task))

    def _died(self, worker: Worker, cause: BaseException) -> None:
        worker.deaths += 1
        worker.cause = worker.cause or cause
        logger.warning("%s is lost (%d in a row): %s", worker.name, worker.deaths, describe(cause))

    async def _bring_back(self, worker: Worker, cause: BaseException) -> None:
        while True:
            await self._bury(worker, cause)
            if not worker.member:
                return
            first_start = worker.place is None and worker.deaths == 1
            if first_start and isinstance(cause, RayActorError) and cause.actor_init_failed:
                # An error in the constructor at the very first start is no accident: the same would follow.
                self._gone(worker, f"could not start: {describe(cause)}")
                return
            if worker.deaths > self._max_restarts:
                self._give_up(worker)
                return
            await asyncio.sleep(back_off_s(worker.deaths))
            try:
                await self._start_again(worker)
                return
            except (RayError, SppoError) as error:
                cause = (error.__cause__ or error) if isinstance(error, WorkerLost) else error
            self._died(worker, cause)

    async def _bury(self, worker: Worker, cause: BaseException) -> None:
        """End what may be left of the actor: its calls end, its name and GPU are free. First see where it hangs."""
        if isinstance(cause, WorkerHung) and worker.place is not None:
            path = await dump(worker.name, worker.place.node_id, worker.place.pid, self._run_dir)
            logger.error("%s Its stacks are in %s.", cause, path)
        ray.kill(worker.handle)

    async def _start_again(self, worker: Worker) -> None:
        assert self._create is not None, "without it no restart is allowed"
        try:
            async with asyncio.timeout(RESTART_LIMIT_S):
                worker.handle = await _created(self._create, worker.name)
                self.restarts += 1
                worker.place = await worker.handle.ping.remote()  # a rollout worker has then caught up with the hub
        except TimeoutError:
            raise WorkerFailed(
                f"{worker.name}: was started again but did not serve in {RESTART_LIMIT_S:g} s; is there room for it in the "
                "cluster?"
            ) from None
        await self._rejoin(worker)
        logger.warning("%s is back", worker.name)

    def _give_up(self, worker: Worker) -> None:
        assert worker.cause is not None
        times = f"{worker.deaths} time{'s' * (worker.deaths > 1)}"
        self._gone(
            worker,
            f"died {times} without finishing a call in between and is not started again (cluster.max_restarts is "
            f"{self._max_restarts}). First cause: {describe(worker.cause)}",
        )

    def _ended(self, worker: Worker, task: asyncio.Task[None]) -> None:
        if worker.returning is task:
            worker.returning = None
        if not task.cancelled() and (error := task.exception()):  # no death, but e.g. the connection to Ray
            self._gone(worker, f"could not be started again: {describe(error)}")

    def _gone(self, worker: Worker, why: str) -> None:
        worker.gone = WorkerFailed(f"{worker.name}: {why}. {log_of(worker.name)}")
        self.first_gone = self.first_gone or worker.gone
        logger.error("%s", worker.gone)

    async def look_for_hung(self, workers: Callable[[], Iterable[Worker]], limit_s: float) -> None:
        """A worker that has calls and finishes none for `limit_s` is lost. Never returns. It counts looks instead of reading
        a clock: time for which this process itself was stopped is nobody's fault."""
        every_s = min(LOOK_S, limit_s / 4)
        while True:
            await asyncio.sleep(every_s)
            for worker in workers():
                counts = worker.working and not worker.loading  # new weights have a time limit of their own
                worker.waited_s = worker.waited_s + every_s if counts else 0.0
                if worker.waited_s >= limit_s:
                    worker.waited_s = 0.0
                    self.lost(worker, worker.handle, hung(worker, f"any of its {worker.working} calls", limit_s))


async def _created(create: Callable[[str], ActorHandle], name: str) -> ActorHandle:
    while True:
        try:
            return create(name)
        except ActorAlreadyExistsError:
            await asyncio.sleep(NAME_FREE_S)


def back_off_s(deaths: int) -> float:
    """Before the restart after so many deaths in a row: 0, 1, 2, 4, ... at most 60 s."""
    return min(60.0, 2.0 ** (deaths - 2)) if deaths > 1 else 0.0


def hung(worker: Worker, what: str, limit_s: float) -> WorkerHung:
    return WorkerHung(f"{worker.name}: hangs: no answer to {what} in {limit_s:g} s.")


def log_of(name: str) -> str:
    return f"Its log is logs/{name}.log in the run directory."


def describe(error: BaseException) -> str:
    """In one line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = str(cause).strip()
    if isinstance(cause, RayActorError) and cause.actor_init_failed:
        return text.splitlines()[-1]  # of a traceback, which ends with the constructor's own error
    text = " ".join(text.split())
    return text if isinstance(cause, SppoError) else f"{type(cause).__name__}: {text}"
