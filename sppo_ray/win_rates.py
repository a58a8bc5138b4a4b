"""From PairRM logits to win rates: the two formulas of the paper and of the authors' code, and what they disagree about.

Everything is vectorised over N prompts. L[n, i, j] is the judge's logit for prompt n with response i on the left and j on
the right, so a positive entry prefers i. The diagonal is ignored.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]
Mode = Literal["paper", "reference_code"]


def win_rates(logits: ArrayLike, mode: Mode) -> tuple[Float64, Float64, Float64]:
    """Logits [N, K, K] to (probability [N, K, K], p_hat [N, K], scores [N, K]), all float64.

    paper: s_ij = (L_ij - L_ji) / 2 takes out the judge's bias for a side; P_ij = sigmoid(s_ij); P_hat_i = mean_j P_ij;
        score_i = mean_j s_ij. P may be intransitive, which is the point of the method.
    reference_code: score_i = sum_j (L_ij - L_ji) / K in float32; P_ij = sigmoid(score_i - score_j); P_hat_i = mean_j P_ij:
        a Bradley-Terry collapse (uclaml/SPPO scripts/rank.py, compute_prob.py), hence transitive.
    In both, P_ii = 1/2 and the diagonal counts in the mean, so P_hat_i lies in [1/(2K), 1 - 1/(2K)].
    Raises ValueError for a wrong shape, mode, or non-finite logits.
    """
    raw = _checked(logits)
    if mode == "paper":
        pairwise = (raw - np.swapaxes(raw, 1, 2)) / 2
        scores = pairwise.mean(axis=2)
        probability = _sigmoid(pairwise)
    elif mode == "reference_code":
        raw32 = raw.astype(np.float32)
        k = np.float32(raw.shape[1])
        scores = ((raw32 - np.swapaxes(raw32, 1, 2)).sum(axis=2) / k).astype(np.float64)
        probability = _sigmoid(scores[:, :, None] - scores[:, None, :])
    else:
        raise ValueError(f"win-rate mode {mode!r} is neither 'paper' nor 'reference_code'")
    return probability, probability.mean(axis=2), scores


def order_inconsistency(logits: ArrayLike) -> Float64:
    """[N, K, K] to [N]: share of the K(K-1)/2 pairs whose verdict flips when the two responses swap sides."""
    raw = _checked(logits)
    upper = np.triu_indices(raw.shape[1], k=1)
    one, other = raw[:, upper[0], upper[1]], raw[:, upper[1], upper[0]]
    return np.asarray((one * other > 0).mean(axis=1), dtype=np.float64)


def has_cycle(logits: ArrayLike) -> NDArray[np.bool_]:
    """[N, K, K] to [N]: whether the debiased majority preferences hold some i > j > k > i."""
    raw = _checked(logits)
    beats = (raw - np.swapaxes(raw, 1, 2)) > 0
    # A tournament (or partial tournament closed under 3-cycles) has a cycle iff some path of length two runs backwards.
    reach = beats.copy()
    for _ in range(raw.shape[1]):
        reach |= np.matmul(reach.astype(np.int64), beats.astype(np.int64)) > 0
    return np.asarray(np.einsum("nii->n", reach.astype(np.int64)) > 0)


def _checked(logits: ArrayLike) -> Float64:
    raw = np.array(logits, dtype=np.float64)
    if raw.ndim != 3 or raw.shape[1] != raw.shape[2] or raw.shape[1] < 2:
        raise ValueError(f"logits must be [N, K, K] with K >= 2, not {list(raw.shape)}")
    diagonal = np.arange(raw.shape[1])
    raw[:, diagonal, diagonal] = 0.0
    if not np.isfinite(raw).all():
        raise ValueError(
            f"logits of groups {np.flatnonzero(~np.isfinite(raw).all(axis=(1, 2))).tolist()} are not finite"
        )
    return raw


def _sigmoid(x: Float64) -> Float64:
    # The textbook form, so that a few-line script that recomputes a run's tables agrees to the last bit.
    with np.errstate(over="ignore"):  # exp overflows to inf below -709, where 1 / (1 + inf) = 0 is the right answer
        return np.asarray(1 / (1 + np.exp(-x)), dtype=np.float64)
