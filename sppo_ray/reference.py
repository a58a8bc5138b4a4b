"""The reference policy's log-probabilities as recorded at sampling, and when a frozen copy is taken anew. No torch."""

from __future__ import annotations

from typing import Literal

import numpy as np

from sppo_ray.errors import LearnerError
from sppo_ray.types import TrainingExample, TrainTask


def behavior_logps(example: TrainingExample) -> tuple[float, ...]:
    """M sums (nats, summed in float64, rounded to float32) of what vLLM recorded for the responses' tokens.

    Raises LearnerError when not every response token has one: a sum over fewer would be the log-probability of another
    text.
    """
    recorded = [len(logprobs) for logprobs in example.token_logprobs]
    tokens = [len(ids) for ids in example.response_ids]
    if recorded != tokens:
        raise LearnerError(
            f"prompt {example.prompt_id}: the responses have {tokens} tokens but {recorded} recorded log-probabilities: "
            "objective.reference=behavior needs one for each; set objective.reference=snapshot."
        )
    return tuple(float(np.float32(logprobs.sum(dtype=np.float64))) for logprobs in example.token_logprobs)


def refreshes_snapshot(task: TrainTask, every: int | Literal["slice"]) -> bool:
    """Whether the frozen copy is taken anew before this update. every: objective.snapshot_every."""
    return task.step_in_iteration == 0 or (every != "slice" and task.step_in_iteration % every == 0)
