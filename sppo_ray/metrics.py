"""metrics.jsonl: one JSON object a line, each with `step` or `event`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sppo_ray.atomic import LineFile, line_of, make_folder, read_lines, write_bytes
from sppo_ray.secrets import hidden
from sppo_ray.storage import Storage


class MetricsLog:
    """Appends to a run's metrics, from any thread. Opened again after a restart, it skips steps and events it already holds,
    so work that is done again is not counted twice."""

    def __init__(self, path: Path, storage: Storage | None = None) -> None:
        self._storage = storage or Storage()
        make_folder(path.parent)
        self._known = {_key(line) for line in read_metrics(path)}  # the lines themselves would grow with the run
        self._file = LineFile(path)
        self._lock = threading.Lock()

    def forget(self, lost: Callable[[Mapping[str, Any]], bool]) -> int:
        """Take out lines, by their content: what they tell of will be done again, otherwise. Returns how many."""
        with self._lock:
            lines = read_metrics(self._file.path)
            kept = [line for line in lines if not lost(line)]
            if forgotten := len(lines) - len(kept):
                content = b"".join(line_of(line, checked=False) for line in kept)
                self._storage.patiently("metrics", self._file.path, lambda: write_bytes(self._file.path, content))
                self._file = LineFile(self._file.path)
                self._known = {_key(line) for line in kept}
            return forgotten

    def write(self, line: Mapping[str, Any]) -> bool:
        """Append a line, which is on disk then: a learner that goes on from a checkpoint does not make the lines before it
        again. Returns False, writing nothing, if its step or event is already there."""
        with self._lock:
            if _key(line) in self._known:
                return False
            self._storage.patiently("metrics", self._file.path, lambda: self._file.append(hidden(line)))
            self._known.add(_key(line))
            return True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines."""
    return read_lines(path)


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of an update, or of an event: what it is about and, where it has one, its moment."""
    if "step" in line:
        return "step", line["step"]
    return line.get("event"), *(line.get(name) for name in ("iteration", "version", "role", "at"))
