"""Ray Train's cleaner as this project uses it (actors/cleaner.py). With a real Ray: tests/actors/test_cleaner.py."""

from __future__ import annotations

import os
import queue

import pytest
import ray

from actors import cleaner
from actors.cleaner import EndingCleaner


def test_it_ends_though_the_controller_died_before_asking_it_to_watch(monkeypatch: pytest.MonkeyPatch):
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    monkeypatch.setattr(cleaner, "is_actor_alive", lambda **_: False)
    EndingCleaner("of a dead controller", check_interval_s=0.01, get_actor_timeout_s=1, stop_timeout=None)
    assert codes.get(timeout=60) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # SystemExit, which ends a thread
def test_asked_to_stop_it_exits_as_an_actor_does(monkeypatch: pytest.MonkeyPatch):
    """Anything else is an unexpected death, of which Ray tells the user at the end of every run."""
    exits: list[str] = []
    monkeypatch.setattr(os, "_exit", lambda code: exits.append("process"))
    monkeypatch.setattr(ray.actor, "exit_actor", lambda: exits.append("actor"))
    monkeypatch.setattr(cleaner, "is_actor_alive", lambda **_: True)
    watching = EndingCleaner("of a living controller", check_interval_s=0.01, get_actor_timeout_s=1, stop_timeout=60)
    watching.stop()
    assert exits == ["actor"]
