"""The learner's ranks among themselves: small Python objects, over their own gloo group."""

from __future__ import annotations

import hmac
import itertools
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sppo_ray.rank_watch import Place

T = TypeVar("T")
TAG_BYTES = 32


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

    gloo asks nobody who he is, and the objects are pickles: what arrives is unpickled only if it carries a tag (HMAC-SHA256) made
    with a key that the ranks have from Ray (`key_of`), for this very rank and turn.
    """

    rank: int
    world: int
    group: Any
    key: bytes = field(repr=False)
    way: Way = field(default_factory=Way)
    _turns: Iterator[int] = field(default_factory=itertools.count)

    @classmethod
    def join(cls, key: bytes) -> Ranks:
        """Collective. The default process group must exist. key: of this start, and known to nobody else."""
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        return cls(dist.get_rank(), dist.get_world_size(), group, key)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def broadcast(self, value: T | None) -> T:
        """Rank 0's value, on every rank; the others pass None. Raises RuntimeError if what came is not rank 0's."""
        turn = next(self._turns)
        sealed = self._sealed(turn, value) if self.first else b""
        size = torch.tensor([len(sealed)])
        dist.broadcast(size, src=0, group=self.group)
        message = _tensor(sealed, int(size))
        dist.broadcast(message, src=0, group=self.group)
        return self._opened(turn, 0, message)  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank. Raises RuntimeError if what came is not theirs."""
        turn = next(self._turns)
        sealed = self._sealed(turn, value)
        sizes = self._all(torch.tensor([len(sealed)]))
        messages = self._all(_tensor(sealed, int(max(sizes))))
        parts = zip(messages, sizes, strict=True)
        return [self._opened(turn, rank, message[: int(size)]) for rank, (message, size) in enumerate(parts)]

    def barrier(self) -> None:
        """Returns when every rank is here."""
        dist.barrier(group=self.group)

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's, of one size."""
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine, group=self.group)
        return found

    def _sealed(self, turn: int, value: object) -> bytes:
        data = pickle.dumps(value)
        return self._tag(turn, self.rank, data) + data

    def _opened(self, turn: int, rank: int, message: torch.Tensor) -> Any:
        """The value that `rank` sealed in this turn."""
        sealed = message.numpy().tobytes()
        tag, data = sealed[:TAG_BYTES], sealed[TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(turn, rank, data)):
            raise RuntimeError(
                f"learner rank {self.rank} got something that learner rank {rank} did not send: others reach the "
                "ports of the ranks, or the network garbles what it carries. Close it to others (SECURITY.md)."
            )
        return pickle.loads(data)

    def _tag(self, turn: int, rank: int, data: bytes) -> bytes:
        return hmac.digest(self.key, b"%d %d " % (turn, rank) + data, "sha256")


def key_of(secret: bytes, group: str) -> bytes:
    """The key of the ranks that were started together as `group`: what those before them said is not theirs."""
    return hmac.digest(secret, group.encode(), "sha256")


def _tensor(data: bytes, size: int) -> torch.Tensor:
    """uint8, padded to `size`."""
    return torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
