"""A copy of the run directory in remote storage, kept up while the run goes on: `run.mirror`.

What is copied is what a run needs to go on elsewhere, and its results: config, manifest, metrics, ledger shards, tables,
policies, checkpoints. Not copied: `logs/`, `weights/` (they pass through), temporary files, what was set aside as damaged.
Copied back to an empty folder, the mirror is a run directory that `sppo train --resume` takes.

Config, manifest and metrics are uploaded first: a learner that goes on from a checkpoint does not make the lines before it again.
The other files follow in the order in which they were written, and an upload that fails ends the pass. So a marker that is
written last (sealed.json, trained.json, COMPLETE) is never in the mirror before what it marks. Nothing is deleted there but
checkpoints that are no longer kept in the run directory.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem
from tenacity import AsyncRetrying, RetryCallState, stop_after_delay, wait_exponential
from tenacity.stop import stop_base, stop_never

from sppo_ray.atomic import write_json
from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.ledger import SEALED, TRAINED, read_record
from sppo_ray.run_dir import read_manifest
from sppo_ray.storage import StorageError
from sppo_ray.threads import in_daemon_thread

log = logging.getLogger(__name__)

EVERY_S = 20.0
SILENCE_S = 120.0  # of a store that takes nothing and says nothing, until it counts; of one that fails, until a run ends without it
SLOWEST = 10 << 20  # bytes per second of a store that may be silent for the length of a file
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
STATE = ".mirror.json"  # in the run directory: what is in the mirror
LEFT_OUT = ("logs", "weights")
OWN = re.compile(
    r"(config\.yaml|manifest\.json|metrics\.jsonl|scale\.json|iter_\d+|checkpoints)(\.part)?"
)  # at the top of a mirror
FIRST, MARKERS = ("config.yaml", "manifest.json", "metrics.jsonl"), (SEALED, TRAINED, "COMPLETE")
# Where a file appears when its upload is complete; elsewhere it is uploaded beside its place and renamed.
WHOLE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "abfs", "adl", "az", "oss", "oci", "tos", "hf", "memory"}

Mark = list[int]  # size, mtime in ns: by which a file is known to have changed


class Mirror:
    """One background copier, in the driver."""

    def __init__(self, config: Config, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
        """say, warn: for the user, one message at a time. `config.run.mirror` must be given."""
        assert config.run.mirror is not None
        self._root, self._url = Path(config.run.dir), config.run.mirror
        self._say, self._warn = say, warn
        self._lock = threading.Lock()  # a cancelled pass leaves its thread at work on one file
        self._moved = 0.0  # when the store last took something, or failed
        self._limit_s = SILENCE_S  # until it counts as silent
        self._down = False  # as the user was told
        self._store, self._place = fsspec.core.url_to_fs(self._url)
        self._mirrored: dict[str, Mark] | None = None

    async def follow(self) -> None:
        """Keeps the mirror up to date; never returns. A store that fails is tried again, and the run goes on."""
        while True:
            one_pass = asyncio.create_task(self._persistently(stop_never))
            try:
                if await self._hangs(one_pass):
                    self._is_down(f"took nothing for {self._limit_s:.3g} s; the run goes on")
                await one_pass
            finally:
                one_pass.cancel()
            await asyncio.sleep(EVERY_S)

    async def finish(self) -> None:
        """The last pass, at the end of a run. A warning is all that a store which still fails makes of it."""
        last = asyncio.create_task(self._persistently(stop_after_delay(SILENCE_S)))
        try:
            if await self._hangs(last):
                last.cancel()
                raise TimeoutError(f"the store took nothing for {self._limit_s:.3g} s")
            await last
        except Exception as error:  # noqa: BLE001 - stores raise errors of many kinds; the run itself is done
            missing = sum(1 for _ in self._changed())
            self._warn(
                f"the mirror {self._url} is not complete, {missing} files are missing or old ({error}). The run directory "
                f"{self._root} is: copy it by hand, or run the same command again when the store works."
            )

    async def _hangs(self, work: asyncio.Task[None]) -> bool:
        """Waits until `work` is done, or the store has neither taken anything nor failed for too long."""
        self._moved = time.monotonic()
        while not work.done():
            left = self._moved + self._limit_s - time.monotonic()
            if left <= 0:
                return True
            await asyncio.wait([work], timeout=left)
        return False

    def _moves(self, *_: int | None, **__: object) -> None:
        """The store took something, or failed."""
        self._moved = time.monotonic()

    def _is_down(self, how: str) -> None:
        if not self._down:
            self._down = True
            self._warn(f"the mirror {self._url} {how}")

    async def _persistently(self, stop: stop_base) -> None:
        def outage(state: RetryCallState) -> None:
            assert state.outcome is not None
            self._moves()
            log.warning("mirror %s: %r", self._url, state.outcome.exception())
            self._is_down(f"fails ({state.outcome.exception()}); the run goes on, and the copying is tried again")

        wait = wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S)
        # Any error: each store has its own kinds, and none of them may harm the run.
        await AsyncRetrying(wait=wait, stop=stop, before_sleep=outage, reraise=True)(self._pass)
        if self._down:
            self._down = False
            self._say(f"the mirror {self._url} works again and is up to date")

    async def _pass(self) -> None:
        stop = threading.Event()
        try:
            await in_daemon_thread(lambda: self.copy(stop))
        finally:
            stop.set()

    def copy(self, stop: threading.Event | None = None) -> None:
        """One pass. Raises what the store raises; what was copied before that is not copied again. stop: ends it before the
        next file."""
        with self._lock:
            if stop and stop.is_set():
                return
            if self._mirrored is None:
                self._mirrored = self._known()
            before = dict(self._mirrored)
            try:
                for name, path, mark in list(self._changed()):
                    if stop and stop.is_set():
                        return
                    self._upload(path, f"{self._place}/{name}")
                    self._mirrored[name] = mark
                self._forget_old_checkpoints()
            finally:
                if self._mirrored != before:
                    with suppress(OSError):  # without it the next process copies everything again
                        write_json(self._root / STATE, {"url": self._url, "files": self._mirrored})

    def _known(self) -> dict[str, Mark]:
        """What earlier passes say they copied, if it is still there."""
        try:
            state = read_record(self._root / STATE) or {}
        except StorageError:
            return {}
        if state.get("url") != self._url:
            return {}
        there: dict[str, Any] = self._store.find(self._place, detail=True)
        sizes = {name.removeprefix(f"{self._place}/"): facts["size"] for name, facts in there.items()}
        return {name: mark for name, mark in state["files"].items() if sizes.get(name) == mark[0]}

    def _changed(self) -> Iterator[tuple[str, Path, Mark]]:
        """Files that the mirror lacks or has an older state of, FIRST ones first, then in the order in which they were written."""
        found = [(path, mark) for path in _files(self._root) if (mark := _mark(path)) is not None]
        for path, mark in sorted(
            found, key=lambda item: (item[0].name not in FIRST, item[1][1], item[0].name in MARKERS)
        ):
            name = path.relative_to(self._root).as_posix()
            if (self._mirrored or {}).get(name) != mark:
                yield name, path, mark

    def _upload(self, path: Path, target: str) -> None:
        callback = Callback(hooks={"moves": self._moves})
        try:
            # Some stores, local folders among them, say nothing while they take a file.
            self._limit_s = SILENCE_S + path.stat().st_size / SLOWEST
            self._moves()
            protocol = {self._store.protocol} if isinstance(self._store.protocol, str) else {*self._store.protocol}
            if protocol & WHOLE_AT_ONCE:
                self._store.put_file(str(path), target, callback=callback)
            else:
                self._store.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._store.put_file(str(path), f"{target}.part", callback=callback)
                self._store.mv(f"{target}.part", target)
        except FileNotFoundError:
            if path.exists():
                raise  # it is the store that misses something; a file that was removed meanwhile is not
        finally:
            self._limit_s = SILENCE_S
            self._moves()

    def _forget_old_checkpoints(self) -> None:
        assert self._mirrored is not None
        for name in [name for name in self._mirrored if name.startswith("checkpoints/")]:
            if not (self._root / name).exists():
                if self._store.exists(f"{self._place}/{name}"):
                    self._store.rm_file(f"{self._place}/{name}")
                del self._mirrored[name]


def _files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        hidden = any(part.startswith(".") or part.endswith(".corrupt") for part in parts)
        if not hidden and parts[0] not in LEFT_OUT and path.is_file():
            yield path


def _mark(path: Path) -> Mark | None:
    """None if the file is gone."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def _refuse_folder(said: str, folder: Path, root: Path) -> None:
    """Of this machine, as a mirror."""
    if folder == root or root in folder.parents:
        raise ConfigError(f"{said} lies in run.dir={root}; name a place outside of it.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # Hidden ones and the next are what file systems put there. Of a run that is not there yet nothing can be in a mirror.
    own = OWN if "started" in read_manifest(root) else re.compile("manifest.json")  # whose it is is asked next
    foreign = sorted(name for name in names - {"lost+found"} if not (name.startswith(".") or own.fullmatch(name)))
    if "manifest.json" not in names and any(not (root / name).exists() for name in foreign):
        raise ConfigError(
            f"{said} holds other things ({foreign[0]}), which might be overwritten; name a folder of its own."
        )


def check_mirror(config: Config) -> None:
    """Raises ConfigError if `run.mirror` names no place that can be used, or one that holds another run."""
    if config.run.mirror is None:
        return
    url, root = config.run.mirror, Path(config.run.dir)
    said = f"run.mirror={url}"
    if not re.fullmatch(r"[A-Za-z][\w+.-]*://.+", url) or "::" in url:
        raise ConfigError(
            f"{said} is not a URL of one folder; give e.g. s3://bucket/{root.name} or file:///backup/{root.name}."
        )
    try:
        store, place = fsspec.core.url_to_fs(url)
    except Exception as error:  # unknown, its package is not installed, it is not reached at once, ...
        raise ConfigError(f"{said} cannot be used: {error}. Known: s3, gs, abfs, file and others of fsspec.") from error
    if isinstance(store, LocalFileSystem):
        try:
            _refuse_folder(said, Path(place).resolve(), root.resolve())
        except (OSError, RuntimeError) as error:  # the second: a circle of links
            raise ConfigError(f"{said} does not answer: {error}. Check the address and the rights.") from error
    try:
        there = json.loads(store.cat_file(f"{place}/manifest.json"))["started"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        there = None  # not a run of ours, or one whose manifest is damaged
    except Exception as error:
        raise ConfigError(
            f"{said} does not answer: {type(error).__name__}: {error}. Check the address and the rights."
        ) from error
    if there is None or there != read_manifest(root).get("started"):
        raise ConfigError(
            f"{said} holds another run; name a folder of its own, or copy that run to {root} to go on with it."
        )
