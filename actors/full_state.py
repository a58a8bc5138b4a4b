"""All that training depends on, by parameter name: gathered from, and dealt out to, any number of ranks at any ZeRO stage.

DeepSpeed's own utilities (`safe_get_full_fp32_param` and its like) know stages 2 and 3 only, cannot set a parameter that
does not divide by the number of ranks, and lose the sign of zeros in their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from actors.ranks import Ranks
from actors.snapshot import Snapshot

WEIGHTS, FROZEN = "weights", "frozen"


@dataclass(frozen=True, slots=True)
class Share:
    """This rank's elements of a flattened parameter: [start : start + length], which lie in `holder` from `offset` on.

    Under ZeRO `holder` is a flat tensor of many parameters, and a rank may have none of a parameter (length 0).
    """

    holder: Tensor
    offset: int
    start: int
    length: int
    everywhere: bool = False  # every rank has all of it

    @classmethod
    def all_of(cls, holder: Tensor) -> Share:
        return cls(holder, 0, 0, holder.numel(), everywhere=True)

    def of(self, tensor: Tensor) -> Tensor:
        """A view of the share's elements in a tensor laid out as `holder`: itself, or an optimizer state of it."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    def deal(self, whole: Tensor, tensor: Tensor) -> None:
        """Copy this rank's share of a whole parameter into a tensor laid out as `holder`."""
        self.of(tensor).copy_(whole.view(-1).narrow(0, self.start, self.length))


class FullState:
    """float32 master weights, every state tensor of torch's optimizer, its step counts, and the frozen reference."""

    def __init__(
        self, engine: Any, optimizer: Any, base: torch.optim.Optimizer, snapshot: Snapshot, ranks: Ranks
    ) -> None:
        """engine, optimizer: DeepSpeed's. base: torch's, inside it."""
        self._engine, self._optimizer, self._base = engine, optimizer, base
        self._snapshot, self._ranks = snapshot, ranks
        self._stage: int = engine.zero_optimization_stage()

    def layout(self) -> dict[str, Any]:
        """What `restore` must know beside the tensors; fit for JSON. There must have been an update."""
        state = next(iter(self._base.state.values()))
        return {
            "optimizer_tensors": [key for key, value in state.items() if value.dim() > 0],
            "optimizer_counts": {key: value.item() for key, value in state.items() if value.dim() == 0},
            "frozen": bool(self._snapshot.frozen),
        }

    def gather(self) -> Iterator[tuple[str, Tensor]]:
        """("<kind>/<parameter name>", whole tensor on the CPU) on rank 0, one at a time. Collective: the other ranks get
        nothing but must exhaust it too."""
        tensors = self.layout()["optimizer_tensors"]
        for name, parameter in self._engine.module.named_parameters():
            size, share = _size(parameter), self._of_master(parameter)
            yield from self._whole(f"{WEIGHTS}/{name}", share, share.holder, size)
            for key in tensors:
                state = self._base.state[share.holder][key] if share.length else share.holder
                yield from self._whole(f"{key}/{name}", share, state, size)
            if self._snapshot.frozen:
                frozen = self._snapshot.frozen[name]
                yield from self._whole(f"{FROZEN}/{name}", self._of_model(parameter, frozen), frozen, size)

    def restore(self, layout: dict[str, Any], read: Callable[[str], Tensor]) -> None:
        """Take up what `gather` gave, before the engine's first update. Collective; read(key) is called on rank 0 alone,
        for one tensor after the other."""
        for name, parameter in self._engine.module.named_parameters():
            share = self._of_master(parameter)
            weights = self._read(f"{WEIGHTS}/{name}", parameter, read)
            share.deal(weights, share.holder)
            self._set_model(parameter, weights)
            for key in layout["optimizer_tensors"]:
                whole = self._read(f"{key}/{name}", parameter, read)
                if share.length:
                    share.deal(whole, self._state_of(share.holder, key))
            if share.length:
                for key, count in layout["optimizer_counts"].items():
                    self._base.state[share.holder][key] = torch.tensor(
                        count, dtype=torch.float32
                    )  # on the CPU, as torch's
            if layout["frozen"]:
                frozen = self._snapshot.blank(name)
                self._of_model(parameter, frozen).deal(self._read(f"{FROZEN}/{name}", parameter, read), frozen)

    # Inside.

    def _of_master(self, parameter: Any) -> Share:
        """Where this rank has its share of the float32 weights."""
        optimizer = self._optimizer
        if self._stage == 3:
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            return self._partition(parameter, optimizer.fp32_partitioned_groups_flat[group], offset, length)
        if self._stage == 2:
            mapping = parameter._hp_mapping
            if mapping is None:
                return Share(parameter.new_empty(0, dtype=torch.float32), 0, 0, 0)
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            within, of_parameter = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            return Share(flat, within.start, of_parameter.start, of_parameter.numel)
        if hasattr(optimizer, "fp32_groups"):  # bfloat16: a float32 copy of each parameter
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            copies = {id(p): copy for low, high in groups for p, copy in zip(low, high, strict=True)}
            return Share.all_of(copies[id(parameter)])
        return Share.all_of(parameter)

    def _of_model(self, parameter: Any, held: Tensor) -> Share:
        """Where this rank has its share of what is laid out as the model's own weights are."""
        return self._partition(parameter, held, 0, held.numel()) if self._stage == 3 else Share.all_of(held)

    def _partition(self, parameter: Any, holder: Tensor, offset: int, length: int) -> Share:
        """ZeRO-3 cuts every parameter into equal parts, one for each rank; the last may end in padding."""
        start = min(self._ranks.rank * length, parameter.ds_numel)
        return Share(holder, offset, start, min(length, parameter.ds_numel - start))

    def _set_model(self, parameter: Any, weights: Tensor) -> None:
        """The weights that the model computes with, in its precision."""
        if self._stage == 3:
            self._of_model(parameter, parameter.ds_tensor).deal(weights, parameter.ds_tensor)
        if parameter.data.numel() == weights.numel():  # under ZeRO-3 small ones only are there as a whole
            parameter.data.copy_(weights)

    def _state_of(self, holder: Tensor, key: str) -> Tensor:
        """A state tensor of torch's optimizer, made if there has been no update yet."""
        state: dict[str, Tensor] = self._base.state[holder]
        if key not in state:
            state[key] = torch.zeros_like(holder, requires_grad=False)
        return state[key]

    def _whole(self, key: str, share: Share, tensor: Tensor, size: torch.Size) -> Iterator[tuple[str, Tensor]]:
        """From all ranks' shares, on rank 0."""
        self._ranks.way.at("gathering a checkpoint")
        whole = share.of(tensor)
        if not share.everywhere:
            whole = torch.zeros(size.numel(), dtype=torch.float32, device=self._engine.device)
            whole.narrow(0, share.start, share.length).copy_(share.of(tensor))
            # A sum of integers of which all but one are 0 keeps every bit, that of a negative zero too.
            dist.reduce(whole.view(torch.int32), dst=0)
        if self._ranks.first:
            yield key, whole.view(size).to("cpu", tensor.dtype, copy=True)

    def _read(self, key: str, parameter: Any, read: Callable[[str], Tensor]) -> Tensor:
        """float32, the whole parameter's size, on every rank."""
        self._ranks.way.at("taking up a checkpoint")
        size, device = _size(parameter), self._engine.device
        whole = read(key).to(device, torch.float32) if self._ranks.first else torch.empty(size, device=device)
        dist.broadcast(whole, src=0)
        return whole


def _size(parameter: Any) -> torch.Size:
    size: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return size
