"""The folder of checkpoints: each whole or absent, its files proven by checksums, the newest few kept, damaged ones set aside.

What is in them is for others (`actors.checkpoint`); here they are files.

    <root>/step-<n>/*                 the files
    <root>/step-<n>/COMPLETE          JSON, written last: what the writer notes, bytes and xxh3 of every file
    <root>/step-<n>.corrupt/          set aside: kept for whoever wants to know, never read again
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_ray.atomic import checksum_of, hash_of, make_folder, remove_folder, sync, temporary_beside
from sppo_ray.types import ResumePoint

MARKER = "COMPLETE"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that was found whole."""

    folder: Path
    step: int
    notes: Mapping[str, Any]  # what its writer had to say


@contextmanager
def new_checkpoint(root: Path, step: int, notes: Mapping[str, Any], keep: int) -> Iterator[Path]:
    """Yields a folder to write the files to; on a clean exit it is on disk as the checkpoint of `step`, and older ones than
    the newest `keep` are gone. On an error nothing is left of it.

    notes: anything JSON holds.
    """
    make_folder(root)
    temporary = temporary_beside(root / f"step-{step}")
    temporary.mkdir()
    try:
        yield temporary
        files = {path.name: _facts(path) for path in sorted(temporary.iterdir())}
        content = {"step": step, "notes": dict(notes), "files": files}
        (temporary / MARKER).write_text(
            json.dumps(content | {"xxh3": _hash(content)}, indent=2) + "\n", encoding="utf-8"
        )
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        final = root / f"step-{step}"
        if final.exists():  # the same step of an attempt that was given up
            remove_folder(final)
        temporary.rename(final)
        sync(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for _, folder in _listed(root)[keep:]:
        remove_folder(folder)


def newest(root: Path, wanted: Callable[[Checkpoint], bool]) -> Checkpoint | None:
    """The newest undamaged checkpoint that is wanted. Damaged ones are named in the log and set aside; undamaged ones that
    are not wanted are removed, they belong to a past that is not gone on from; and so is what an interrupted writer or
    removal left."""
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    for step, folder in _listed(root):
        try:
            found = _checked(folder, step)
        except ValueError as error:
            _set_aside(folder, str(error))
            continue
        if wanted(found):
            return found
        remove_folder(folder)
    return None


def fits(checkpoint: Checkpoint, start: ResumePoint) -> bool:
    """Whether it lies in the iteration that begins at `start`, and not beyond what may be gone on from. Its writer notes
    `first_step`: the updates done before its iteration."""
    beyond = start.up_to is not None and checkpoint.step > start.up_to
    return bool(checkpoint.notes["first_step"] == start.step < checkpoint.step) and not beyond


def clear(root: Path) -> None:
    """Remove all checkpoints; those set aside stay."""
    for _, folder in _listed(root):
        remove_folder(folder)


def _listed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder), newest first."""
    matches = [(re.fullmatch(r"step-(\d+)", path.name), path) for path in root.glob("step-*")]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def _checked(folder: Path, step: int) -> Checkpoint:
    """Raises ValueError that says what is damaged."""
    try:
        content = json.loads((folder / MARKER).read_bytes())
        proven = content.pop("xxh3") == _hash(content) and content["step"] == step
    except FileNotFoundError:
        raise ValueError(f"there is no {MARKER} file") from None
    except (ValueError, KeyError, TypeError, AttributeError):  # not JSON, or not ours
        proven = False
    if not proven:
        raise ValueError(f"the {MARKER} file is damaged")
    for name, facts in content["files"].items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        found = _facts(folder / name)
        if found["bytes"] != facts["bytes"]:
            raise ValueError(f"{name} has {found['bytes']} bytes instead of {facts['bytes']}")
        if found["xxh3"] != facts["xxh3"]:
            raise ValueError(f"the checksum of {name} is {found['xxh3']} instead of {facts['xxh3']}")
    return Checkpoint(folder, step, content["notes"])


def _set_aside(folder: Path, reason: str) -> None:
    target = folder.with_name(f"{folder.name}.corrupt")
    if target.exists():  # one of an earlier attempt at the same step
        remove_folder(target)
    folder.rename(target)
    sync(folder.parent)
    logger.error(
        "The checkpoint %s is damaged: %s. It is set aside as %s; an earlier one is used.", folder, reason, target
    )


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": checksum_of(path)}


def _hash(content: Mapping[str, Any]) -> str:
    return hash_of(json.dumps(content, sort_keys=True).encode())
