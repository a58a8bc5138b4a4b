"""Which rank of the learner hangs, from what they say, how it is ended, and how long the driver waits: small stories with
a clock in hand."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import learner_process, rank_pulse
from actors.learner_process import LearnerProcess
from actors.rank_pulse import Member, Watchman, start_pulse
from actors.ranks import Way
from actors.stacks import Place as Process
from sppo_ray.errors import WorkerDied
from sppo_ray.rank_watch import Place, RankWatch
from sppo_ray.simulation.clock import run_virtual

BACKWARD = Place(passed=40, step=12, what="backward")
UPDATE = Place(passed=41, step=12, what="optimizer step")
WAITING = Place(passed=30, step=12, what="waiting for a task", limited=False)


def watch(timeout_s: float = 100) -> RankWatch:
    return RankWatch(timeout_s)


def hear(watched: RankWatch, places: dict[int, Place], times: range) -> None:
    for now in times:
        for rank, place in places.items():
            watched.heard(rank, place, now)


def test_ranks_that_move_on_do_not_hang() -> None:
    watched = watch()
    for now in range(0, 1000, 10):
        hear(
            watched, {r: Place(passed=now // 90, step=now // 90, what="backward") for r in (0, 1)}, range(now, now + 1)
        )
        assert watched.hanging(now) == []


def test_the_rank_that_is_behind_is_named_and_the_others_waited() -> None:
    watched = watch()
    hear(watched, {0: UPDATE, 1: BACKWARD, 2: UPDATE}, range(0, 101, 10))
    assert watched.hanging(100) == []
    hear(watched, {0: UPDATE, 1: BACKWARD, 2: UPDATE}, range(110, 111))
    assert watched.hanging(110) == [1]
    assert watched.describe([1]) == (
        "learner-1 did not reach step 13 (it was last seen at step 12, backward) within 100 s; learner-0, learner-2 waited"
    )


def test_a_stopped_rank_is_told_from_those_that_wait_for_it_at_the_same_place() -> None:
    watched = watch()
    hear(watched, {0: BACKWARD, 1: BACKWARD}, range(0, 21, 10))
    hear(watched, {0: BACKWARD}, range(30, 111, 10))
    assert watched.hanging(110) == [1]


def test_ranks_that_hang_together_are_all_named() -> None:
    watched = watch()
    hear(watched, {0: BACKWARD, 1: BACKWARD}, range(0, 111, 10))
    assert watched.hanging(110) == [0, 1]
    assert watched.describe([0, 1]) == (
        "learner-0 did not reach step 13 (it was last seen at step 12, backward), "
        "learner-1 did not reach step 13 (it was last seen at step 12, backward) within 100 s"
    )


def test_waiting_for_a_task_may_take_any_time_but_not_in_silence() -> None:
    watched = watch()
    hear(watched, {0: WAITING, 1: WAITING}, range(0, 5001, 10))
    assert watched.hanging(5000) == []
    hear(watched, {0: WAITING}, range(5010, 5111, 10))
    assert watched.hanging(5110) == [1]


def test_a_rank_that_never_took_up_the_task_is_the_one_that_is_behind() -> None:
    """Its own place is one without limit."""
    watched = watch()
    hear(watched, {0: BACKWARD, 1: WAITING}, range(0, 111, 10))
    assert watched.hanging(110) == [1]


def test_a_single_rank_is_watched_too() -> None:
    watched = watch()
    hear(watched, {0: Place()}, range(0, 111, 10))
    assert watched.hanging(110) == [0]
    assert watched.describe([0]) == "learner-0 did not reach step 1 (it was last seen at step 0, starting) within 100 s"


def test_a_new_group_begins_with_no_past() -> None:
    watched = watch()
    hear(watched, {0: BACKWARD, 1: BACKWARD}, range(0, 1))
    watched.forget()
    assert watched.hanging(1000) == []


def test_a_rank_that_hangs_before_it_joins_the_others_is_the_one_that_is_behind() -> None:
    watched = watch()
    hear(watched, {0: Place(passed=1, what="joining the other ranks"), 1: Place()}, range(0, 111, 10))
    assert watched.hanging(110) == [1]


def test_a_rank_gives_signs_of_life_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no process group here. The third beat holds the thread."""
    way, heard, told = Way(), [], threading.Event()

    def beat(member: Member, place: Place) -> None:
        heard.append((member, place.what))
        way.at(f"beat {len(heard)}")
        if len(heard) == 3:
            told.set()
            threading.Event().wait()  # it ends with the process

    context = SimpleNamespace(
        get_placement_group_id=lambda: "group", current_actor="handle", get_node_id=lambda: "node"
    )
    monkeypatch.setattr(rank_pulse.ray, "get_runtime_context", lambda: context)
    start_pulse(1, way, SimpleNamespace(beat=SimpleNamespace(remote=beat)), timeout_s=600)
    assert told.wait(60)
    assert [what for _, what in heard] == ["starting", "beat 1", "beat 2"]
    assert {(member.group, member.rank, member.handle) for member, _ in heard} == {("group", 1, "handle")}


class Rank:
    """Stands for the handle of a rank that answers nothing."""

    def __init__(self, group: str, rank: int) -> None:
        self.member = Member(group, rank, self, Process("node", rank))
        self.__ray_ready__ = SimpleNamespace(remote=lambda: asyncio.get_running_loop().create_future())


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, float]]:
    """Group and rank of whom the watchman ended, and when; taking stacks takes 60 s."""
    found: list[tuple[str, int, float]] = []

    def now() -> float:
        return asyncio.get_running_loop().time()

    async def dump(name: str, *_: Any) -> Path:
        await asyncio.sleep(60)
        return Path(f"{name}.stacks.txt")

    monkeypatch.setattr(rank_pulse.stacks, "dump", dump)
    monkeypatch.setattr(rank_pulse, "time", SimpleNamespace(monotonic=now))
    monkeypatch.setattr(
        rank_pulse.ray, "kill", lambda handle: found.append((handle.member.group, handle.member.rank, now()))
    )
    return found


@pytest.mark.parametrize("later_s", [2, 30])
def test_a_group_that_begins_while_the_last_one_is_ended_is_watched(
    ended: list[tuple[str, int, float]], later_s: float
) -> None:
    """Both hang. The first is found at 105 s, asked until 110 s whether it lives, and its stacks are there at 170 s."""

    async def job() -> None:
        watchman = Watchman(100, "run")
        watching = asyncio.create_task(watchman.watch())
        for rank in (0, 1):
            watchman.heard(Rank("first", rank).member, BACKWARD)
        await asyncio.sleep(105 + later_s)
        watchman.heard(Rank("second", 0).member, BACKWARD)
        await asyncio.sleep(300)
        watching.cancel()
        assert [(group, rank) for group, rank, _ in ended] == [("first", 0), ("first", 1), ("second", 0)]
        assert [at for *_, at in ended[:2]] == [170, 170]
        assert "learner-0 did not reach step 13" in watchman.said

    run_virtual(job())


def test_ranks_that_nobody_starts_again_end_the_work(ended: list[tuple[str, int, float]]) -> None:
    """Ray Train's controller hangs too, say. The ranks, ended at 170 s, are waited for as long as any that start."""

    async def job() -> None:
        watchman = Watchman(100, "run")
        watchman.heard(Rank("first", 0).member, BACKWARD)
        with pytest.raises(
            WorkerDied, match=r"did not start its ranks again within 400 s\. learner-0 did not reach step 13"
        ):
            await watchman.over(asyncio.sleep(10**6))
        assert 570 < asyncio.get_running_loop().time() < 580

    run_virtual(job())


def test_an_error_of_the_watch_ends_the_work(
    ended: list[tuple[str, int, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(*_: Any) -> Path:
        raise RuntimeError("of the watch")

    async def job() -> None:
        watchman = Watchman(100, "run")
        watchman.heard(Rank("first", 0).member, BACKWARD)
        with pytest.raises(RuntimeError, match="of the watch"):
            await watchman.over(asyncio.sleep(10**6))

    monkeypatch.setattr(rank_pulse.stacks, "dump", fails)
    run_virtual(job())


def test_the_watch_ends_with_the_work() -> None:
    async def fails() -> None:
        raise RuntimeError("of the work")

    async def job() -> None:
        watchman = Watchman(100, "run")
        await watchman.over(asyncio.sleep(1000))
        with pytest.raises(RuntimeError, match="of the work"):
            await watchman.over(fails())
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_virtual(job())


def never_answering() -> Any:
    return SimpleNamespace(remote=lambda *_: asyncio.get_running_loop().create_future())


@pytest.mark.parametrize(("timeout_s", "limit_s"), [(60, 900), (1800, 2100)])
def test_the_wait_for_the_learners_ranks_has_an_end_after_their_own(timeout_s: float, limit_s: int) -> None:
    async def job() -> None:
        process = LearnerProcess(
            SimpleNamespace(fit=never_answering()), SimpleNamespace(learner_placed=never_answering()), timeout_s
        )
        with pytest.raises(WorkerDied, match=rf"^learner: not every rank was ready after {limit_s} s; is there room"):
            await process.placed()
        assert asyncio.get_running_loop().time() == limit_s

    run_virtual(job())


def test_a_learner_that_does_not_end_after_the_last_iteration_fails_no_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learner_process.ray, "wait", lambda references, timeout: ([], references))
    process = LearnerProcess(SimpleNamespace(fit=SimpleNamespace(remote=lambda: "reference")), None, 60)
    asyncio.run(process.join(7))
    assert "learner: still running 7 s after its last iteration" in caplog.text
