"""The workers of one role as the driver sees them: which of them gets a call, what its death means, how it returns.

A call goes to the least loaded worker that is up. Generation and judging are deterministic, so a call lost with its
worker is simply made again, here or on the restarted worker: the group is the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError, RayTaskError

from sppo_ray.errors import GroupAborted, WorkerFailed
from sppo_ray.protocols import Handle

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # a call that three workers died of is taken for the cause of it
RESTART_LIMIT_S = 900.0  # for a worker to come back; loading a large model takes minutes
PATIENCE = 3  # refused pings before a worker is taken for gone: the first may still reach the process that died


class Worker:
    """A worker as the driver sees it."""

    def __init__(self, name: str, handle: ActorHandle) -> None:
        self.name = name
        self.handle = handle
        self.load = 0  # calls in flight
        self.loading = False  # it takes new weights: calls wait there
        self.draining = False  # it finishes what it has and gets nothing new
        self.returning: asyncio.Task[None] | None = None  # while it restarts
        self.gone: BaseException | None = None  # why it never comes back

    @property
    def up(self) -> bool:
        return self.gone is None and self.returning is None and not self.draining


class Workers:
    """Dispatch, failure and return of the workers of one role."""

    def __init__(self, handles: Mapping[str, ActorHandle]) -> None:
        if not handles:
            raise ValueError("a pool needs at least one worker")
        self.all = [Worker(name, handle) for name, handle in handles.items()]

    async def call(self, method: str, *args: Any) -> Any:
        """Result of a call on some worker. Raises WorkerFailed, which begins with the worker's name; GroupAborted as it is."""
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
                if isinstance(error.cause, GroupAborted):
                    raise error.cause from None  # nothing failed: the group is to be sampled again
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

    async def _least_loaded(self) -> Worker:
        while True:
            ready = [worker for worker in self.all if worker.up]
            if ready:
                # One that takes new weights runs empty and would attract every new call, which could only wait there.
                return min(ready, key=lambda worker: (worker.loading, worker.load))
            returning = [worker.returning for worker in self.all if worker.returning is not None]
            if not returning:
                worker = self.all[0]
                raise WorkerFailed(
                    f"{worker.name}: the actor is dead and is not restarted, and no other worker is left ({worker.gone})"
                ) from worker.gone
            await asyncio.wait(returning, return_when=asyncio.FIRST_COMPLETED)

    def lost(self, worker: Worker, error: BaseException) -> None:
        """Take a worker out until it answers again."""
        if worker.up:
            logger.warning("%s is lost (%s); waiting for its restart", worker.name, str(error).splitlines()[0])
            worker.returning = asyncio.create_task(self._until_it_returns(worker))

    async def _until_it_returns(self, worker: Worker) -> None:
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

    def retire(self, name: str) -> Worker:
        """Take a worker out for good: it gets no new calls. Raises ValueError for the last one."""
        if [worker.name for worker in self.all] == [name]:
            raise ValueError(f"{name} is the last worker of its role")
        (worker,) = (worker for worker in self.all if worker.name == name)
        self.all.remove(worker)
        worker.draining = True
        if worker.returning is not None:
            worker.returning.cancel()  # nobody waits for it any more
        return worker

    async def on_each(self, method: str, *args: Any) -> dict[str, Any]:
        """The method's result on every worker, by name. Raises WorkerFailed."""
        workers = list(self.all)  # they may come and go meanwhile
        results = await asyncio.gather(*(self.on(worker, method, *args) for worker in workers))
        return dict(zip((worker.name for worker in workers), results, strict=True))

    async def on(self, worker: Worker, method: str, *args: Any) -> Any:
        """A call on this very worker; tried once more after its restart."""
        for last_try in (False, True):
            if worker.returning is not None:
                await asyncio.wait([worker.returning])
            if worker.gone is not None:
                raise failure(worker.name, worker.gone) from worker.gone
            worker.load += 1
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
            finally:
                worker.load -= 1
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
