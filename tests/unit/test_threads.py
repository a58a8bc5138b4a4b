"""Threads for what waits for a disk (sppo_ray/threads.py)."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from sppo_ray.threads import in_threads


async def test_there_are_never_more_threads_than_asked_for() -> None:
    """The default executor starts one more whenever it finds none idle, up to the processors and four."""
    names: set[str] = set()

    def work(n: int) -> int:
        names.add(threading.current_thread().name)
        time.sleep(0.002)
        return n

    run = in_threads(2, "disk")
    assert await asyncio.gather(*(run(work, n) for n in range(50))) == list(range(50))
    assert names == {"disk_0", "disk_1"}


async def test_the_caller_gets_the_error() -> None:
    def fails() -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        await in_threads(1, "disk")(fails)
