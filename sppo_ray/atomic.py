"""Files that survive a crash and a power cut: whole or absent, their names and folders on disk too; and the checksums by which
a damaged one is told.

The order is always write -> fsync(file) -> rename -> fsync(folder). After a failed fsync the data is written anew: Linux
reports such an error once and takes the lost pages for clean afterwards.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash

log = logging.getLogger(__name__)

BLOCK = 1 << 22  # bytes read at once
CHECK = b', "xxh3": "'  # in a checked line, before `hash_of` the object without it
_numbers = itertools.count()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary sibling to write to; on a clean exit it becomes `path`, on an error it is removed.

    If it raises OSError, `path` is as it was, or new but perhaps not on disk yet: write it again.
    """
    make_folder(path.parent)
    temporary = temporary_beside(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # the error that brought us here is the one to be seen
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """A sibling's name that no other writer uses. Of the kind `.*.tmp`: what a killed process left is cleared by that."""
    return path.with_name(f".{path.name}.{os.getpid()}.{next(_numbers)}.tmp")


def remove_folder(path: Path) -> None:
    """A kill half-way leaves it whole or under a temporary name, never a part of it under its own."""
    doomed = temporary_beside(path)
    path.rename(doomed)
    sync(path.parent)
    shutil.rmtree(doomed)


def write_bytes(path: Path, content: bytes) -> None:
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


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

    def __init__(self, path: Path, checked: bool = False) -> None:
        """checked: each line with its checksum. What a crash left of a last line, and where lines are checked all from the
        first damaged one on, is overwritten by the next one."""
        self.path, self._checked = path, checked
        content = path.read_bytes() if path.exists() else b""
        self._size = sum(map(len, _proven_lines(content))) if checked else content.rfind(b"\n") + 1
        self._named = False  # whether the file's name is known to be on disk

    def append(self, data: Mapping[str, Any]) -> None:
        """On disk when this returns. If it raises OSError, the next append takes the place of whatever this one wrote."""
        line = line_of(data, self._checked)
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


def line_of(data: Mapping[str, Any], checked: bool) -> bytes:
    """checked: with a checksum, as the last key of the object."""
    text = json.dumps(data, allow_nan=False).encode()
    return (_checked(text) if checked else text) + b"\n"


def _checked(text: bytes) -> bytes:
    return text[:-1] + CHECK + hash_of(text).encode() + b'"}'


def read_checked_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of checked lines, up to the first line that is not what was written."""
    content = path.read_bytes() if path.exists() else b""
    lines = list(_proven_lines(content))
    if len(lines) < content.count(b"\n"):
        log.warning("line %d of %s is damaged; it and those after it are left out", len(lines) + 1, path)
    return [json.loads(_unchecked(line)) for line in lines]


def _proven_lines(content: bytes) -> Iterator[bytes]:
    for line in content.splitlines(keepends=True):
        if line != _checked(_unchecked(line)) + b"\n":
            return
        yield line


def _unchecked(line: bytes) -> bytes:
    return line.rpartition(CHECK)[0] + b"}"


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


def hash_of(content: bytes) -> str:
    """xxh3 (64 bits, hexadecimal)."""
    return xxhash.xxh3_64_hexdigest(content)


def checksum_of(path: Path) -> str:
    """`hash_of` a file's bytes."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def checksums_of(folder: Path) -> dict[str, str]:
    """`checksum_of` by file name, of every file in a folder; {} if there is no such folder."""
    return {path.name: checksum_of(path) for path in sorted(folder.glob("*")) if path.is_file()}
