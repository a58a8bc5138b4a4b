"""An asyncio event loop in virtual time: when nothing is ready its clock jumps to the next timer. No threads, no I/O."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

from sppo_ray.errors import SppoError

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Instead of waiting, moves the clock by the time it was to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise SppoError("the simulation waits for something that will never happen")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 s; what runs takes none of it."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_virtual(job: Coroutine[Any, Any, T]) -> T:
    """The job's result. Raises SppoError when every task waits and no timer is left."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(job)


async def inline(call: Any, *args: Any) -> Any:
    """Stands for `asyncio.to_thread`: a thread would not know of virtual time."""
    return call(*args)
