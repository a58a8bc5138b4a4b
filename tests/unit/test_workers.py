"""Death, return and hanging of workers, in virtual time, against actors of this process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_actors import Actor, Stage, receipt
from groups import config, prompt
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from actors import revival
from actors.pool import RolloutPool
from actors.revival import RESTART_LIMIT_S, Worker, back_off_s
from actors.stacks import Place
from actors.weights import Published
from actors.workers import Workers
from sppo_ray.errors import GroupLost, WorkerDied, WorkerFailed
from sppo_ray.simulation.clock import run_virtual
from sppo_ray.types import Sampling

SAMPLING = Sampling(1.0, 1.0, 4, (0,))
Work = Callable[..., Coroutine[Any, Any, Any]]


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def dumped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Whose stacks were taken, and when; it takes 3 s."""
    taken = []

    async def dump(name: str, node_id: str, pid: int, run_dir: str) -> Path:
        taken.append((name, now()))
        await asyncio.sleep(3)
        return Path(run_dir) / f"{name}.stacks.txt"

    monkeypatch.setattr(revival, "dump", dump)
    monkeypatch.setattr(revival.ray, "kill", lambda actor: actor.die("killed by ray.kill"))
    return taken


async def rejoin(worker: Worker) -> None:
    worker.returning = None


def workers_on(stage: Stage, *names: str, max_restarts: int = 3, timeout_s: float = 100.0) -> Workers:
    handles = {name: stage.create(name) for name in names or ("w",)}
    return Workers(handles, stage.create, rejoin, timeout_s, max_restarts, "run")  # type: ignore[arg-type]


async def quick(actor: Actor, *_: Any) -> str:
    await asyncio.sleep(1)
    return actor.name


def test_the_pauses_before_restarts() -> None:
    assert [back_off_s(deaths) for deaths in range(1, 11)] == [0, 1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_crash_loop_is_slowed_down_and_ends_with_its_first_cause() -> None:
    async def start(actor: Actor) -> None:
        actor.die(f"out of memory at start {actor.number}")
        await asyncio.sleep(1)

    async def work(actor: Actor, *_: Any) -> None:
        actor.die("killed by signal 9")
        await asyncio.sleep(1)

    async def job() -> None:
        stage = Stage(work, start)
        workers = workers_on(stage, max_restarts=5)
        cause = (
            r"^w: died 6 times .*max_restarts is 5\). First cause: RayActorError: killed by signal 9\. .*logs/w\.log"
        )
        with pytest.raises(WorkerFailed, match=cause) as failed:
            await workers.call("score")
        assert not isinstance(failed.value, WorkerDied)  # for which the run would be started again
        assert stage.created_at == [0, 0, 1, 3, 7, 15]
        assert workers.revival.restarts == 5
        with pytest.raises(WorkerFailed, match="signal 9"):
            await workers.on_each("stats")

    run_virtual(job())


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


def test_the_others_go_on_without_one_that_is_gone() -> None:
    async def work(actor: Actor, *_: Any) -> str:
        if actor.name == "bad":
            actor.die("broken")
        return await quick(actor)

    async def job() -> None:
        stage = Stage(work)
        workers = workers_on(stage, "bad", "good", max_restarts=1)
        assert set(await asyncio.gather(*(workers.call("score") for _ in range(20)))) == {"good"}
        while workers.all[0].gone is None:
            await workers.call("score")
        assert await workers.on_each("stats") == {"good": "good"}
        assert len([actor for actor in stage.actors if actor.name == "bad"]) == 2

    run_virtual(job())


def test_an_error_in_the_constructor_at_the_first_start_is_final() -> None:
    class Broken(Actor):
        async def answer(self, method: str, args: tuple[Any, ...]) -> Any:
            raise ActorDiedError(RayTaskError("__init__", "Traceback\nValueError: no such model", ValueError()))

    async def job() -> None:
        stage = Stage(quick)
        workers = workers_on(stage)
        workers.all[0].handle = Broken(stage, "w", quick, quick)  # type: ignore[assignment]
        with pytest.raises(WorkerFailed, match=r"^w: could not start: ValueError: no such model\. Its log"):
            await workers.started(workers.all[0])
        assert len(stage.actors) == 1

    run_virtual(job())


async def never(*_: Any) -> None:
    await asyncio.sleep(10**6)


def test_a_worker_that_nobody_can_place_ends_the_wait_for_it() -> None:
    async def job() -> None:
        stage = Stage(quick, never)
        workers = workers_on(stage)
        with pytest.raises(
            WorkerFailed, match=r"^w: does not serve after 900 s; is there room for it in the cluster\? "
        ):
            await workers.started(workers.all[0])
        assert now() == RESTART_LIMIT_S
        assert len(stage.actors) == 1

    run_virtual(job())


def test_a_worker_that_dies_at_its_first_start_has_the_whole_limit_again() -> None:
    async def start(actor: Actor) -> None:
        await asyncio.sleep(800)
        if actor.number == 0:
            actor.die("killed")
            await asyncio.sleep(1)

    async def job() -> None:
        workers = workers_on(Stage(quick, start))
        await workers.started(workers.all[0])
        assert workers.all[0].place == "place of w"
        assert now() == 800 + 800 + 800  # it died, it came back, it was asked

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


def test_the_name_is_taken_a_while_after_the_death() -> None:
    async def job() -> None:
        stage = Stage(quick, free_s=1.3)
        workers = workers_on(stage)
        stage.actors[0].die("gone")
        assert await workers.call("score") == "w"
        assert stage.created_at == [0, pytest.approx(1.4)]  # asked for every 0.2 s

    run_virtual(job())


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


def test_a_worker_that_takes_new_weights_does_not_hang(dumped: list[tuple[str, float]]) -> None:
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


def test_a_worker_that_leaves_while_it_restarts_stays_away() -> None:
    async def job() -> None:
        stage = Stage(quick, free_s=30)
        workers = workers_on(stage, "leaves", "stays")
        stage.actors[0].die("gone")
        assert await workers.call("score") == "stays"
        workers.left(workers.retire("leaves"))
        await asyncio.sleep(100)
        assert len(stage.actors) == 2

    run_virtual(job())


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_group_that_died_with_its_node_is_lost_not_the_worker(wrapped: bool) -> None:
    lost = ObjectLostError("ab12", None, "")

    async def work(actor: Actor, *_: Any) -> None:
        raise lost

    class Direct:
        def options(self, num_returns: int) -> Direct:
            return self

        def remote(self, *_: Any) -> Any:
            answer = asyncio.get_running_loop().create_future()
            answer.set_exception(lost)
            return None, answer

    async def job() -> None:
        workers = workers_on(Stage(work))
        if not wrapped:
            workers.all[0].handle = SimpleNamespace(generate=Direct())  # type: ignore[assignment]
        with pytest.raises(GroupLost, match="group of prompt 'p7' was lost before generate: ObjectLostError"):
            await workers.call_for_receipt("generate", None, receipt("p7"))
        assert workers.all[0].up

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
