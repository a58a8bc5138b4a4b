"""A frozen copy of the learner's weights that can take their place for a while: the reference policy in async."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sppo_ray.errors import LearnerError


class Snapshot:
    """Of this rank's part of every parameter: all of it under ZeRO 0 and 2, its partition under ZeRO-3.

    Memory: one copy of the local parts for as long as it lives. Live and frozen weights change places tensor by tensor,
    so while the frozen ones are in use there are still two copies in all, plus one part on its way.
    """

    def __init__(self, engine: Any, dtype: torch.dtype) -> None:
        """Empty until the first `refresh`, or until a checkpoint fills it. engine: DeepSpeed's. dtype: the precision policies
        are published in; the copy is rounded to it, as the weights are that rollouts sample from, and kept in the
        learner's own."""
        self._engine = engine
        self._dtype = dtype
        self.frozen: dict[str, Tensor] = {}  # this rank's parts by parameter name

    def refresh(self) -> None:
        """Copy the live weights."""
        self.frozen = {}  # first, so that there are never two frozen copies
        self.frozen = {name: part.to(self._dtype, copy=True).to(part.dtype) for name, part in self._parts().items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine computes with the frozen weights inside, with the same live ones, bit for bit, afterwards.

        Only for passes without gradients: master weights and optimizer state stay the live ones'. Raises LearnerError when
        there is no copy.
        """
        if not self.frozen:
            raise LearnerError(
                "objective.reference=snapshot, but the checkpoint from which this iteration was resumed holds none: remove "
                "the run's checkpoints/ to restart the iteration, or set objective.reference to what it was."
            )
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def blank(self, name: str) -> Tensor:
        """A frozen part for a checkpoint to fill."""
        self.frozen[name] = torch.zeros_like(self._part(self._engine.module.get_parameter(name)))
        return self.frozen[name]

    def _exchange(self) -> None:
        for name, live in self._parts().items():
            waiting = live.clone()
            live.copy_(self.frozen[name])
            self.frozen[name].copy_(waiting)

    def _parts(self) -> dict[str, Tensor]:
        # Under ZeRO-3 gathered weights are copies of ds_tensor, this rank's part. None must stay gathered: it would hold
        # the weights of before an exchange.
        self._engine.empty_partition_cache()
        return {name: self._part(p) for name, p in self._engine.module.named_parameters()}

    @staticmethod
    def _part(parameter: Any) -> Tensor:
        part: Tensor = getattr(parameter, "ds_tensor", parameter).data
        return part


@contextmanager
def as_published(engine: Any, dtype: torch.dtype) -> Iterator[None]:
    """The weights are rounded to dtype inside, as they were afterwards. Costs a copy where that changes any."""
    if all(p.dtype == dtype for p in engine.module.parameters()):
        yield
        return
    rounded = Snapshot(engine, dtype)
    rounded.refresh()
    with rounded.in_place():
        yield
