"""A store that fails or hangs as a test wants it."""

from __future__ import annotations

import threading

from fsspec.implementations.memory import MemoryFileSystem


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
