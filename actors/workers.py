"""The workers of one role as the driver sees them: which of them gets a call, and what the call's failure means.

A call goes to the least loaded worker that is up. Generation and judging are deterministic, so a call lost with its
worker is simply made again, here or on the worker started in its place: the group is the same.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayError, RayTaskError

from actors.revival import DEATHS, RESTART_LIMIT_S, Revival, Worker, WorkerLost, describe, hung, log_of
from sppo_ray.errors import GroupAborted, GroupLost, WeightSyncError, WorkerDied, WorkerFailed
from sppo_ray.ledger import LedgerDamaged
from sppo_ray.protocols import Handle
from sppo_ray.types import Prompt, Receipt

# A call is taken for the cause of its workers' deaths, where possible on different nodes, after so many in which the worker had
# finished no other call since it got this one: it may have waited in a queue all the time. The second bounds what a call costs
# that does kill its workers, but not before they have finished others.
ALONE, IN_ALL = 3, 12


class Workers:
    """Dispatch to the workers of one role."""

    def __init__(
        self,
        handles: Mapping[str, ActorHandle],
        create: Callable[[str], ActorHandle] | None,
        rejoin: Callable[[Worker], Awaitable[None]],
        timeout_s: float,
        max_restarts: int,
        run_dir: str,
    ) -> None:
        """timeout_s: a worker that has calls and finishes none for so long is taken for hung. The rest as in Revival."""
        if not handles:
            raise ValueError("a pool needs at least one worker")
        self.all = [Worker(name, handle) for name, handle in handles.items()]
        self.revival = Revival(create, rejoin, max_restarts, run_dir)
        self._leaving: list[Worker] = []  # no more in `all`, but with calls
        self.lost_calls: Counter[str] = Counter()  # by method: with the workers that had them
        self._timeout_s = timeout_s
        self._watch: asyncio.Task[None] | None = None

    async def call(self, method: str, *args: Any) -> Any:
        """Result of a call on some worker. Raises WorkerFailed, which begins with the worker's name; GroupAborted as it is;
        GroupLost when an argument was lost with its node."""
        return await self._attempt(lambda bound: bound.remote(*args), method, args)

    async def call_for_receipt(self, method: str, *args: Any) -> Handle:
        """For methods that return (data, receipt): the reference of the first, the second itself."""

        async def submit(bound: Any) -> Handle:
            data, receipt = bound.options(num_returns=2).remote(*args)
            return Handle(data, await receipt)

        return await self._attempt(submit, method, args)  # type: ignore[no-any-return]

    async def _attempt(self, submit: Any, method: str, args: tuple[Any, ...]) -> Any:
        self._watch_over()
        first: tuple[str, BaseException] | None = None  # the worker that was lost first, and why
        ill: set[str | None] = set()  # nodes on which one died: the others there may be dead, too
        alone = deaths = others = 0
        while alone < ALONE and deaths < IN_ALL:
            worker = await self._least_loaded(ill)
            handle, done = worker.handle, worker.done
            try:
                with worker.at_work():
                    result = await submit(getattr(handle, method))
            except RayTaskError as error:  # first: one that carries a dead actor's error is not this worker's death
                if isinstance(error.cause, GroupAborted):
                    raise error.cause from None  # nothing failed: the group is to be sampled again
                if isinstance(error.cause, ObjectLostError):
                    raise _lost_group(method, args, error.cause) from error
                raise failure(worker.name, error) from error
            except DEATHS as error:
                others = worker.load
                self.lost_calls[method] += 1
                self.revival.lost(worker, handle, error)
                first = first or (worker.name, worker.cause or error)
                ill.add(_node(worker))
                deaths += 1
                alone += worker.done == done
            except ObjectLostError as error:
                raise _lost_group(method, args, error) from error
            except RayError as error:
                raise failure(worker.name, error) from error
            else:
                worker.finished()
                return result
        assert first is not None
        name, cause = first
        raise WorkerFailed(
            f"{name}: the actor died in {method}{_of_prompt(args)}, and so did those that it was given to next, {deaths} in all"
            f"{_beside(others)}. First cause: {describe(cause)}. {log_of(name)}"
        ) from cause

    async def _least_loaded(self, ill: Collection[str | None] = ()) -> Worker:
        """ill: nodes that are avoided while there are others."""
        while True:
            ready = [worker for worker in self.all if worker.up]
            if ready:
                # One that takes new weights runs empty and would attract every new call, which could only wait there.
                return min(ready, key=lambda worker: (_node(worker) in ill, worker.loading, worker.load))
            self.refuse_if_all_gone()
            returning = [worker.returning for worker in self.all if worker.returning is not None]
            await asyncio.wait(returning, return_when=asyncio.FIRST_COMPLETED)

    def refuse_if_all_gone(self) -> None:
        """Raises WorkerFailed with the cause of the one that went first."""
        if (first := self.revival.first_gone) is not None and all(worker.gone for worker in self.all):
            raise WorkerFailed(f"{first} No other worker is left.") from first

    def _watch_over(self) -> None:
        """Look for workers that hang, from the first call on: it needs the event loop. Raises what ended it, if it has ended."""
        if self._watch is None:
            looking = self.revival.look_for_hung(lambda: [*self.all, *self._leaving], self._timeout_s)
            self._watch = asyncio.create_task(looking)
        elif self._watch.done():
            self._watch.result()

    @property
    def living(self) -> list[Worker]:
        """Those that get calls, or will again after a restart."""
        return [worker for worker in self.all if worker.gone is None]

    def join(self, newcomer: Worker) -> None:
        """It gets calls from now on. Those that never come back are forgotten: it may have the name of one."""
        newcomer.member = True
        self.all = [*self.living, newcomer]

    def retire(self, name: str) -> Worker:
        """Take a worker out for good: it gets no new calls. Raises ValueError for the last one."""
        if [worker.name for worker in self.living] == [name]:
            raise ValueError(f"{name} is the last worker of its role")
        (worker,) = (worker for worker in self.all if worker.name == name)
        self.all.remove(worker)
        self._leaving.append(worker)
        worker.member = False
        if worker.returning is not None:
            worker.returning.cancel()  # nobody waits for it any more
        return worker

    def left(self, worker: Worker) -> None:
        """A retired worker has no calls any more."""
        self._leaving.remove(worker)

    async def started(self, worker: Worker) -> None:
        """Returns when it serves. Raises WorkerFailed if it cannot start, or does not within RESTART_LIMIT_S."""
        try:
            async with asyncio.timeout(RESTART_LIMIT_S):
                worker.place = await self.once(worker, "ping")
        except WorkerLost:  # its restart has a time limit of its own
            worker.place = await self.on(worker, "ping", limit_s=RESTART_LIMIT_S)
        except TimeoutError:
            raise WorkerFailed(
                f"{worker.name}: does not serve after {RESTART_LIMIT_S:g} s; is there room for it in the cluster? "
                f"{log_of(worker.name)}"
            ) from None

    async def on_each(self, method: str, *args: Any, limit_s: float | None = None) -> dict[str, Any]:
        """The method's result on every worker, by name; those that are gone are left out. Raises WorkerFailed. limit_s as
        in `on`."""
        workers = self.living  # they may come and go meanwhile
        calls = (self.on(worker, method, *args, limit_s=limit_s) for worker in workers)
        results = await asyncio.gather(*calls, return_exceptions=True)
        answers = {}
        for worker, result in zip(workers, results, strict=True):
            if not isinstance(result, BaseException):
                answers[worker.name] = result
            elif worker.gone is None and worker.member:
                raise result
        self.refuse_if_all_gone()
        return answers

    async def on(self, worker: Worker, method: str, *args: Any, limit_s: float | None = None) -> Any:
        """A call on this very worker; once more after its restart. Raises WorkerFailed. limit_s: for either, as in `once`."""
        for last_try in (False, True):
            if worker.returning is not None:
                await asyncio.wait([worker.returning])
            if worker.gone is not None:
                raise WorkerFailed(str(worker.gone)) from worker.gone
            try:
                return await self.once(worker, method, *args, limit_s=limit_s)
            except WorkerLost:
                if last_try:
                    raise
        raise AssertionError("unreachable")

    async def once(self, worker: Worker, method: str, *args: Any, limit_s: float | None = None) -> Any:
        """A call on this very worker. Raises WorkerFailed; WorkerLost when it died, or did not answer in limit_s and is taken
        for hung."""
        handle = worker.handle
        worker.load += 1
        try:
            async with asyncio.timeout(limit_s):
                return await getattr(handle, method).remote(*args)
        except RayTaskError as error:
            raise failure(worker.name, error) from error
        except DEATHS as error:
            cause: BaseException = error
        except RayError as error:
            raise failure(worker.name, error) from error
        except TimeoutError:
            cause = hung(worker, method, limit_s or 0.0)
        finally:
            worker.load -= 1
        self.revival.lost(worker, handle, cause)
        raise WorkerLost(f"{worker.name}: {describe(cause).removeprefix(f'{worker.name}: ')}") from cause


def _node(worker: Worker) -> str | None:
    return worker.place.node_id if worker.place else None


def _beside(others: int) -> str:
    return f" (other calls that the last of them had, and may have died of: {others})" if others else ""


def _of_prompt(args: tuple[Any, ...]) -> str:
    return next((f" of prompt {arg.prompt_id!r}" for arg in args if isinstance(arg, Prompt | Receipt)), "")


def _lost_group(method: str, args: tuple[Any, ...], error: ObjectLostError) -> GroupLost:
    return GroupLost(f"the group{_of_prompt(args)} was lost before {method}: {describe(error)}")


def failure(name: str, error: BaseException) -> WorkerFailed:
    """What the user reads: the actor's name, then its own error, then (as a note) the traceback inside the actor. WorkerDied
    if a new start mends it: it has no process any more, found the record damaged, or lacks its weights."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = str(cause).strip()
    text = text.removeprefix(f"{name}:").strip()  # errors of rollout workers begin with their name already
    kind = WorkerDied if isinstance(cause, (*DEATHS, LedgerDamaged, WeightSyncError)) else WorkerFailed
    failed = kind(f"{name}: {type(cause).__name__}: {text}")
    if isinstance(error, RayTaskError):
        failed.add_note(str(error))
    return failed


async def call(actor: ActorHandle, name: str, method: str, *args: Any) -> Any:
    """One call on one actor, not tried again. Raises WorkerFailed, which begins with `name`."""
    try:
        return await getattr(actor, method).remote(*args)
    except RayError as error:
        raise failure(name, error) from error
