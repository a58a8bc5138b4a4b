"""Truncation against the reference rule; properties of shuffling, splitting and collation."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppo_ray.batching import PADDING, batches, collate, epoch_order, projection_chunks, split, truncate
from sppo_ray.types import TrainingExample


def example(prompt: int, *responses: int, prompt_id: str = "p") -> TrainingExample:
    return TrainingExample(
        prompt_id=prompt_id,
        prompt_ids=np.arange(prompt, dtype=np.int32),
        response_ids=tuple(np.arange(1000, 1000 + n, dtype=np.int32) for n in responses),
        p_hat=tuple(0.5 for _ in responses),
        p_pair=0.5,
        policy_version=0,
    )


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ((500, 524, 10), (500, 524, 10)),  # just fits
        ((500, 525, 10), (500, 512, 10)),  # the prompt is not over 512, so the long response is cut to 512
        ((600, 424, 10), (600, 424, 10)),  # a long prompt stays while everything fits
        ((600, 425, 10), (512, 425, 10)),  # cutting the prompt is enough
        ((600, 900, 700), (512, 512, 512)),
        ((100, 950, 20), (100, 512, 20)),  # the reference cuts to 512 although 924 would fit
    ],
)
def test_reference_truncation(lengths: tuple[int, ...], kept: tuple[int, ...]) -> None:
    before = example(*lengths)
    after, truncation = truncate(before, max_length=1024, max_prompt_length=512)
    assert (len(after.prompt_ids), *map(len, after.response_ids)) == kept
    assert truncation.prompt_tokens == lengths[0] - kept[0]
    assert truncation.response_tokens == sum(lengths[1:]) - sum(kept[1:])
    assert truncation.responses == sum(a > b for a, b in zip(lengths[1:], kept[1:], strict=True))
    assert truncation.any == (lengths != kept)
    np.testing.assert_array_equal(after.prompt_ids, before.prompt_ids[-kept[0] :])  # the last prompt tokens
    np.testing.assert_array_equal(after.response_ids[0], before.response_ids[0][: kept[1]])  # the first response tokens


@given(st.integers(1, 90), st.lists(st.integers(0, 90), min_size=1, max_size=4), st.integers(20, 64))
def test_nothing_exceeds_max_length(prompt: int, responses: list[int], max_length: int) -> None:
    after, _ = truncate(example(prompt, *responses), max_length, max_prompt_length=16)
    assert len(after.prompt_ids) + max(map(len, after.response_ids)) <= max_length
    assert len(after.prompt_ids) >= 1


@given(st.integers(0, 200), st.integers(0, 2**32), st.integers(1, 9), st.integers(0, 9), st.integers(1, 70))
def test_an_epoch_visits_every_example_once(n: int, seed: int, iteration: int, epoch: int, size: int) -> None:
    order = epoch_order(n, seed, iteration, epoch)
    np.testing.assert_array_equal(order, epoch_order(n, seed, iteration, epoch))
    cut = batches(order, size)
    assert [i for batch in cut for i in batch] == order.tolist()
    assert sorted(order.tolist()) == list(range(n))
    assert all(len(batch) == size for batch in cut[:-1])
    assert all(1 <= len(batch) <= size for batch in cut)


def test_recorded_log_probabilities_are_cut_with_their_tokens() -> None:
    before = replace(example(600, 900, 5), token_logprobs=(-np.arange(900.0), -np.arange(5.0)))
    after, _ = truncate(before, max_length=1024, max_prompt_length=512)
    assert [len(ids) for ids in after.response_ids] == [512, 5]
    np.testing.assert_array_equal(after.token_logprobs[0], -np.arange(512.0))  # of the first tokens
    np.testing.assert_array_equal(after.token_logprobs[1], -np.arange(5.0))
    assert truncate(example(600, 900, 5), 1024, 512)[0].token_logprobs == ()  # where none were recorded


def test_epochs_and_iterations_are_shuffled_differently() -> None:
    orders = {tuple(epoch_order(50, 42, t, e)) for t in (1, 2, 3) for e in (0, 1)}
    assert len(orders) == 6


def test_the_shuffle_is_the_same_in_another_process() -> None:
    code = "from sppo_ray.batching import epoch_order; print(epoch_order(20, 42, 1, 0).tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str(epoch_order(20, 42, 1, 0).tolist())


sizes = st.tuples(st.lists(st.integers(2, 500), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 8))


@given(sizes)
def test_a_split_deals_every_example_once_and_ranks_run_in_step(case: tuple[list[int], int, int]) -> None:
    lengths, world, micro = case
    dealt = split(lengths, world, micro)
    assert dealt.shape[1:] == (world, micro)  # so all ranks run dealt.shape[0] forwards
    assert sorted(dealt[dealt != PADDING].tolist()) == list(range(len(lengths)))
    assert len(dealt) == max(1, -(-len(lengths) // (world * micro)))  # no more forwards than needed


@given(sizes)
def test_longest_first(case: tuple[list[int], int, int]) -> None:
    lengths, world, micro = case
    longest = [
        max((lengths[i] for i in step.ravel() if i != PADDING), default=0) for step in split(lengths, world, micro)
    ]
    assert longest == sorted(longest, reverse=True)


@given(sizes, st.integers(1, 300))
def test_projections_are_enough_for_every_rank(case: tuple[list[int], int, int], chunk: int) -> None:
    lengths, world, micro = case
    dealt = split(lengths, world, micro)
    chunks = projection_chunks(dealt, lengths, 2, chunk)
    assert len(chunks) == len(dealt)
    for step, count in zip(dealt, chunks, strict=True):
        needed = [sum(lengths[i] if i != PADDING else 2 for i in rank) for rank in step]
        assert (count - 1) * chunk < max(needed) <= count * chunk


def test_collate() -> None:
    batch = collate([replace(example(3, 2, 1), staleness=4), None], responses=2, pad_id=7)
    np.testing.assert_array_equal(
        batch.input_ids,
        [[0, 1, 2, 1000, 1001], [0, 1, 2, 1000, 7], [0, 0, 7, 7, 7], [0, 0, 7, 7, 7]],
    )
    np.testing.assert_array_equal(batch.attention_mask.sum(axis=1), [5, 4, 2, 2])
    np.testing.assert_array_equal(batch.response_mask.nonzero(), [[0, 0, 1, 2, 3], [3, 4, 3, 1, 1]])
    np.testing.assert_array_equal(batch.weight, [1, 0])
    np.testing.assert_array_equal(batch.staleness, [4, 0])
    assert batch.p_hat.shape == batch.reference.shape == (2, 2)


def test_collate_refuses_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="prompt bad has 0 tokens"):
        collate([example(0, 2, 2, prompt_id="bad")], responses=2, pad_id=0)
    with pytest.raises(ValueError, match="3 responses"):
        collate([example(2, 2, 2, 2)], responses=2, pad_id=0)


def test_batching_imports_no_torch() -> None:
    code = "import sys, sppo_ray.batching; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
