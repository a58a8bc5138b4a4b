"""Ray Train's cleaner as this project uses it (actors/cleaner.py). On a cluster it is seen in tests/actors/test_job.py."""

from __future__ import annotations

import os
import queue
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2._internal.execution.controller import placement_group_cleaner

from actors.cleaner import EndingCleaner


def test_it_asks_its_own_ray_and_ends_though_the_controller_died_before_asking_it_to_watch(
    monkeypatch: pytest.MonkeyPatch,
):
    codes: queue.Queue[int] = queue.Queue()
    asked: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "some other")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://some.other")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setattr(os, "_exit", codes.put)
    monkeypatch.setattr(placement_group_cleaner, "is_actor_alive", lambda **_: asked.append(os.environ["RAY_ADDRESS"]))
    EndingCleaner("of a dead controller", check_interval_s=0.01, get_actor_timeout_s=1, stop_timeout=None)
    assert codes.get(timeout=60) == 0
    assert asked == ["127.0.0.1:1"]
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit, which ends a thread
def test_asked_to_stop_it_exits_as_an_actor_does(monkeypatch: pytest.MonkeyPatch):
    """Anything else is an unexpected death, of which Ray tells the user at the end of every run."""
    exits: list[str] = []
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="127.0.0.1:1"))
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr(os, "_exit", lambda code: exits.append("process"))
    monkeypatch.setattr(ray.actor, "exit_actor", lambda: exits.append("actor"))
    monkeypatch.setattr(placement_group_cleaner, "is_actor_alive", lambda **_: True)
    cleaner = EndingCleaner("of a living controller", check_interval_s=0.01, get_actor_timeout_s=1, stop_timeout=60)
    cleaner.stop()
    assert exits == ["actor"]
