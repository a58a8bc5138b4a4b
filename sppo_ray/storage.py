"""Writes and reads that wait out a fault of the storage: a full disk, a read-only mount, a file server that is away for a minute,
whether it says so or hangs.

Nothing of a run is lost by waiting: what is not on disk is not acknowledged, so whoever made it holds it, and asks for no
more than `rollout.in_flight` lets it.
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from sppo_ray.errors import SppoError

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_WAIT_S = 0.5  # doubled after each attempt
LONGEST_WAIT_S = 15.0
SLOW_S = 30.0  # for one attempt, until it is said: a file server that hangs raises nothing
REMEDIES = {
    errno.ENOSPC: "free some space there",
    errno.EDQUOT: "free some of the quota or have it raised",
    errno.EROFS: "make it writable again",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
}


class StorageError(SppoError):
    """The storage of the run directory does not take, or does not give back, what the run needs. The run can be resumed."""


class Storage:
    """The storage of a run directory as one process sees it; any thread may write."""

    def __init__(self, patience_s: float = 0.0, hear: Callable[[str], None] = lambda text: None) -> None:
        """patience_s: how long to go on trying; 0: not at all. hear: gets `trouble` whenever it changes."""
        self._patience_s, self._hear = patience_s, hear
        self._lock = threading.Lock()
        self._waiting: dict[object, str] = {}  # by piece of work
        self._at_work: set[object] = set()

    @property
    def trouble(self) -> str:
        """What is waited for now, in words for the user; "" while all is well."""
        with self._lock:
            return next(iter(self._waiting.values()), "")

    def patiently(self, what: str, path: Path, do: Callable[[], T], verb: str = "write") -> T:
        """What `do` returns. It is called again, with growing pauses, while it raises OSError, so it must be repeatable.

        Blocks its thread. Raises StorageError, which names path, error and remedy, when patience is at its end.
        """
        work, until = object(), time.time() + self._patience_s
        with self._lock:
            self._at_work.add(work)

        def tell(state: RetryCallState) -> None:
            assert state.outcome is not None
            self._waits(work, self._pause(f"{verb} {what} {path}", path, state.outcome.exception(), until))

        def watched() -> T:
            hangs = (
                f"the run waits: to {verb} {what} {path} takes more than {SLOW_S:g} s. See to the disk or file server."
            )
            timer = threading.Timer(SLOW_S, self._waits, (work, hangs))
            timer.daemon = True
            timer.start()
            try:
                return do()
            finally:
                timer.cancel()

        attempts = Retrying(
            retry=retry_if_exception_type(OSError),
            wait=wait_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            stop=stop_after_delay(self._patience_s),
            before_sleep=tell,
            reraise=True,
        )
        try:
            return attempts(watched)
        except OSError as error:
            raise StorageError(self._end(f"{verb} {what} {path}", path, error)) from error
        finally:
            self._over(work)

    def _pause(self, what: str, path: Path, error: BaseException | None, until: float) -> str:
        return (
            f"the run pauses: {_fault(what, path, error)}. It tries again until {time.strftime('%H:%M:%S', time.localtime(until))} "
            f"({self._patience_s:g} s, run.storage_patience_s): {_remedy(error)}, and it goes on by itself."
        )

    def _end(self, what: str, path: Path, error: OSError) -> str:
        return (
            f"{_fault(what, path, error)}. Tried for {self._patience_s:g} s (run.storage_patience_s). What was acknowledged is on "
            f"disk: {_remedy(error)}, then go on with the run by the same command."
        )

    def _waits(self, work: object, text: str) -> None:
        with self._lock:
            new = work in self._at_work and work not in self._waiting
            if new:
                self._waiting[work] = text
        if new:
            self._hear(self.trouble)  # first: the log may be on the disk that hangs
            log.warning("%s", text)

    def _over(self, work: object) -> None:
        with self._lock:
            self._at_work.remove(work)
            waited = self._waiting.pop(work, None)
        if waited is not None:
            self._hear(self.trouble)
            log.warning("no longer: %s", waited)


def _fault(what: str, path: Path, error: BaseException | None) -> str:
    return f"cannot {what}: {error} ({_free(path)})"


def _remedy(error: BaseException | None) -> str:
    number = error.errno if isinstance(error, OSError) else None
    return REMEDIES.get(number or 0, "see to the disk or file server")


def _free(path: Path) -> str:
    """Space of the file system that holds the path, or would."""
    try:
        usage = shutil.disk_usage(next(folder for folder in path.parents if folder.exists()))
    except OSError:
        return "free space unknown"
    return f"{usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB are free there"
