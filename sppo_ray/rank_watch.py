"""Which of the learner's ranks hangs: from where each of them says it is, and how long ago.

All ranks go through the same places in the same order, so of ranks that wait for each other the one that has passed the
fewest is the one that hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    passed: int = 0  # places it has passed: how far it is, compared with other ranks
    step: int = 0  # updates done in the run
    what: str = "starting"
    limited: bool = True  # False: it waits for what may take any time, e.g. for prompts to be sampled


@dataclass(frozen=True, slots=True)
class _Seen:
    place: Place
    since: float  # when it was first seen there
    last: float  # when it was last heard of


class RankWatch:
    """Times are seconds of any one clock, given by the caller."""

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: for one place; and without a sign of life, wherever it is."""
        self.timeout_s = timeout_s
        self._seen: dict[int, _Seen] = {}

    def forget(self) -> None:
        """A new group of ranks begins, or the old one is gone."""
        self._seen = {}

    def heard(self, rank: int, place: Place, now: float) -> None:
        before = self._seen.get(rank)
        if before is None or before.place != place:
            self._seen[rank] = _Seen(place, now, now)
        else:
            self._seen[rank] = replace(before, last=now)

    def hanging(self, now: float) -> list[int]:
        """The ranks for which the others wait too long; all of them if they hang together; mostly none."""
        silent = [rank for rank, seen in self._seen.items() if now - seen.last > self.timeout_s]
        if silent:
            return sorted(silent)
        overdue = [s for s in self._seen.values() if s.place.limited and now - s.since > self.timeout_s]
        if not overdue:
            return []
        # A rank that was stopped looks like those that wait for it, but for its silence.
        quiet = [rank for rank, seen in self._seen.items() if now - seen.last > self.timeout_s / 2]
        fewest = min(seen.place.passed for seen in self._seen.values())
        return sorted(quiet or [rank for rank, seen in self._seen.items() if seen.place.passed == fewest])

    def describe(self, ranks: Sequence[int]) -> str:
        """What to tell of `ranks` that hang."""
        named = [
            f"learner-{rank} did not reach step {self._seen[rank].place.step + 1} ({self._last(rank)})"
            for rank in ranks
        ]
        others = [f"learner-{rank}" for rank in sorted(self._seen) if rank not in ranks]
        waited = f"; {', '.join(others)} waited" if others else ""
        return f"{', '.join(named)} within {self.timeout_s:g} s{waited}"

    def _last(self, rank: int) -> str:
        place = self._seen[rank].place
        return f"it was last seen at step {place.step}, {place.what}"
