"""Files that are either whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on a clean exit it becomes `path`, on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_line(path: Path, data: dict[str, Any]) -> None:
    """One JSON object as a line; on disk when this returns, and not in the file at all if it raises."""
    new = not path.exists()
    with path.open("ab") as file:
        size = file.tell()
        try:
            file.write(json.dumps(data).encode() + b"\n")
            file.flush()
        except OSError:
            file.truncate(size)
            raise
    sync(path)
    if new:
        sync(path.parent)


def read_whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file that is appended to, one a line; a last line cut off by a crash is removed from it."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
