"""Files that survive a crash and a power cut: whole or absent, their names and folders on disk too; and the checksums by which
a damaged one is told.

The order is always write -> fsync(file) -> rename -> fsync(folder). After a failed fsync the data is written anew: Linux
reports such an error once and takes the lost pages for clean afterwards.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

log = logging.getLogger(__name__)

BLOCK = 1 << 22  # bytes read at once


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on a clean exit it becomes `path`, on an error it is removed.

    If it raises OSError, `path` is as it was, or new but perhaps not on disk yet: write it again.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # the error that brought us here is the one to be seen
            temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def make_folder(path: Path) -> None:
    """The folder and what its path lacks; their names are on disk when this returns."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    try:
        sync(path.parent)
    except OSError:
        path.rmdir()  # or the next attempt would take its name for durable
        raise


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class LineFile:
    """A file of JSON objects, one a line, that one process appends to."""

    def __init__(self, path: Path) -> None:
        """What a crash left of a last line is overwritten by the next one."""
        self.path = path
        self._size = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        self._named = False  # whether the file's name is known to be on disk

    def append(self, data: Mapping[str, Any]) -> None:
        """On disk when this returns. If it raises OSError, the next append takes the place of whatever this one wrote."""
        line = json.dumps(data, allow_nan=False).encode() + b"\n"
        make_folder(self.path.parent)
        self.path.touch()
        with self.path.open("r+b", buffering=0) as file:  # a buffer would be flushed once more on the way out
            try:
                file.seek(self._size)
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                file.truncate()
                os.fsync(file.fileno())
            except OSError:
                with suppress(OSError):
                    file.truncate(self._size)
                raise
        if not self._named:
            sync(self.path.parent)
            self._named = True
        self._size += len(line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines. Without a last line that a crash cut off, and, with a warning, without lines that
    are damaged."""
    if not path.exists():
        return []
    data = path.read_bytes()
    found = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), start=1):
        if (record := _object(line)) is not None:
            found.append(record)
        else:
            log.warning("line %d of %s is damaged and is left out", number, path)
    return found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return record if isinstance(record, dict) else None


def checksum_of(path: Path) -> str:
    """xxh3 (64 bits, hexadecimal) of a file's bytes."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksums_of(folder: Path) -> dict[str, str]:
    """`checksum_of` by file name, of every file in a folder; {} if there is no such folder."""
    return {path.name: checksum_of(path) for path in sorted(folder.glob("*")) if path.is_file()}
