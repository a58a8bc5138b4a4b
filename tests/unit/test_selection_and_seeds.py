"""Selection rules on ties and duplicates; seeds as pure functions of names."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppo_ray.seeds import derive, sampling_seeds
from sppo_ray.selection import select


def pick(rule, scores, prompt_id="a"):
    return select(rule, np.array(scores, dtype=np.float64), seed=1, iteration=1, prompt_id=prompt_id)


def test_best_worst_takes_the_first_on_ties():
    assert pick("best_worst", [0.1, 0.9, 0.9, -0.5, -0.5]) == (1, 3)
    assert pick("best_worst", [0.0, 0.0, 0.0]) == (0, 0)


def test_all_is_best_first_and_stable():
    assert pick("all", [0.0, 2.0, 0.0, 1.0]) == (1, 3, 0, 2)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.text())
def test_random_pair_is_two_responses_better_first(scores, prompt_id):
    winner, loser = pick("random_pair", scores, prompt_id)
    assert winner != loser
    assert scores[winner] >= scores[loser]
    assert pick("random_pair", scores, prompt_id) == (winner, loser)


def test_random_pair_depends_on_the_prompt():
    assert len({pick("random_pair", [0, 1, 2, 3, 4], str(i)) for i in range(200)}) == 10  # all C(5, 2) pairs


def test_unknown_rule():
    with pytest.raises(ValueError, match="nonsense"):
        pick("nonsense", [0, 1])


def test_reference_seeds_are_the_authors():
    assert sampling_seeds("reference", 42, 3, "x", 5) == (0, 50, 100, 150, 200)


def test_derived_seeds_are_consecutive_and_name_dependent():
    seeds = sampling_seeds("derived", 42, 1, "x", 5)
    assert seeds == tuple(range(seeds[0], seeds[0] + 5))
    others = [sampling_seeds("derived", *names, 5)[0] for names in ((43, 1, "x"), (42, 2, "x"), (42, 1, "y"))]
    assert len({seeds[0], *others}) == 4


def test_derive_keeps_names_apart():
    assert derive("ab", "c") != derive("a", "bc")
    assert 0 <= derive("x") < 2**31
