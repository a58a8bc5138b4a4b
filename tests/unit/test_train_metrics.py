"""Means over a batch that is spread over ranks, against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import torch

from actors.train_metrics import Sums, add, means, staleness_metrics
from sppo_ray.types import TrainingExample

ONE = TrainingExample("p", np.zeros(1, np.int32), (np.zeros(1, np.int32),) * 2, (0.8, 0.2), 0.8, 0)


def batch(*staleness: int) -> list[TrainingExample]:
    return [replace(ONE, staleness=lag) for lag in staleness]


def rank(*rows: tuple[float, float, int]) -> Sums:
    """rows: (value, weight, staleness); one micro-batch."""
    values, weight, staleness = (torch.tensor(column) for column in zip(*rows, strict=True))
    sums: Sums = {}
    add(sums, dict.fromkeys(("loss", "delta_w", "delta_l", "margin"), values), weight, staleness)
    return sums


def test_by_staleness() -> None:
    # Padding (weight 0) counts nowhere. Staleness 2 is on the second rank only.
    parts = [rank((1.0, 1.0, 0), (5.0, 1.0, 1), (99.0, 0.0, 0)), rank((3.0, 1.0, 0), (7.0, 1.0, 2), (8.0, 1.0, 2))]
    found = means(parts, batch(0, 1, 0, 2, 2))
    assert found["loss"] == found["margin"] == 24 / 5
    for name in ("loss", "delta_w", "delta_l"):
        assert [found[f"{name}_staleness_{lag}"] for lag in (0, 1, 2)] == [2.0, 5.0, 7.5]
    assert "margin_staleness_0" not in found
    assert list(found)[:4] == ["loss", "delta_w", "delta_l", "margin"]  # the batch's first, in their order


def test_micro_batches_add_up() -> None:
    sums = rank((1.0, 1.0, 0))
    column = torch.tensor([4.0])
    add(sums, dict.fromkeys(("loss", "delta_w", "delta_l"), column), torch.ones(1), torch.tensor([0]))
    assert means([sums], batch(0, 0))["loss_staleness_0"] == 2.5


def test_nothing_is_split_where_everything_is_fresh() -> None:
    sums: Sums = {}
    add(sums, {"loss": torch.tensor([1.0, 2.0])}, torch.ones(2), None)
    assert means([sums], batch(0, 0)) == {"loss": 1.5}


def test_staleness_of_a_batch() -> None:
    assert staleness_metrics(batch(0, 1, 0, 3)) == {"staleness_mean": 1.0, "staleness_max": 3}
