"""The comparison of log-probabilities against numbers worked out by hand."""

import math

import numpy as np
import pytest

from sppo_ray.mismatch import compare
from sppo_ray.types import Probe


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def probe(*logprobs: np.ndarray) -> Probe:
    ids = tuple(np.arange(len(values), dtype=np.int32) for values in logprobs)
    return Probe(prompt_ids=ids, response_ids=ids, logprobs=logprobs)


def test_differences_by_hand() -> None:
    # First sequence: differences 0.5 and -0.25, sum 0.25. Second: -1, sum -1. Third: 0.25 three times, sum 0.75.
    ours = probe(floats(-1, -2), floats(-4), floats(-1, -1, -1))
    served = [floats(-1.5, -1.75), floats(-3), floats(-1.25, -1.25, -1.25)]
    assert compare(ours, served) == {
        "mean_abs_per_token": 2.5 / 6,
        "max_abs_per_token": 1.0,
        "mean_abs_per_sequence": 2.0 / 3,
        "max_abs_per_sequence": 1.0,
        "tokens": 6.0,
        "sequences": 3.0,
    }


def test_the_same_weights_differ_by_nothing() -> None:
    figures = compare(probe(floats(-1, -2)), [floats(-1, -2)])
    assert [figures[name] for name in figures if "abs" in name] == [0.0] * 4


def test_a_difference_that_is_not_finite_shows() -> None:
    assert compare(probe(floats(-1, -2)), [floats(-1, -math.inf)])["mean_abs_per_token"] == math.inf
    assert math.isnan(compare(probe(floats(-1, math.nan)), [floats(-1, -2)])["max_abs_per_token"])


@pytest.mark.parametrize("served", [[floats(-1)], [floats(-1, -2), floats(-1)], []])
def test_other_responses_are_refused(served: list[np.ndarray]) -> None:
    with pytest.raises(ValueError, match="same responses"):
        compare(probe(floats(-1, -2)), served)


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        compare(probe(), [])
