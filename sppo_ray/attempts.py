"""Starting all actors of a run again from its directory, when one died that nothing can stand in for; for as long as that
gets the run any further.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sppo_ray.errors import ConfigError, SppoError, WeightSyncError, WorkerDied
from sppo_ray.metrics import read_metrics

AGAIN = (WorkerDied, WeightSyncError)  # what a new start may mend
LONGEST_WAIT_S = 60.0

Progress = tuple[int, int, int, int]


def progress_of(root: Path) -> Progress:
    """How far a run directory is: (iterations trained, sealed, updates, shards of judged groups). A later one is larger."""
    trained, sealed, shards = (
        len(list(root.glob(f"iter_*/{name}"))) for name in ("trained.json", "sealed.json", "ledger/shard-*.parquet")
    )
    return trained, sealed, sum("step" in line for line in read_metrics(root / "metrics.jsonl")), shards


class Attempts:
    """Use as `while attempts.more: with attempts.next(): ...`; each body is one attempt.

    An attempt that ends because an actor died, or did not get its weights, is followed by another, after a pause that doubles
    while nothing is got done. `limit` + 1 attempts without any progress between them end the run with the error of the
    first of them: the cause, where the last may be only a symptom. Any other error is raised at once.
    """

    def __init__(self, root: Path, limit: int, say: Callable[[str], None], sleep: Callable[[float], None] = time.sleep):
        self.more = True
        self.begun = 0  # attempts
        self._root, self._limit, self._say, self._sleep = root, limit, say, sleep
        self._seen: Progress = (0, 0, 0, 0)  # last
        self._idle = 0  # attempts in a row that got nothing done
        self._first: Exception | None = None  # what ended the first of them

    @contextmanager
    def next(self) -> Iterator[None]:
        before = self._progress()
        self.begun += 1
        try:
            yield
            self.more = False
        except AGAIN as error:
            # Other, not further: what is found damaged is taken back first.
            self._failed(error, moved=self._progress() != before)
        except SppoError as error:
            if self._first is None:
                raise
            cause = f"(the attempt before ended with: {self._first})"
            if isinstance(error, ConfigError):  # nothing was refused: the run had begun
                raise SppoError(f"the run's actors could not be started again: {error}\n{cause}") from error
            error.add_note(cause)
            raise

    def _progress(self) -> Progress:
        with suppress(OSError):  # a file server that is away: the attempt says so itself
            self._seen = progress_of(self._root)
        return self._seen

    def _failed(self, error: Exception, moved: bool) -> None:
        if moved:
            self._idle, self._first = 0, None
        self._first = self._first or error
        self._idle += 1
        if self._idle > self._limit:
            if error is not self._first:
                self._first.add_note(f"(the last of {self._idle} attempts ended with: {error})")
            raise self._first
        wait = min(2.0 ** (self._idle - 1), LONGEST_WAIT_S)
        self._say(f"{error}\nstarting all actors again from {self._root} in {wait:g} s")
        self._sleep(wait)
