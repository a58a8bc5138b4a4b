"""Metrics of one update: exact over the global batch, however it was dealt over ranks and micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from sppo_ray.losses import winner_and_loser
from sppo_ray.types import TrainingExample

# (metric, staleness) -> a rank's sum over its examples of that staleness; None: over all of them.
Sums = dict[tuple[str, int | None], float]
BY_STALENESS = ("loss", "delta_w", "delta_l")


def add(sums: Sums, values: Mapping[str, Tensor], weight: Tensor, staleness: Tensor | None) -> None:
    """Add a micro-batch. values: name -> [R]; weight: float32 [R], 0 for padding; staleness: int64 [R], or None where
    everything is fresh and nothing is split by it."""
    for name, per_example in values.items():
        _add(sums, (name, None), per_example * weight)
    if staleness is None:
        return
    for lag in sorted(set(staleness[weight > 0].tolist())):
        for name in BY_STALENESS:
            _add(sums, (name, lag), values[name] * weight * (staleness == lag))


def means(parts: Sequence[Sums], examples: Sequence[TrainingExample]) -> dict[str, float]:
    """From every rank's sums: `<metric>` over the batch, `<metric>_staleness_<s>` over its examples of staleness s."""
    count = Counter[int | None](e.staleness for e in examples)
    count[None] = len(examples)
    # In the order in which they were added, the whole batch's before those by staleness.
    keys = sorted(
        dict.fromkeys(key for part in parts for key in part), key=lambda key: -1 if key[1] is None else key[1]
    )
    return {
        name if lag is None else f"{name}_staleness_{lag}": sum(part.get((name, lag), 0.0) for part in parts)
        / count[lag]
        for name, lag in keys
    }


def staleness_metrics(examples: Sequence[TrainingExample]) -> dict[str, float]:
    """In versions."""
    lags = [e.staleness for e in examples]
    return {"staleness_mean": float(np.mean(lags)), "staleness_max": max(lags)}


def length_metrics(examples: Sequence[TrainingExample], seconds: float) -> dict[str, float]:
    lengths = [[len(ids) for ids in e.response_ids] for e in examples]
    ends = [winner_and_loser(e.p_hat) for e in examples]
    tokens = sum(len(e.prompt_ids) * len(ids) + sum(ids) for e, ids in zip(examples, lengths, strict=True))
    return {
        "tokens_per_s": tokens / seconds,
        "mean_length_w": float(np.mean([ids[w] for ids, (w, _) in zip(lengths, ends, strict=True)])),
        "mean_length_l": float(np.mean([ids[l] for ids, (_, l) in zip(lengths, ends, strict=True)])),  # noqa: E741
    }


def _add(sums: Sums, key: tuple[str, int | None], values: Tensor) -> None:
    sums[key] = sums.get(key, 0.0) + values.double().sum().item()
