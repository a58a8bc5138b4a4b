"""Which groups may be sampled now, and which are trained on next: the staleness bound of async self-play. Plain, no waiting.

A ticket goes  waiting -> running -> ready -> in a batch;  from running or ready it may go back to be sampled again.

The bound, staleness = version of the learner - version a group was sampled from <= max_staleness, is held twice:

- Admission. While version v is served, tickets are handed out up to the number of groups that all updates at versions up
  to v + max_staleness train on, in order. (With equal batches and a publish per update that is: accepted + running <=
  (max_staleness + v + 1) x batch.) So every group that is out has a place in a batch within its bound.
- Cut. A batch takes the oldest ready groups. It waits for running ones where newer groups would take the last places in
  which those are not too old, so that a slow prompt is waited for and not thrown away. What is too old nevertheless
  (a run resumed under a smaller bound) is never trained on: it is sampled again.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping

from sppo_ray.errors import SppoError
from sppo_ray.step_plan import Place, StepPlan
from sppo_ray.types import Ticket


class Admission:
    """Tickets of one run. `served` is the version that every rollout worker serves at least."""

    def __init__(self, plan: StepPlan, max_staleness: int, max_resamples: int, served: int, next_step: int) -> None:
        """next_step: the first update whose batch is not cut yet."""
        self.plan, self.max_staleness, self.max_resamples = plan, max_staleness, max_resamples
        self.served, self.next_step = served, next_step
        self._next = plan.tickets_of(plan.place(next_step).iteration).start if next_step < plan.steps else plan.tickets
        self._held: set[int] = set()  # accepted, at or beyond _next: not to be handed out
        self._again: list[int] = []  # heap: to be sampled again
        self._running: dict[int, int] = {}  # ticket -> version served when it was handed out
        self._ready: dict[int, int] = {}  # ticket -> version it was sampled from
        self._heaps: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)  # earliest step -> (version, ticket)
        # Both by the ticket's earliest step, that is by epoch: version -> groups.
        self._running_of: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._ready_of: defaultdict[int, Counter[int]] = defaultdict(Counter)
        self._resamples: Counter[int] = Counter()
        self.resampled = 0  # groups thrown away since this process began

    def restore(self, ready: Mapping[int, int], in_batches: set[int]) -> None:
        """What a former process had accepted: tickets on disk (with their version) and those of them in batches."""
        for number, version in ready.items():
            if number not in in_batches:
                self._put_ready(number, version)
        self._held = {number for number in {*ready, *in_batches} if number >= self._next}

    # Sampling.

    def admit(self, room: int) -> list[Ticket]:
        """Up to `room` tickets that may be sampled now, oldest first."""
        tickets: list[Ticket] = []
        while len(tickets) < room and (number := self._admissible()) is not None:
            self._running[number] = self.served
            self._running_of[self.plan.earliest_step(number)][self.served] += 1
            times = self._resamples[number]
            tickets.append(Ticket(number, *self.plan.ticket_place(number), times, times >= self.max_resamples))
        return tickets

    @property
    def capacity(self) -> int:
        """Tickets below this number may be out while `served` is served."""
        return self.plan.groups_through(self.served + self.max_staleness)

    @property
    def exhausted(self) -> bool:
        """Every group of the run is in a batch: none can come back to be sampled again."""
        self._skip_held()
        return self._next == self.plan.tickets and not (self._running or self._again or self._ready)

    def _admissible(self) -> int | None:
        self._skip_held()
        number = self._again[0] if self._again else self._next
        if number >= min(self.capacity, self.plan.tickets) or not self._fresh_enough(number):
            return None
        if self._again:
            return heapq.heappop(self._again)
        self._next += 1
        return number

    def _fresh_enough(self, number: int) -> bool:
        """Whether a group sampled now would be within the bound in the first batch that could take it."""
        earliest = max(self.next_step, self.plan.earliest_step(number))
        return self.plan.version_at(earliest) - self.served <= self.max_staleness

    def _skip_held(self) -> None:
        while self._next in self._held:
            self._held.discard(self._next)
            self._next += 1

    @property
    def most_resamples(self) -> int:
        """Of any one ticket."""
        return max(self._resamples.values(), default=0)

    # What comes back.

    def wanted(self, number: int) -> bool:
        """Whether a group of this ticket is waited for; a second copy is not."""
        return number in self._running

    def accept(self, number: int, version: int) -> None:
        """A running ticket's judged group, sampled from `version`, is on disk."""
        self._stop_running(number)
        self._put_ready(number, version)

    def resample(self, number: int) -> None:
        """A running ticket's group was aborted."""
        self._stop_running(number)
        self._sample_again(number)

    def serve(self, version: int) -> None:
        """Every rollout worker serves `version` now."""
        self.served = version

    # Batches.

    def cut(self) -> list[tuple[int, int]] | None:
        """The next batch as (ticket, version sampled from), in ticket order; None while there are not enough groups, or
        while older ones, still running, would be left without a place. Raises SppoError past max_resamples."""
        place = self.plan.place(self.next_step)
        epoch = place.first_of_epoch
        heap = self._heaps[epoch]
        self._send_back_too_old(heap, place.version)
        if len(heap) < place.size:
            return None
        chosen = [heapq.heappop(heap) for _ in range(place.size)]
        if self._crowds_out(chosen, place):
            for entry in chosen:
                heapq.heappush(heap, entry)
            return None
        for _, number in chosen:
            self._stop_ready(number)
        self.next_step += 1
        if self.next_step == self.plan.steps or self.plan.place(self.next_step).first_of_epoch != epoch:
            for finished in (self._heaps, self._running_of, self._ready_of):
                finished.pop(epoch, None)
        return sorted((number, version) for version, number in chosen)

    def take_slice(self, iteration: int) -> None:
        """Slice order: the whole iteration goes to the learner."""
        for number in self.plan.tickets_of(iteration):
            self._ready.pop(number, None)
        for finished in (self._heaps, self._running_of, self._ready_of):
            finished.pop(self.plan.first_step(iteration), None)

    def accepted(self, iteration: int) -> bool:
        """Whether every group of the iteration is on disk."""
        tickets = self.plan.tickets_of(iteration)
        self._skip_held()
        return self._next >= tickets.stop and not any(number in tickets for number in (*self._running, *self._again))

    def _send_back_too_old(self, heap: list[tuple[int, int]], version: int) -> None:
        while heap and heap[0][0] < version - self.max_staleness:
            number = heap[0][1]
            if self._resamples[number] >= self.max_resamples:
                iteration, _, index = self.plan.ticket_place(number)
                raise SppoError(
                    f"prompt {index} of iteration {iteration} was sampled {self.max_resamples + 1} times and each time its "
                    f"group became older than schedule.max_staleness={self.max_staleness}: raise schedule.max_staleness or "
                    "schedule.max_resamples."
                )
            heapq.heappop(heap)
            self._stop_ready(number)
            self._sample_again(number)

    def _crowds_out(self, chosen: list[tuple[int, int]], place: Place) -> bool:
        """Whether running groups would have no place left within their bound if `chosen` took this one."""
        running, ready = self._running_of[place.first_of_epoch], self._ready_of[place.first_of_epoch]
        for deadline in range(place.version, place.version + self.max_staleness + 1):
            oldest = deadline - self.max_staleness  # of the groups that must be in a batch by then
            waited_for = sum(groups for version, groups in running.items() if version <= oldest)
            left = sum(groups for version, groups in ready.items() if version <= oldest)
            left -= sum(version <= oldest for version, _ in chosen)
            if waited_for and waited_for + left > self.plan.room_after(self.next_step, deadline):
                return True
        return False

    # Inside.

    def _put_ready(self, number: int, version: int) -> None:
        epoch = self.plan.earliest_step(number)
        self._ready[number] = version
        self._ready_of[epoch][version] += 1
        heapq.heappush(self._heaps[epoch], (version, number))

    def _stop_ready(self, number: int) -> None:
        self._ready_of[self.plan.earliest_step(number)][self._ready.pop(number)] -= 1

    def _stop_running(self, number: int) -> None:
        self._running_of[self.plan.earliest_step(number)][self._running.pop(number)] -= 1

    def _sample_again(self, number: int) -> None:
        self._resamples[number] += 1
        self.resampled += 1
        heapq.heappush(self._again, number)
