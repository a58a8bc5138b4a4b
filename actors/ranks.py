"""The learner's ranks among themselves: small Python objects, over their own gloo group."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from sppo_ray.rank_watch import Place

T = TypeVar("T")


class Way:
    """Where this rank is, for whoever watches over it. All ranks pass the same places in the same order."""

    def __init__(self) -> None:
        self.place = Place()
        self.moved = threading.Event()

    def at(self, what: str, step: int | None = None, limited: bool = True) -> None:
        """From now on this rank is here, in the update after `step` (None: the same). limited: not for as long as it likes."""
        before = self.place
        self.place = Place(before.passed + 1, before.step if step is None else step, what, limited)
        self.moved.set()


@dataclass(frozen=True, slots=True)
class Ranks:
    """Control messages between ranks. Data-sized collectives are DeepSpeed's, on the default group (NCCL on GPUs).

    A group of its own for two reasons: NCCL moves no Python objects without passing them through GPU memory, and ranks
    wait here for as long as an iteration is being sampled, which may be longer than any time-out meant for gradients.
    """

    rank: int
    world: int
    group: Any
    way: Way = field(default_factory=Way)

    @classmethod
    def join(cls) -> Ranks:
        """Collective. The default process group must exist."""
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank; the others pass None."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Returns when every rank is here."""
        dist.barrier(group=self.group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values
