"""A simulated GPU and what runs on it: an engine that batches continuously, a judge that takes one group after the other.

Processes on one GPU slow each other down so that their work adds up: each gets an equal share while it has work.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

from sppo_ray.simulation.rates import RateCard

NEARLY = 1e-6  # tokens or seconds of work left that count as none: the clock's rounding


class Process(ABC):
    """Work on a GPU. Before its state is changed from outside: `gpu.catch_up()`; after it: `gpu.plan()`."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.busy = 0.0  # seconds it had work
        gpu.processes.append(self)

    @abstractmethod
    def until_next(self) -> float | None:
        """Seconds of work until something is done; None: idle."""

    @abstractmethod
    def work(self, seconds: float) -> None:
        """So many seconds of work are done; never past `until_next`."""

    @abstractmethod
    def finish(self) -> None:
        """What is done by now ends."""


class Gpu:
    def __init__(self) -> None:
        self.processes: list[Process] = []
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def catch_up(self) -> None:
        """Bring all processes to the present."""
        elapsed, self._last = self._loop.time() - self._last, self._loop.time()
        if elapsed > 0:
            working = [p for p in self.processes if p.until_next() is not None]
            for process in working:
                process.busy += elapsed
                process.work(elapsed / len(working))

    def plan(self) -> None:
        """Set the timer to the next moment at which something is done."""
        if self._timer is not None:
            self._timer.cancel()
        due = [left for p in self.processes if (left := p.until_next()) is not None]
        self._timer = self._loop.call_at(self._last + min(due) * len(due), self._fire) if due else None

    def _fire(self) -> None:
        self.catch_up()
        for process in self.processes:
            process.finish()
        self.plan()


class _Group:
    """A group's sequences in the engine."""

    __slots__ = ("done", "left")

    def __init__(self, done: asyncio.Future[None], sequences: int) -> None:
        self.done, self.left = done, sequences


class Engine(Process):
    """Continuous batching: every running sequence gets a token per step, a step takes longer the more there are, and what
    finds no place among `max_running` waits its turn. A prefill holds the others up."""

    def __init__(self, gpu: Gpu, card: RateCard, max_running: int) -> None:
        super().__init__(gpu)
        self.card, self.max_running = card, max_running
        self.held = False  # an update of the weights holds running sequences still
        self._position = 0.0  # tokens that a sequence would have got that runs from the beginning
        self._running: list[tuple[float, int, int, _Group]] = []  # heap: (position at its end, number, tokens, group)
        self._waiting: deque[tuple[int, _Group]] = deque()
        self._prefill = 0.0  # seconds of work
        self._numbers = itertools.count()

    async def sample(self, prompt_tokens: int, tokens: Sequence[int]) -> None:
        """Returns when the longest of the group's responses is done. Cancelled: they are taken out."""
        group = _Group(asyncio.get_running_loop().create_future(), len(tokens))
        self.gpu.catch_up()
        self._prefill += self.card.prefill_s(prompt_tokens)
        self._waiting.extend((int(length), group) for length in tokens)
        self._fill()
        self.gpu.plan()
        try:
            await group.done
        except asyncio.CancelledError:
            self._take_out(group)
            raise

    def hold(self, held: bool) -> None:
        """Released, the running sequences are prefilled again: their cache is of the old weights."""
        self.gpu.catch_up()
        if self.held and not held:
            decoded = sum(length - (end - self._position) for end, _, length, _ in self._running)
            self._prefill += self.card.prefill_s(decoded)
        self.held = held
        self.gpu.plan()

    def until_next(self) -> float | None:
        if self.held or not self._running:
            return None
        return self._prefill + max(0.0, self._running[0][0] - self._position) * self._step_s()

    def work(self, seconds: float) -> None:
        prefill = min(seconds, self._prefill)
        self._prefill -= prefill
        self._position += (seconds - prefill) / self._step_s()

    def finish(self) -> None:
        while self._running and self._running[0][0] <= self._position + NEARLY:
            group = heapq.heappop(self._running)[3]
            group.left -= 1
            if not group.left and not group.done.done():
                group.done.set_result(None)
        self._fill()

    def _step_s(self) -> float:
        return self.card.decode_s(len(self._running))

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.max_running:
            length, group = self._waiting.popleft()
            heapq.heappush(self._running, (self._position + length, next(self._numbers), length, group))

    def _take_out(self, group: _Group) -> None:
        self.gpu.catch_up()
        self._waiting = deque(entry for entry in self._waiting if entry[1] is not group)
        self._running = [entry for entry in self._running if entry[3] is not group]
        heapq.heapify(self._running)
        self._fill()
        self.gpu.plan()


class Queue(Process):
    """One job after the other."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__(gpu)
        self._left: deque[float] = deque()  # seconds of work
        self._done: deque[asyncio.Future[None]] = deque()

    async def run(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        self.gpu.catch_up()
        self._left.append(seconds)
        self._done.append(done)
        self.gpu.plan()
        await done

    def until_next(self) -> float | None:
        return self._left[0] if self._left else None

    def work(self, seconds: float) -> None:
        self._left[0] = max(0.0, self._left[0] - seconds)

    def finish(self) -> None:
        if self._left and self._left[0] <= NEARLY:
            self._left.popleft()
            self._done.popleft().set_result(None)
