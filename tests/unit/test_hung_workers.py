"""Workers that hang, and what a publish makes of those that are away, in virtual time, against actors of this process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_actors import Actor, Stage, never, now, quick, receipt, workers_on
from groups import config, prompt

from actors.pool import RolloutPool
from actors.stacks import Place
from actors.weights import Published
from sppo_ray.errors import WorkerFailed
from sppo_ray.simulation.clock import run_virtual
from sppo_ray.types import Sampling

SAMPLING = Sampling(1.0, 1.0, 4, (0,))
pytestmark = pytest.mark.usefixtures("dumped")


def test_a_hung_worker_is_ended_and_its_calls_are_made_elsewhere(
    dumped: list[tuple[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    async def work(actor: Actor, *_: Any) -> tuple[str, float]:
        if actor.number == 0 and now() > 100:
            await asyncio.sleep(10**6)
        await asyncio.sleep(60)
        return actor.name, now()

    async def job() -> None:
        stage = Stage(work)
        workers = workers_on(stage, "hangs", "works")
        workers.all[0].place = Place("node", 7)
        for at in (60, 120):  # never more than 60 s without a finished call, so not hung
            assert {at for _, at in await asyncio.gather(workers.call("score"), workers.call("score"))} == {at}
        # From 120 s on the first hangs. Looks are 5 s apart and the limit is 100 s, then 3 s for its stacks.
        calls = await asyncio.gather(workers.call("score"), workers.call("score"))
        assert [at for _, at in calls] == [223 + 60, 180]
        assert dumped == [("hangs", 220)]
        assert len(stage.actors) == 3

    with caplog.at_level(logging.ERROR):
        run_virtual(job())
    assert (
        "hangs: hangs: no answer to any of its 1 calls in 100 s. Its stacks are in run/hangs.stacks.txt." in caplog.text
    )


def test_hanging_is_the_first_cause_that_is_named() -> None:
    async def hangs(actor: Actor, *_: Any) -> None:
        await asyncio.sleep(10**6)

    async def job() -> None:
        workers = workers_on(Stage(hangs), max_restarts=0)
        with pytest.raises(WorkerFailed, match=r"First cause: w: hangs: no answer to any of its 1 calls in 100 s\."):
            await workers.call("score")

    run_virtual(job())


def test_a_worker_that_takes_new_weights_does_not_hang() -> None:
    async def slow(actor: Actor, *_: Any) -> float:
        await asyncio.sleep(150)
        return now()

    async def job() -> None:
        workers = workers_on(Stage(slow))
        call = asyncio.create_task(workers.call("score"))
        await asyncio.sleep(10)
        workers.all[0].loading = True
        await asyncio.sleep(100)
        workers.all[0].loading = False
        assert await call == 150
        assert workers.revival.restarts == 0

    run_virtual(job())


def test_a_worker_that_leaves_is_not_started_again_even_if_it_hangs() -> None:
    async def hangs(actor: Actor, *_: Any) -> str:
        if actor.name == "leaves":
            await asyncio.sleep(10**6)
        return await quick(actor)

    async def job() -> None:
        stage = Stage(hangs)
        workers = workers_on(stage, "leaves", "stays")
        call = asyncio.create_task(workers.call("score"))
        await asyncio.sleep(1)
        leaving = workers.retire("leaves")
        assert await call == "stays"
        assert 100 <= now() <= 106
        assert leaving.load == 0
        workers.left(leaving)
        await asyncio.sleep(1000)
        assert len(stage.actors) == 2

    run_virtual(job())


class Hub:
    """As WeightsHub, for the driver's questions."""

    def __init__(self) -> None:
        self.version = 1
        self.current = SimpleNamespace(remote=self._current)

    def _current(self) -> Any:
        answer = asyncio.get_running_loop().create_future()
        answer.set_result(Published(self.version, "right", ()))
        return answer


def test_a_publish_passes_by_who_is_away_and_it_loads_that_before_its_first_call(tmp_path: Path) -> None:
    """w-1 dies in the middle of loading version 2, and takes 50 s to start; meanwhile version 3 is published."""

    async def start(actor: Actor) -> None:
        await asyncio.sleep(50)

    async def work(actor: Actor, method: str, *args: Any) -> Any:
        if actor.number == 1:
            actor.die("killed")
        await asyncio.sleep(1)
        return "right" if method == "load" else receipt()

    async def job() -> None:
        stage, hub = Stage(work, start), Hub()
        names = ("w-0", "w-1")
        handles = {name: stage.create(name) for name in names}
        pool = RolloutPool(config(tmp_path), handles, hub, create=stage.create)  # type: ignore[arg-type]
        hub.version = 2
        assert list(await pool.load(2)) == ["w-0"]
        hub.version = 3
        assert list(await pool.load(3)) == ["w-0"]
        assert now() < 5
        await asyncio.sleep(60)
        await asyncio.gather(*(pool.generate(prompt("p"), SAMPLING, 1) for _ in range(4)))
        returned = stage.actors[2]
        assert [call[:2] for call in returned.calls[:2]] == [("ping",), ("load", 3)]
        assert [call[0] for call in returned.calls[2:]] == ["generate", "generate"]
        assert list(await pool.load(3)) == list(names)
        assert pool.restarts == 1

    run_virtual(job())


def test_a_worker_that_hangs_in_a_load_is_started_again_and_too_often_is_left_out(tmp_path: Path) -> None:
    async def work(actor: Actor, method: str, *args: Any) -> Any:
        await asyncio.sleep(10**6 if actor.name == "w-1" else 1)
        return "right" if method == "load" else np.zeros(1)

    async def job() -> None:
        stage, hub = Stage(work), Hub()
        handles = {name: stage.create(name) for name in ("w-0", "w-1")}
        run = config(tmp_path, weights__timeout_s=20.0, cluster__max_restarts=1)
        pool = RolloutPool(run, handles, hub, create=stage.create)  # type: ignore[arg-type]
        assert list(await pool.load(1)) == ["w-0"]
        assert now() == 20
        await asyncio.sleep(100)
        assert list(await pool.load(1)) == ["w-0"]
        assert (await pool.stats()).keys() == {"w-0"}
        await pool.remove("w-1")
        assert len(stage.actors) == 3

    run_virtual(job())


def test_a_worker_that_hangs_when_it_is_to_sleep_is_started_again_and_sleeps_then(tmp_path: Path) -> None:
    async def work(actor: Actor, method: str, *args: Any) -> str:
        if method == "sleep" and actor.number == 0:
            await never()
        return "right"

    async def job() -> None:
        stage = Stage(work)
        pool = RolloutPool(  # type: ignore[arg-type]
            config(tmp_path, weights__timeout_s=20.0), {"w": stage.create("w")}, Hub(), create=stage.create
        )
        await pool.sleep()
        assert now() == pytest.approx(20.2)  # the name is free a moment after the end
        assert [call[0] for call in stage.actors[1].calls] == ["ping", "load", "sleep"]

    run_virtual(job())
