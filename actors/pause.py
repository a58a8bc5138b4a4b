"""What an update of the weights does with the work that runs in an engine: `weights.pause`.

finish: the update waits until the groups inside are done, so every group is of one version. keep: they stay inside, the
engine holds them still and they go on under the new weights. abort: they end with GroupAborted, but for protected ones,
which the update waits for. Whatever the policy, what comes later waits until the update is over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sppo_ray.errors import GroupAborted

Pause = Literal["finish", "keep", "abort"]
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Work:
    task: asyncio.Task[Any]
    must_finish: bool
    ended_by: Exception | None = None


class Gate:
    """Many pieces of work pass at once; an update closes the gate. One update at a time."""

    def __init__(self) -> None:
        self._one_update = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self._inside: set[_Work] = set()

    async def run(self, work: Coroutine[Any, Any, T], must_finish: bool = False) -> T:
        """The result of `work`, begun while the gate is open. Raises what ended it, if something did: see `end_all`.

        must_finish: neither kept over an update nor aborted by one.
        """
        try:
            while not self._open.is_set():  # a second update may have closed it before this task woke
                await self._open.wait()
        except BaseException:
            work.close()
            raise
        one = _Work(asyncio.create_task(work), must_finish)
        self._inside.add(one)
        try:
            return await one.task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            assert caller is not None
            if one.ended_by is None or caller.cancelling():  # the caller was cancelled, not only the work
                raise
            raise one.ended_by from None
        finally:
            self._inside.discard(one)

    @contextlib.asynccontextmanager
    async def closed(self, pause: Pause) -> AsyncIterator[None]:
        """Closed for an update. Under `keep` there may be work inside, otherwise there is none."""
        async with self._one_update:
            self._open.clear()
            try:
                if pause == "abort":
                    self.end_all(GroupAborted("an update of the weights ended the group"))
                while waited := [one.task for one in self._inside if one.must_finish or pause != "keep"]:
                    await asyncio.wait(waited)
                yield
            finally:
                self._open.set()

    def end_all(self, error: Exception) -> None:
        """Cancel the work inside, but for what must finish; each `run` raises `error` when its work has ended."""
        for one in self._inside:
            # One that was told before is taking its requests out of vLLM, which a second cancellation would cut short.
            if not one.must_finish and not one.task.cancelling() and one.task.cancel():
                one.ended_by = error


class Room:
    """Places for sequences, first come first served. Who waits for one is not inside the gate: an update does not wait for
    it, and it is sampled from the newer weights."""

    def __init__(self, places: int) -> None:
        self._places = self._free = places
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @contextlib.asynccontextmanager
    async def of(self, sequences: int) -> AsyncIterator[None]:
        wanted = min(sequences, self._places)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((wanted, turn))
        self._let_in()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in at the very moment
                self._leave(wanted)
            else:
                if (wanted, turn) in self._waiting:
                    self._waiting.remove((wanted, turn))
                self._let_in()
            raise
        try:
            yield
        finally:
            self._leave(wanted)

    def _leave(self, places: int) -> None:
        self._free += places
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            wanted, turn = self._waiting.popleft()
            if not turn.done():  # else its caller was cancelled
                self._free -= wanted
                turn.set_result(None)
