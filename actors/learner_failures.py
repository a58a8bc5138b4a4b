"""What ended the learner's ranks: one text for a group of them, and of groups that failed one after the other the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import UserCallback
from ray.train.v2.api.exceptions import WorkerGroupError

from sppo_ray.errors import SppoError

NAME = "learner"


class Teller(UserCallback):  # type: ignore[misc]
    """Lives in Ray Train's controller, which starts a group again and raises the last failure only: tells of each."""

    def __init__(self, watcher: Any) -> None:
        """watcher: the handle of a LearnerActor."""
        self._watcher = watcher

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._watcher.failed.remote(describe_ranks(worker_exceptions))


class FirstCause:
    """Of failures without an update of the weights between them the first: the others may be its consequences."""

    def __init__(self) -> None:
        self._causes: list[tuple[int, str]] = []  # each after more updates than the one before

    def failed(self, what: str, step: int) -> None:
        """step: updates on record by then; fewer than before while some are done again."""
        if not self._causes or step > self._causes[-1][0]:
            self._causes.append((step, what))

    def of(self, last: str, step: int) -> str:
        """What to tell of the failure that ended the learner, and of those that had used up restarts before."""
        self.failed(last, step)
        *earlier, (_, first) = self._causes
        lines = [first, *([f"(started again, it ended with: {last})"] if first != last else [])]
        lines += [
            f"(it had been started again before, after {done} updates, because of: {what})" for done, what in earlier
        ]
        return "\n".join(lines)


def describe_failure(error: BaseException) -> str:
    """What Ray Train raised, in one text, the cause first."""
    # Without failures of ranks the group did not start, or was found hanging.
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    return describe_ranks(failures) if failures else f"{NAME}: {error}"


def describe_ranks(failures: Mapping[int, BaseException]) -> str:
    """By rank; one at least. The traceback of the rank that failed by itself comes before those that lost a peer."""
    (rank, first), *rest = sorted(failures.items(), key=lambda item: (_lost_a_peer(item[1]), item[0]))
    others = ", ".join(f"{NAME}-{r}" for r, _ in rest)
    lines = [f"{NAME}-{rank}: {first}", *getattr(first, "__notes__", ()), f"Also failed: {others}." if others else ""]
    return "\n".join(filter(None, lines))


def _lost_a_peer(failure: BaseException) -> bool:
    text = str(failure)
    return not isinstance(failure, SppoError) and any(
        word in text for word in ("Connection closed by peer", "gloo", "NCCL")
    )
