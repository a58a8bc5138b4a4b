"""The schedule against Hugging Face's and against the paper's numbers."""

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from sppo_ray.lr_schedule import learning_rate


@pytest.mark.parametrize(
    ("kind", "name"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize(("total", "ratio"), [(24, 0.1), (309, 0.1), (7, 0.0), (10, 0.5)])
def test_equals_hugging_face(kind: str, name: str, total: int, ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    warmup = int(np.ceil(total * ratio))
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert learning_rate(step, total, ratio, kind, 3e-4) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()


def test_paper_schedule_keeps_the_first_epoch_in_the_warm_up() -> None:
    """18 epochs of 309 steps (19,766 prompts at batch 64), stopped after one: mean 1.4e-7, end 2.8e-7."""
    rates = [learning_rate(step, 18 * 309, 0.1, "linear", 5e-7) for step in range(309)]
    assert np.mean(rates) == pytest.approx(1.4e-7, rel=0.02)
    assert rates[-1] == pytest.approx(2.8e-7, rel=0.02)
    assert (np.diff(rates) > 0).all()


def test_script_schedule_reaches_the_peak_and_returns_to_zero() -> None:
    rates = [learning_rate(step, 309, 0.1, "linear", 5e-7) for step in range(310)]
    assert max(rates) == pytest.approx(5e-7)
    assert rates[0] == 0.0
    assert rates[309] == 0.0
    assert learning_rate(400, 309, 0.1, "linear", 5e-7) == 0.0  # never negative
