"""Calls on the buffer and the hub, in virtual time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import bookkeepers, train
from actors.bookkeepers import ANSWER_LIMIT_S, answered
from actors.stacks import Place
from sppo_ray.errors import WorkerDied, WorkerFailed
from sppo_ray.simulation.clock import run_virtual


async def after(seconds: float) -> str:
    await asyncio.sleep(seconds)
    return "here"


def test_an_answer_just_in_time_counts() -> None:
    assert run_virtual(answered("buffer", after(ANSWER_LIMIT_S - 1))) == "here"


def test_what_waits_for_its_disk_may_take_that_much_longer() -> None:
    assert run_virtual(answered("buffer", after(ANSWER_LIMIT_S + 599), patience_s=600)) == "here"


def test_who_hangs_is_named_with_its_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def dump(*asked: object) -> Path:
        assert asked == ("weights", "node", 7, "runs/x")
        return Path("runs/x/logs/weights.stacks.txt")

    async def job() -> float:
        with pytest.raises(
            WorkerDied, match=r"^weights: hangs: no answer in 300 s. Its stacks are in .*weights.stacks.txt"
        ):
            await answered("weights", after(1e9), Place("node", 7), "runs/x")
        return asyncio.get_running_loop().time()

    monkeypatch.setattr(bookkeepers, "dump", dump)
    assert run_virtual(job()) == ANSWER_LIMIT_S


@pytest.mark.parametrize("stopped", ["learner", "weights", "buffer"])
def test_a_run_notices_which_of_them_hangs(monkeypatch: pytest.MonkeyPatch, stopped: str) -> None:
    """While nobody else would call it: the learner trains, or the rollout workers sample."""

    async def ask(name: str) -> Any:
        if name == stopped:
            await after(1e9)
        return SimpleNamespace(step=None, trouble="")

    async def dump(*_: object) -> Path:
        return Path("stacks.txt")

    monkeypatch.setattr(bookkeepers, "dump", dump)
    monkeypatch.setattr(train, "call", lambda handle, name, method: ask(name))
    learner = SimpleNamespace(check=lambda: None, ping=lambda: ask("learner"))
    buffer = SimpleNamespace(look=lambda: ask("buffer"))
    places = dict.fromkeys(("learner", "weights", "buffer"), Place("node", 7))
    now: Any = SimpleNamespace(learner=learner, hub=None, buffer=buffer, places=places)
    with pytest.raises(WorkerDied, match=rf"^{stopped}: hangs: no answer in 300 s. Its stacks are in stacks.txt"):
        run_virtual(train._follow(now, None, None, "runs/x"))


def test_at_the_start_nobody_knows_yet_where_it_is() -> None:
    with pytest.raises(WorkerDied, match=r"^buffer: hangs: no answer in 300 s.$"):
        run_virtual(answered("buffer", after(1e9)))


def test_its_own_failure_comes_through() -> None:
    async def fails() -> None:
        raise WorkerFailed("buffer: no")

    with pytest.raises(WorkerFailed, match="buffer: no"):
        run_virtual(answered("buffer", fails()))
