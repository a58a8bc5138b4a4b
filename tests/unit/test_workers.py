"""Death and return of workers, in virtual time, against actors of this process."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from fake_actors import Actor, Stage, never, now, quick, receipt, workers_on
from ray.exceptions import ActorDiedError, ObjectLostError, OutOfMemoryError, RayTaskError

from actors.revival import RESTART_LIMIT_S, back_off_s
from actors.stacks import Place
from actors.workers import failure
from sppo_ray.errors import GroupLost, WeightSyncError, WorkerDied, WorkerFailed
from sppo_ray.ledger import LedgerDamaged
from sppo_ray.simulation.clock import run_virtual

pytestmark = pytest.mark.usefixtures("dumped")


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


def test_a_worker_that_ray_ended_for_its_memory_is_started_again() -> None:
    async def work(actor: Actor, *_: Any) -> int:
        if actor.number == 0:
            actor.end(OutOfMemoryError("the node was low on memory"))
            await asyncio.sleep(1)
        return actor.number

    async def job() -> None:
        stage = Stage(work)
        workers = workers_on(stage)
        assert await workers.call("score") == 1
        stage.actors[1].end(OutOfMemoryError("again"))
        assert await workers.on(workers.all[0], "score") == 2

    run_virtual(job())


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OutOfMemoryError("the node was low on memory"), True),
        (ActorDiedError(), True),
        (RayTaskError("load", "traceback", WeightSyncError("version 3 did not arrive")), True),
        (RayTaskError("add", "traceback", LedgerDamaged("a shard")), True),
        (RayTaskError("add", "traceback", ValueError("a bug")), False),
    ],
)
def test_what_a_new_start_of_all_actors_may_mend(error: Exception, again: bool) -> None:
    assert isinstance(failure("buffer", error), WorkerDied) == again


def test_a_call_leaves_a_node_on_which_a_worker_died() -> None:
    """A lost node takes all its workers, of which the others still look well; the idle ones would be taken first."""

    async def work(actor: Actor, *_: Any) -> str:
        if actor.name != "far":
            actor.die("its node is gone")
        await asyncio.sleep(1)
        return actor.name

    async def job() -> None:
        stage = Stage(work)
        workers = workers_on(stage, "far", "a", "b", "c", "d")
        for worker in workers.all:
            worker.place = Place("far" if worker.name == "far" else "near", 1)
        workers.all[0].load = 100
        assert await workers.call("score") == "far"
        assert [actor.name for actor in stage.actors if actor.ended.done()] == ["a"]

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
        assert workers.lost_calls["score"] > 0
        assert workers.lost_calls.total() == workers.lost_calls["score"]
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
        assert workers.all[0].place == Place("node of w", 1)
        assert now() == 800 + 800 + 800  # it died, it came back, it was asked

    run_virtual(job())


def test_the_name_is_taken_a_while_after_the_death() -> None:
    async def job() -> None:
        stage = Stage(quick, free_s=1.3)
        workers = workers_on(stage)
        stage.actors[0].die("gone")
        assert await workers.call("score") == "w"
        assert stage.created_at == [0, pytest.approx(1.4)]  # asked for every 0.2 s

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
