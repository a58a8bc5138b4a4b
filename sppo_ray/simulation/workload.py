"""Lengths of prompts and responses: heavy-tailed, alike within a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from sppo_ray.types import Prompt

# Percentiles 0..100 of response lengths in tokens, of 805 x 5 responses to AlpacaEval's prompts by five 7-8 B models
# (Mistral-7B-Instruct, Llama-3-8B-Instruct and their SPPO and Snorkel descendants), at 4 characters a token.
RESPONSE_TOKENS = (
    1, 31, 48, 58, 72, 83, 94, 105, 118, 128, 140, 152, 163, 174, 186, 199, 211, 226, 237, 248, 256, 267, 277, 290, 298,
    309, 321, 332, 341, 352, 359, 368, 376, 387, 394, 402, 410, 417, 424, 431, 438, 444, 453, 459, 468, 473, 480, 488,
    495, 502, 509, 514, 522, 528, 535, 542, 549, 557, 565, 573, 578, 586, 592, 599, 607, 615, 622, 630, 635, 643, 652,
    660, 669, 678, 684, 695, 705, 711, 719, 728, 736, 746, 759, 768, 780, 793, 809, 820, 834, 851, 867, 880, 900, 924,
    951, 979, 1012, 1077, 1160, 1593, 3958,
)  # fmt: skip
ALIKE = 0.7  # correlation of the normal scores of two responses to one prompt, in the same data
# AlpacaEval's prompts have a median of 25 tokens; UltraFeedback's, which the configs train on, are longer: log-normal
# with median 100, 95 % below 500. Our estimate.
PROMPT_MEDIAN, PROMPT_SIGMA, PROMPT_MOST = 100, 1.0, 1024


@dataclass(frozen=True, slots=True)
class Workload:
    """Lengths of every group of a run. A slice per iteration."""

    prompts: tuple[tuple[Prompt, ...], ...]  # a prompt's only token is its length
    responses: tuple[NDArray[np.int32], ...]  # [epochs, n, K] of each slice

    def of(self, prompt_id: str, epoch: int) -> NDArray[np.int32]:
        """int32 [K]"""
        iteration, index = prompt_id.split("-")
        slice_of = self.responses[int(iteration) - 1]
        return np.asarray(slice_of[epoch, int(index)], dtype=np.int32)


def make_workload(
    slices: Sequence[int], k: int, longest: int, quantiles: Sequence[float] = RESPONSE_TOKENS, seed: int = 0,
    epochs: int = 1,
) -> Workload:  # fmt: skip
    """slices: prompts of each iteration. k: responses to a prompt. longest: max_new_tokens."""
    rng = np.random.default_rng(seed)
    prompts, responses = [], []
    for t, n in enumerate(slices, start=1):
        lengths = np.clip(PROMPT_MEDIAN * np.exp(PROMPT_SIGMA * rng.normal(size=n)), 4, PROMPT_MOST).astype(np.int32)
        prompts.append(tuple(Prompt(f"{t}-{i}", "", "", lengths[i : i + 1]) for i in range(n)))
        shared, own = rng.normal(size=(epochs, n, 1)), rng.normal(size=(epochs, n, k))
        scores = np.sqrt(ALIKE) * shared + np.sqrt(1 - ALIKE) * own
        drawn = np.interp(_normal_cdf(scores), np.linspace(0, 1, len(quantiles)), quantiles)
        responses.append(np.clip(drawn, 1, longest).astype(np.int32))
    return Workload(tuple(prompts), tuple(responses))


def _normal_cdf(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    grid, values = _normal_table()
    return np.interp(scores, grid, values)


@lru_cache(maxsize=1)
def _normal_table() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    grid = np.linspace(-5, 5, 2001)
    return grid, np.array([NormalDist().cdf(x) for x in grid])
