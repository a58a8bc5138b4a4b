"""A store that fails or hangs as a test wants it."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

from fsspec.implementations.memory import MemoryFileSystem

from sppo_ray import mirror


class Unsteady(MemoryFileSystem):
    """Keeps files in memory; fails at the uploads whose numbers are given, hangs while its gate is closed."""

    protocol = "unsteady"
    store: dict = {}  # noqa: RUF012 - as in the base class, but its own
    pseudo_dirs = [""]  # noqa: RUF012
    uploads, failing = 0, frozenset()
    gate = threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("unsteady:/"))

    def put_file(self, lpath, rpath, **kwargs):
        Unsteady.uploads += 1
        Unsteady.gate.wait()
        if Unsteady.uploads - 1 in Unsteady.failing:
            super().pipe_file(rpath, b"half")
            raise TimeoutError("the store does not answer")
        super().put_file(lpath, rpath, **kwargs)


def clock_from_the_first_upload(monkeypatch):
    """For the mirror: a busy machine may take its time to begin, which is no silence of the store."""
    begun: list[float] = []

    def now() -> float:
        if Unsteady.uploads and not begun:
            begun.append(time.monotonic())
        return time.monotonic() - begun[0] if begun else 0.0

    monkeypatch.setattr(mirror, "time", SimpleNamespace(monotonic=now))
