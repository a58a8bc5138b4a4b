"""Places in front of an engine."""

from __future__ import annotations

import asyncio

import pytest

from actors.pause import Room


async def test_so_many_sequences_at_most_and_in_order():
    room, inside, most, entered = Room(10), 0, 0, []

    async def group(n: int, sequences: int) -> None:
        nonlocal inside, most
        async with room.of(sequences):
            entered.append(n)
            inside += sequences
            most = max(most, inside)
            await asyncio.sleep(0.001 * (n % 3))
            inside -= sequences

    await asyncio.gather(*(group(n, 5 if n % 2 else 3) for n in range(20)))
    assert most <= 10
    assert entered == sorted(entered)  # a small group does not overtake a large one for ever
    async with room.of(99):  # more than there are: it gets all
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(group(0, 1), 0.01)


async def test_who_is_cancelled_while_waiting_leaves_no_hole():
    room, release = Room(5), asyncio.Event()

    async def group(sequences: int) -> str:
        async with room.of(sequences):
            await release.wait()
            return "done"

    first, waits, behind = (asyncio.create_task(group(n)) for n in (5, 5, 1))
    await asyncio.sleep(0.01)
    waits.cancel()
    await asyncio.sleep(0.01)
    release.set()
    assert await asyncio.wait_for(first, 60) == await asyncio.wait_for(behind, 60) == "done"
    assert await asyncio.wait_for(group(5), 60) == "done"  # every place is free again
