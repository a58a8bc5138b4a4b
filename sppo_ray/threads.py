"""Threads for work that waits for a disk, and may hang, e.g. on a file server that is away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


async def in_daemon_thread(work: Callable[[], T]) -> T:
    """As asyncio.to_thread, but nothing waits for the thread when this is cancelled: neither the end of the loop nor that of
    the process."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # from here on cancelling leaves it alone

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where it is awaited
            done.set_exception(error)

    threading.Thread(target=run, name=in_daemon_thread.__name__, daemon=True).start()
    return await asyncio.wrap_future(done)


def in_threads(most: int, name: str) -> Callable[..., Awaitable[Any]]:
    """A function like asyncio.to_thread with threads of its own, of which there are never more than `most`. What comes when all
    are busy waits its turn, in the order of the calls. name: what the threads' names begin with."""
    pool = ThreadPoolExecutor(most, thread_name_prefix=name)

    async def run(work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)

    return run
