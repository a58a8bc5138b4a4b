"""A frozen copy of the learner's weights that can take their place for a while: the reference policy in async."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sppo_ray.errors import LearnerError


class Snapshot:
    """Of this rank's part of every parameter: all of it under ZeRO 0 and 2, its partition under ZeRO-3.

    Memory: one copy of the local parts for as long as it lives. Live and frozen weights change places tensor by tensor,
    so while the frozen ones are in use there are still two copies in all, plus one part on its way.
    """

    def __init__(self, engine: Any, dtype: torch.dtype) -> None:
        """Empty until the first `refresh` or `load`. engine: DeepSpeed's. dtype: the precision policies are published in;
        the copy is rounded to it, as the weights are that rollouts sample from, and kept in the learner's own."""
        self._engine = engine
        self._dtype = dtype
        self._frozen: dict[str, Tensor] = {}

    def refresh(self) -> None:
        """Copy the live weights."""
        self._frozen = {}  # first, so that there are never two frozen copies
        self._frozen = {name: part.to(self._dtype, copy=True).to(part.dtype) for name, part in self._parts().items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The engine computes with the frozen weights inside, with the same live ones, bit for bit, afterwards.

        Only for passes without gradients: master weights and optimizer state stay the live ones'. Raises LearnerError when
        there is no copy.
        """
        if not self._frozen:
            raise LearnerError(
                "objective.reference=snapshot, but the checkpoint from which this iteration was resumed holds none: remove "
                "the run's checkpoints/ to restart the iteration, or set objective.reference to what it was."
            )
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def save(self, folder: Path, rank: int) -> None:
        """One file of this rank's parts; none if there is no copy."""
        if self._frozen:
            save_file(self._frozen, _file(folder, rank))

    def load(self, folder: Path, rank: int) -> None:
        """Take up what `save` left, on as many ranks at the same ZeRO stage."""
        if _file(folder, rank).exists():
            self._frozen = load_file(_file(folder, rank), device=str(self._engine.device))

    def _exchange(self) -> None:
        for name, live in self._parts().items():
            waiting = live.clone()
            live.copy_(self._frozen[name])
            self._frozen[name].copy_(waiting)

    def _parts(self) -> dict[str, Tensor]:
        # Under ZeRO-3 gathered weights are copies of ds_tensor, this rank's part. None must stay gathered: it would hold
        # the weights of before an exchange.
        self._engine.empty_partition_cache()
        return {name: getattr(p, "ds_tensor", p).data for name, p in self._engine.module.named_parameters()}


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


def _file(folder: Path, rank: int) -> Path:
    return folder / f"snapshot-{rank}.safetensors"
