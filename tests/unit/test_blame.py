"""Whom a death is counted against: its worker, the call it had, or neither. In virtual time, against actors of this process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_actors import Actor, Stage, receipt, workers_on

from sppo_ray.errors import WorkerFailed
from sppo_ray.simulation.clock import run_virtual

pytestmark = pytest.mark.usefixtures("dumped")


def test_a_finished_call_makes_up_for_the_deaths_before_it() -> None:
    """Each process finishes one call and dies of the next, far more often than max_restarts."""

    async def work(actor: Actor, *_: Any) -> int:
        if len(actor.calls) > 2:
            actor.die("tired")
        await asyncio.sleep(1)
        return actor.number

    async def job() -> None:
        stage = Stage(work)
        workers = workers_on(stage, max_restarts=1)
        await workers.started(workers.all[0])
        assert [await workers.call("score") for _ in range(12)] == list(range(12))

    run_virtual(job())


def test_a_long_call_is_not_blamed_for_deaths_of_workers_that_finish_others() -> None:
    """Like the last of a queue of held-out prompts, which meets every death of its worker."""

    async def start(actor: Actor) -> None:
        if actor.number < 5:
            asyncio.get_running_loop().call_later(2.0, actor.die, "preempted")

    async def work(actor: Actor, method: str, seconds: float) -> int:
        await asyncio.sleep(seconds)
        return actor.number

    async def job() -> None:
        workers = workers_on(Stage(work, start), max_restarts=1)
        await workers.started(workers.all[0])
        last = asyncio.create_task(workers.call("score", 10.0))
        while not last.done():
            await workers.call("score", 0.75)
        assert last.result() == 5

    run_virtual(job())


def test_a_call_that_kills_its_workers_is_found_among_others_that_they_finish() -> None:
    async def work(actor: Actor, method: str, seconds: float) -> int:
        await asyncio.sleep(seconds)
        if seconds == 2.0:
            actor.die("killed by signal 11")
            await asyncio.sleep(1)
        return actor.number

    async def job() -> None:
        workers = workers_on(Stage(work), max_restarts=1)
        await workers.started(workers.all[0])
        deadly = asyncio.create_task(workers.call("score", 2.0))
        while not deadly.done():
            await workers.call("score", 0.75)
        with pytest.raises(
            WorkerFailed, match=r"died in score, .* 12 in all .*First cause: RayActorError: killed by signal 11"
        ):
            deadly.result()

    run_virtual(job())


def test_calls_that_die_together_are_all_under_suspicion() -> None:
    async def work(actor: Actor, *_: Any) -> None:
        await asyncio.sleep(1)
        actor.die("killed by signal 11")
        await asyncio.sleep(1)

    async def job() -> None:
        workers = workers_on(Stage(work))
        both = [asyncio.create_task(workers.call("score")) for _ in range(2)]
        with pytest.raises(
            WorkerFailed, match=r"3 in all \(other calls that the last of them had, and may have died of: 1\)"
        ):
            await asyncio.wait_for(both[0], 60)
        with pytest.raises(WorkerFailed):
            await both[1]

    run_virtual(job())


def test_a_call_that_kills_whoever_takes_it_ends_with_its_prompt_and_the_first_cause() -> None:
    async def work(actor: Actor, method: str, what: Any) -> Any:
        if what.prompt_id == "poison":
            actor.die(f"end {actor.number}")
        await asyncio.sleep(1)
        return what

    async def job() -> None:
        stage = Stage(work)
        workers = workers_on(stage)
        with pytest.raises(
            WorkerFailed, match=r"^w: .* in generate of prompt 'poison'.*First cause: .*end 0\. .*w\.log"
        ):
            await workers.call_for_receipt("generate", receipt("poison"))
        assert len(stage.actors) == 3
        handle = await workers.call_for_receipt("generate", receipt("harmless"))
        assert handle.receipt.prompt_id == "harmless"

    run_virtual(job())
