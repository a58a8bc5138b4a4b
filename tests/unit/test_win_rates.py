"""Win rates against numbers worked out by hand and against the authors' arithmetic written as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sppo_ray.win_rates import has_cycle, order_inconsistency, win_rates

LOGITS = st.integers(2, 6).flatmap(lambda k: arrays(np.float32, (3, k, k), elements=st.floats(-30, 30, width=32)))


def test_paper_by_hand():
    # s_01 = (2 - (-1)) / 2 = 1.5 ; s_10 = -1.5 ; P_01 = 1/(1+e^-1.5) = 0.8175744761936437
    probability, p_hat, scores = win_rates([[[0, 2], [-1, 0]]], "paper")
    assert probability[0] == pytest.approx(np.array([[0.5, 0.8175744761936437], [0.18242552380635635, 0.5]]))
    assert p_hat[0].tolist() == pytest.approx([0.6587872380968219, 0.3412127619031782])
    assert scores[0].tolist() == [0.75, -0.75]  # mean over K = 2 of (0, 1.5)


def test_reference_code_by_hand():
    # s_0 = (2 - (-1)) / 2 = 1.5 (divisor K, the zero diagonal included), s_1 = -1.5 ; P_01 = sigmoid(3)
    probability, p_hat, scores = win_rates([[[0, 2], [-1, 0]]], "reference_code")
    assert scores[0].tolist() == [1.5, -1.5]
    assert probability[0, 0, 1] == pytest.approx(0.9525741268224334)
    assert p_hat[0].tolist() == pytest.approx([0.7262870634112167, 0.2737129365887833])


def test_three_responses_in_a_cycle():
    # Rock, paper, scissors at +-2 both ways: every s_ij is +-2, each row has one win and one loss.
    logits = [[[0, 2, -2], [-2, 0, 2], [2, -2, 0]]]
    probability, p_hat, scores = win_rates(logits, "paper")
    assert probability[0, 0, 1] == pytest.approx(1 / (1 + math.exp(-2)))
    assert p_hat[0].tolist() == pytest.approx([0.5, 0.5, 0.5])
    assert scores[0].tolist() == [0, 0, 0]
    assert has_cycle(logits).tolist() == [True]
    assert win_rates(logits, "reference_code")[0][0].tolist() == [[0.5] * 3] * 3  # the collapse cannot see the cycle


def test_a_cycle_of_four_is_found_and_an_order_is_not_one():
    cycle = np.zeros((4, 4))
    for i in range(4):
        cycle[i, (i + 1) % 4], cycle[(i + 1) % 4, i] = 1, -1
    order = np.sign(np.subtract.outer(np.arange(4), np.arange(4)))
    assert has_cycle([cycle, order]).tolist() == [True, False]


def test_identical_responses_are_a_coin_flip_even_for_a_biased_judge():
    logits = np.full((1, 5, 5), 0.7)  # a judge that always prefers the left side
    for mode in ("paper", "reference_code"):
        probability, p_hat, scores = win_rates(logits, mode)
        assert (probability == 0.5).all()
        assert (p_hat == 0.5).all()
        assert (scores == 0).all()
    assert order_inconsistency(logits).tolist() == [1.0]


def test_order_inconsistency_counts_pairs():
    # Pair (0,1) agrees in both orders (2 against -1), pair (0,2) flips (1 and 1), pair (1,2) agrees.
    assert order_inconsistency([[[0, 2, 1], [-1, 0, 3], [1, -3, 0]]]).tolist() == pytest.approx([1 / 3])


@given(LOGITS)
def test_reference_code_equals_the_authors_loops(logits):
    probability, p_hat, scores = win_rates(logits, "reference_code")
    k = logits.shape[1]
    for n in range(len(logits)):
        zeroed = logits[n] * (1 - np.eye(k, dtype=np.float32))
        expected = [sum(float(zeroed[i, j]) - float(zeroed[j, i]) for j in range(k)) / k for i in range(k)]
        assert scores[n] == pytest.approx(expected, abs=1e-4)
        rows = [[1 / (1 + math.exp(scores[n, j] - scores[n, i])) for j in range(k)] for i in range(k)]
        assert probability[n] == pytest.approx(np.array(rows), abs=1e-12)
        assert p_hat[n] == pytest.approx(np.array(rows).sum(axis=1) / k, abs=1e-12)
    assert p_hat.sum(axis=1) == pytest.approx(k / 2)


@given(LOGITS)
def test_paper_properties(logits):
    probability, p_hat, scores = win_rates(logits, "paper")
    k = logits.shape[1]
    assert probability + np.swapaxes(probability, 1, 2) == pytest.approx(np.ones_like(probability))
    assert ((p_hat >= 1 / (2 * k) - 1e-12) & (p_hat <= 1 - 1 / (2 * k) + 1e-12)).all()
    assert scores.sum(axis=1) == pytest.approx(0, abs=1e-9)
    order = np.random.default_rng(0).permutation(k)
    assert win_rates(logits[:, order][:, :, order], "paper")[1] == pytest.approx(p_hat[:, order])


def test_huge_logits_do_not_warn():
    with np.errstate(over="raise"):
        probability = win_rates([[[0, 1e5], [-1e5, 0]]], "paper")[0]
    assert probability[0].tolist() == [[0.5, 1.0], [0.0, 0.5]]


@pytest.mark.parametrize(
    "logits", [np.zeros((2, 2)), np.zeros((1, 2, 3)), np.zeros((1, 1, 1)), [[[0, np.nan], [0, 0]]]]
)
def test_refused(logits):
    with pytest.raises(ValueError, match="logits"):
        win_rates(logits, "paper")
