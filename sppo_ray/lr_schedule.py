"""Learning rate as a pure function of the step, shaped as in Hugging Face's schedulers."""

from __future__ import annotations

import math
from collections.abc import Callable

# progress in [0, 1] after the warm-up -> share of the peak
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


def learning_rate(step: int, total_steps: int, warmup_ratio: float, kind: str, peak: float) -> float:
    """Rate of the update that follows `step` finished updates (so the first update of a warm-up has rate 0, as in HF).

    total_steps is what the schedule is laid out for (schedule_epochs x steps_per_epoch), which may be far more than is
    trained: the paper lays it over 18 epochs and stops after one, which therefore lies wholly in the warm-up.
    """
    warmup = math.ceil(total_steps * warmup_ratio)
    if step < warmup:
        return peak * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * DECAYS[kind](progress)
