"""From training examples to padded arrays: shuffling, truncation, splitting over ranks, collation. numpy only.

epoch_order -> batches -> (per batch) truncate -> split over ranks and micro-batches -> collate
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sppo_ray.types import TrainingExample

PADDING = -1  # in a split: a row that stands for no example


def epoch_order(n: int, seed: int, iteration: int, epoch: int) -> np.ndarray:
    """int64 [n]: the order in which a slice is trained in one epoch; depends on nothing but the arguments."""
    return np.random.default_rng([seed, iteration, epoch]).permutation(n)


def batches(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """An epoch's global batches, in order; the last may be smaller, none is empty."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@dataclass(frozen=True, slots=True)
class Truncation:
    """What was cut from one example."""

    prompt_tokens: int
    responses: int  # responses that lost their end (and with it their EOS)
    response_tokens: int  # over all of them

    @property
    def any(self) -> bool:
        return self.prompt_tokens > 0 or self.responses > 0


def truncate(example: TrainingExample, max_length: int, max_prompt_length: int) -> tuple[TrainingExample, Truncation]:
    """The reference code's rule (REFERENCE: truncation), for M responses instead of two.

    If prompt + longest response exceeds max_length, the last max_prompt_length prompt tokens are kept; if that is still
    too long, every response is cut to max_length - max_prompt_length, even where a short prompt would leave more room.
    Recorded log-probabilities are cut with their tokens. Those of the tokens kept stay right when responses are cut, since
    a token depends on what is before it only; not when the prompt is.
    """
    longest = max(len(ids) for ids in example.response_ids)
    prompt, responses, logprobs = example.prompt_ids, example.response_ids, example.token_logprobs
    if len(prompt) + longest > max_length:
        prompt = prompt[-max_prompt_length:]
    if len(prompt) + longest > max_length:
        room = max_length - max_prompt_length
        responses, logprobs = tuple(ids[:room] for ids in responses), tuple(values[:room] for values in logprobs)
    cut = [len(before) - len(after) for before, after in zip(example.response_ids, responses, strict=True)]
    truncation = Truncation(
        prompt_tokens=len(example.prompt_ids) - len(prompt),
        responses=sum(tokens > 0 for tokens in cut),
        response_tokens=sum(cut),
    )
    return replace(example, prompt_ids=prompt, response_ids=responses, token_logprobs=logprobs), truncation


def split(lengths: Sequence[int], world: int, micro_batch: int) -> np.ndarray:
    """Deal a global batch over ranks: int64 [S, world, micro_batch] of indices into it, PADDING where there is none.

    Every rank runs the same number S of forwards, since under ZeRO-3 each is a collective. Examples are dealt longest
    first, so the rows of a micro-batch, on all ranks, are of similar length (little padding, no rank waits) and a batch
    that does not fit in memory fails at once. The order inside a batch does not change its mean.
    """
    rows_per_step = world * micro_batch
    steps = max(1, -(-len(lengths) // rows_per_step))
    dealt = np.full(steps * rows_per_step, PADDING, dtype=np.int64)
    dealt[: len(lengths)] = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    # Neighbours in length go to different ranks: [steps, micro, world] -> [steps, world, micro].
    return dealt.reshape(steps, micro_batch, world).transpose(0, 2, 1)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of one rank: R examples with M responses each; row r * M + m is response m of example r."""

    input_ids: np.ndarray  # int64 [R*M, T], prompt + response, padded on the right
    attention_mask: np.ndarray  # int64 [R*M, T], 1 on tokens
    response_mask: np.ndarray  # bool [R*M, T], True on response tokens
    p_hat: np.ndarray  # float32 [R, M]
    p_pair: np.ndarray  # float32 [R]
    reference: np.ndarray  # float32 [R, M] nats; 0 where not known yet
    weight: np.ndarray  # float32 [R]: 1 for an example, 0 for padding
    staleness: np.ndarray  # int64 [R], versions; 0 for padding


def collate(rows: Sequence[TrainingExample | None], responses: int, pad_id: int) -> MicroBatch:
    """Arrays for one micro-batch; None is a padding row: two tokens long, weight 0, finite everywhere.

    responses: M, the same in every example. Raises ValueError for another M or an empty prompt (the first response
    token would have nothing to be predicted from).
    """
    padding = np.zeros(1, dtype=np.int32)
    sequences: list[tuple[np.ndarray, np.ndarray]] = []
    for row in rows:
        if row is None:
            sequences += [(padding, padding)] * responses
            continue
        if len(row.response_ids) != responses or len(row.prompt_ids) == 0:
            raise ValueError(
                f"prompt {row.prompt_id} has {len(row.prompt_ids)} tokens and {len(row.response_ids)} responses: the "
                f"learner needs at least one token, and {responses} responses for every prompt of this batch."
            )
        sequences += [(row.prompt_ids, response) for response in row.response_ids]

    shape = (len(sequences), max(len(prompt) + len(response) for prompt, response in sequences))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    response_mask = np.zeros(shape, dtype=bool)
    for i, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        input_ids[i, : len(prompt)] = prompt
        input_ids[i, len(prompt) : end] = response
        attention_mask[i, :end] = 1
        response_mask[i, len(prompt) : end] = True

    half, zero = (0.5,) * responses, (0.0,) * responses
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_mask=response_mask,
        p_hat=np.array([half if row is None else row.p_hat for row in rows], dtype=np.float32),
        p_pair=np.array([0.5 if row is None else row.p_pair for row in rows], dtype=np.float32),
        reference=np.array([zero if row is None else row.reference_logps or zero for row in rows], dtype=np.float32),
        weight=np.array([row is not None for row in rows], dtype=np.float32),
        staleness=np.array([0 if row is None else row.staleness for row in rows], dtype=np.int64),
    )


def projection_chunks(dealt: np.ndarray, response_tokens: Sequence[int], responses: int, chunk: int) -> list[int]:
    """Vocabulary projections each of the S forwards needs: the most any rank needs, since under ZeRO-3 each projection
    gathers lm_head on all ranks together and ranks that disagree on the count would wait for each other for ever.

    dealt: from `split`. response_tokens [n]: tokens of the M responses of each example. chunk: positions a projection.
    """
    tokens = np.append(np.asarray(response_tokens, dtype=np.int64), responses)  # the last entry is what PADDING picks
    per_rank = tokens[dealt].sum(axis=2)
    return [max(1, -(-int(most) // chunk)) for most in per_rank.max(axis=1)]


def deal(examples: Sequence[TrainingExample], world: int, micro_batch: int, chunk: int) -> tuple[np.ndarray, list[int]]:
    """`split` and `projection_chunks` of a batch of truncated examples, all with as many responses."""
    tokens = [sum(map(len, e.response_ids)) for e in examples]
    longest = [len(e.prompt_ids) + max(map(len, e.response_ids)) for e in examples]
    dealt = split(longest, world, micro_batch)
    return dealt, projection_chunks(dealt, tokens, len(examples[0].response_ids), chunk)
