"""Which update trains on how many groups, under which version of the weights: arithmetic over the slices, known before a
run begins. Async self-play decides by it what may be sampled, and a resumed run finds its place in it.

Update `step` (from 0) belongs to an iteration, an epoch and a batch in it. The weights are published every
`publish_every` updates, counted from the iteration's beginning, and at its end; the version at a step is the number of
publishes before it. Tickets are numbered in the order in which prompts are to be sampled.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sppo_ray.batching import epoch_order
from sppo_ray.config import Config


@dataclass(frozen=True, slots=True)
class Place:
    """Where an update stands."""

    iteration: int  # from 1
    epoch: int  # from 0
    size: int  # groups of its batch
    version: int  # publishes before it
    step_in_iteration: int
    first_of_epoch: int  # the step the epoch begins with


class StepPlan:
    """The plan of a whole run."""

    def __init__(self, config: Config, slices: Sequence[int]) -> None:
        """slices: prompts of each iteration."""
        self._slices, self._seed = tuple(slices), config.run.seed
        self._batch, self._epochs = config.learner.batch_size, config.learner.epochs
        every = config.publish_every
        self._every = None if every == "slice" else every
        # In ready order every epoch samples its prompts anew; in slice order the groups of a slice serve all epochs.
        self.passes = self._epochs if config.schedule.batch_order == "ready" else 1
        self._first_step, self._first_version, self._first_ticket = [0], [0], [0]
        for n in self._slices:
            steps = -(-n // self._batch) * self._epochs
            self._first_step.append(self._first_step[-1] + steps)
            self._first_version.append(self._first_version[-1] + (-(-steps // self._every) if self._every else 1))
            self._first_ticket.append(self._first_ticket[-1] + n * self.passes)

    @property
    def iterations(self) -> int:
        return len(self._slices)

    @property
    def steps(self) -> int:
        """Updates of the run."""
        return self._first_step[-1]

    @property
    def tickets(self) -> int:
        """Groups of the run."""
        return self._first_ticket[-1]

    # Steps.

    def first_step(self, iteration: int) -> int:
        return self._first_step[iteration - 1]

    def end_step(self, iteration: int) -> int:
        """Updates done when the iteration is."""
        return self._first_step[iteration]

    def steps_per_epoch(self, iteration: int) -> int:
        return (self.end_step(iteration) - self.first_step(iteration)) // self._epochs

    def place(self, step: int) -> Place:
        """Of the update after `step` updates; there must be one."""
        iteration = bisect.bisect_right(self._first_step, step)
        local = step - self.first_step(iteration)
        epoch, batch = divmod(local, self.steps_per_epoch(iteration))
        size = min(self._batch, self._slices[iteration - 1] - batch * self._batch)
        return Place(iteration, epoch, size, self.version_at(step), local, step - batch)

    # Versions.

    def version_at(self, step: int) -> int:
        """Version published last when `step` updates are done and what is due then is published."""
        if step == self.steps:
            return self._first_version[-1]
        iteration = bisect.bisect_right(self._first_step, step)
        within = (step - self.first_step(iteration)) // self._every if self._every else 0
        return self._first_version[iteration - 1] + within

    def last_version(self, iteration: int) -> int:
        """Version of the iteration's policy, published at its end."""
        return self._first_version[iteration]

    def groups_through(self, version: int) -> int:
        """Groups that all updates at versions up to `version` train on: (version + 1) x batch x publish_every, but for
        the short ends of slices."""
        if version < 0:
            return 0
        if version >= self._first_version[-1]:
            return self.tickets
        iteration = bisect.bisect_right(self._first_version, version)
        if self._every is None or self.passes != self._epochs:
            return self._first_ticket[iteration]
        steps = (version + 1 - self._first_version[iteration - 1]) * self._every
        return self._groups_before(min(self.end_step(iteration), self.first_step(iteration) + steps))

    def room_after(self, step: int, version: int) -> int:
        """Groups that the updates after `step` of the same iteration and epoch take at versions up to `version`."""
        iteration = bisect.bisect_right(self._first_step, step)
        epoch = (step - self.first_step(iteration)) // self.steps_per_epoch(iteration)
        end = self.first_step(iteration) + (epoch + 1) * self.steps_per_epoch(iteration)
        if version < self._first_version[iteration - 1]:
            return 0
        if self._every is not None:
            last = (version + 1 - self._first_version[iteration - 1]) * self._every + self.first_step(iteration)
            end = min(end, last)
        return max(0, self._groups_before(end) - self._groups_before(step + 1))

    def _groups_before(self, step: int) -> int:
        """Groups that the first `step` updates train on, each epoch counted (ready order)."""
        if step == self.steps:
            return self.tickets
        iteration = bisect.bisect_right(self._first_step, step)
        epoch, batch = divmod(step - self.first_step(iteration), self.steps_per_epoch(iteration))
        n = self._slices[iteration - 1]
        return self._first_ticket[iteration - 1] + epoch * n + min(batch * self._batch, n)

    # Tickets.

    def ticket_place(self, number: int) -> tuple[int, int, int]:
        """(iteration, epoch, index of the prompt in the slice) of a ticket."""
        iteration = bisect.bisect_right(self._first_ticket, number)
        epoch, position = divmod(number - self._first_ticket[iteration - 1], self._slices[iteration - 1])
        return iteration, epoch, int(self._order(iteration, epoch)[position])

    def ticket_number(self, iteration: int, epoch: int, index: int) -> int:
        """The inverse of `ticket_place`."""
        position = int(self._positions(iteration, epoch)[index])
        return self._first_ticket[iteration - 1] + epoch * self._slices[iteration - 1] + position

    def tickets_of(self, iteration: int) -> range:
        return range(self._first_ticket[iteration - 1], self._first_ticket[iteration])

    def earliest_step(self, number: int) -> int:
        """The first update that may train on a ticket's group."""
        iteration = bisect.bisect_right(self._first_ticket, number)
        epoch = (number - self._first_ticket[iteration - 1]) // self._slices[iteration - 1]
        return self.first_step(iteration) + epoch * self.steps_per_epoch(iteration)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a plan lives as long as the process
    def _order(self, iteration: int, epoch: int) -> np.ndarray:
        """int64 [n]: prompt indices in the order of sync's batches."""
        return epoch_order(self._slices[iteration - 1], self._seed, iteration, epoch)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def _positions(self, iteration: int, epoch: int) -> np.ndarray:
        return np.argsort(self._order(iteration, epoch))
