"""Ray Train's cleaner as this project uses it (actors/cleaner.py). On a cluster it is seen in tests/actors/test_job.py."""

from __future__ import annotations

import os
import queue

import pytest
from ray.train.v2._internal.execution.controller import placement_group_cleaner

from actors.cleaner import EndingCleaner


def test_it_ends_its_process_though_the_controller_died_before_asking_it_to_watch(monkeypatch: pytest.MonkeyPatch):
    codes: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(os, "_exit", codes.put)
    monkeypatch.setattr(placement_group_cleaner, "is_actor_alive", lambda **_: False)
    EndingCleaner("of a dead controller", check_interval_s=0.01, get_actor_timeout_s=1, stop_timeout=None)
    assert codes.get(timeout=60) == 0
