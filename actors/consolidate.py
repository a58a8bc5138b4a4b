"""The whole policy from the learner's ranks, a layer at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

import deepspeed
import torch
from torch import Tensor, nn

from actors.ranks import Ranks


def consolidated(module: nn.Module, dtype: torch.dtype, ranks: Ranks, zero_stage: int) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, whole tensor on the CPU in `dtype`) on rank 0; tied weights come once.

    The other ranks get nothing but must exhaust it too: under ZeRO-3 each layer is gathered by all.
    """
    named = [(name.removeprefix("lm."), p) for name, p in module.named_parameters()]
    for _, layer in groupby(named, key=lambda item: _layer_of(item[0])):
        members = list(layer)
        ranks.way.at("gathering the policy")
        with deepspeed.zero.GatheredParameters([p for _, p in members], enabled=zero_stage == 3):
            whole = [(name, p.detach().to("cpu", dtype, copy=True)) for name, p in members if ranks.first]
        yield from whole


def _layer_of(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "model.layers.3": what is gathered together."""
    match = re.match(r".*?\.\d+(?=\.)", name)
    return match.group() if match else name
