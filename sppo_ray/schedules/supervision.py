"""Tasks that run together: the first to fail ends all, with its name; and many short ones, as many as there is room for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from tenacity import retry, retry_if_exception_type, stop_after_attempt

from sppo_ray.errors import GroupLost, SppoError

# A group whose object died with its node: the same seeds give the same group.
again_if_lost = retry(retry=retry_if_exception_type(GroupLost), stop=stop_after_attempt(5), reraise=True)
AGAIN_S = 1.0  # how often room is looked for again without anything having finished: workers may be added


async def supervised(**tasks: Coroutine[Any, Any, bool]) -> None:
    """Run until all have returned True: their work is done. When one fails, the others are cancelled and its error is raised
    with the task's name as a note; one that ends in any other way has ended early, which is a SppoError with its name."""
    started = [asyncio.create_task(task, name=name) for name, task in tasks.items()]
    running = set(started)
    try:
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                _raise_for(task)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)  # those that failed too at the same time are looked at


def _raise_for(task: asyncio.Task[bool]) -> None:
    if task.cancelled() or (task.exception() is None and task.result() is not True):
        raise SppoError(f"the task {task.get_name()!r} ended before its work was done")
    error = task.exception()
    while isinstance(error, BaseExceptionGroup):  # of tasks that ran together inside: the first is the cause
        error = error.exceptions[0]
    if error is not None:
        error.add_note(f"(in the task {task.get_name()!r} of the asynchronous schedule)")
        raise error


class InFlight:
    """Short tasks, started while there is room. Use as a context manager: leaving it waits for all; the first that fails
    cancels the others and is raised, at the latest when room is asked for."""

    def __init__(self) -> None:
        self._group = asyncio.TaskGroup()
        self._count = 0
        self._freed = asyncio.Event()

    async def __aenter__(self) -> InFlight:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._group.__aexit__(*error)

    def start(self, task: Coroutine[Any, Any, None]) -> None:
        self._count += 1
        self._group.create_task(task).add_done_callback(self._done)

    async def room(self, slots: Callable[[], int]) -> int:
        """Waits until fewer than `slots()` tasks run; how many more may be started."""
        while (room := slots() - self._count) <= 0:
            self._freed.clear()
            try:
                await asyncio.wait_for(self._freed.wait(), AGAIN_S)
            except TimeoutError:
                continue
        return room

    def _done(self, _: asyncio.Task[None]) -> None:
        self._count -= 1
        self._freed.set()
