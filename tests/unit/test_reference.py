"""Recorded reference log-probabilities, and when a frozen reference is renewed."""

import numpy as np
import pytest

from sppo_ray.errors import LearnerError
from sppo_ray.reference import behavior_logps, refreshes_snapshot
from sppo_ray.types import TrainingExample, TrainTask


def example(tokens: tuple[int, ...], logprobs: tuple[np.ndarray, ...]) -> TrainingExample:
    responses = tuple(np.zeros(n, dtype=np.int32) for n in tokens)
    return TrainingExample("p", np.zeros(3, dtype=np.int32), responses, (0.8, 0.2), 0.8, 0, logprobs)


def test_sums_are_taken_in_double_precision() -> None:
    # In float32 2^24 + 1 is 2^24, so four ones after it would be lost one by one; together they are not.
    long = np.array([-(2.0**24), -1, -1, -1, -1], dtype=np.float32)
    assert behavior_logps(example((5, 2), (long, np.array([-0.5, -0.25], dtype=np.float32)))) == (-(2.0**24) - 4, -0.75)


@pytest.mark.parametrize("recorded", [(), (4,), (4, 3), (5, 2)])
def test_every_token_needs_one(recorded: tuple[int, ...]) -> None:
    with pytest.raises(LearnerError, match=r"prompt p: the responses have \[4, 2\] tokens"):
        behavior_logps(example((4, 2), tuple(np.zeros(n, dtype=np.float32) for n in recorded)))


def test_when_a_snapshot_is_renewed() -> None:
    def renewed(every: object, steps: range, first: int) -> list[int]:
        tasks = [TrainTask(step, 1, step - first, len(steps), ()) for step in steps]
        return [task.step for task in tasks if refreshes_snapshot(task, every)]

    assert renewed("slice", range(10, 20), first=10) == [10]
    assert renewed(4, range(10, 20), first=10) == [10, 14, 18]  # counted from where the slice begins
    assert renewed(1, range(10, 13), first=10) == [10, 11, 12]
