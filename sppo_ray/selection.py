"""Which of a group's K responses are trained on."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sppo_ray.seeds import derive

Rule = Literal["best_worst", "all", "random_pair"]


def select(rule: Rule, scores: NDArray[np.float64], *, seed: int, iteration: int, prompt_id: str) -> tuple[int, ...]:
    """Scores [K] to the indices of the selected responses, winner first.

    best_worst: argmax and argmin, the first index on ties, as in the paper; K equal scores give (0, 0), whose target and
        gradient are zero. all: every response (the paper's theory variant), best first. random_pair: two different
        responses drawn by seed, the better one first.
    """
    if rule == "best_worst":
        return int(np.argmax(scores)), int(np.argmin(scores))
    if rule == "all":
        return tuple(int(i) for i in np.argsort(-scores, kind="stable"))
    if rule == "random_pair":
        generator = np.random.default_rng(derive("pair", seed, iteration, prompt_id))
        one, other = sorted(generator.choice(len(scores), size=2, replace=False).tolist())
        return (one, other) if scores[one] >= scores[other] else (other, one)
    raise ValueError(f"selection rule {rule!r} is not best_worst, all or random_pair")
