"""metrics.jsonl: one JSON object a line, each with `step` or `iteration`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends to a run's metrics. Opened again after a restart, it skips steps and iterations it already holds, so work
    that is done again is not counted twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = read_metrics(path)
        self._known = {_key(line) for line in self.lines}
        _cut_unfinished_line(path)

    def write(self, line: Mapping[str, Any]) -> bool:
        """Append a line; returns False, writing nothing, if its step or event is already there."""
        if _key(line) in self._known:
            return False
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self._known.add(_key(line))
        self.lines.append(dict(line))
        return True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _key(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of an update, or of an event: what it is about and, where it has one, its moment."""
    if "step" in line:
        return "step", line["step"]
    return line["event"], *(line.get(name) for name in ("iteration", "version", "role", "at"))


def _cut_unfinished_line(path: Path) -> None:
    if path.exists():
        data = path.read_bytes()
        if len(data) != data.rfind(b"\n") + 1:
            with path.open("r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)
