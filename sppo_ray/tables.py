"""Judged groups as tables, with the columns of the authors' pipeline so that the data opens in other tools.

`generated` (a row per prompt) holds everything a group is; `train` is what is trained on.
Numbers are float64 (the judge's float32 logits are exact in it), so a recomputation in any tool agrees to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sppo_ray.config import Config
from sppo_ray.selection import select
from sppo_ray.types import JudgedGroup, Prompt, Response, ResponseGroup, TrainingExample
from sppo_ray.win_rates import win_rates

TURN = [pa.field("content", pa.string()), pa.field("role", pa.string())]
MESSAGES = pa.list_(pa.struct(TURN))


def generated_schema(k: int) -> pa.Schema:
    matrix = pa.list_(pa.list_(pa.float64()))
    return pa.schema(
        [("prompt_id", pa.string()), ("prompt", pa.string())]
        + [(f"generate_{i}", MESSAGES) for i in range(k)]
        + [
            ("logits", matrix),  # K x K, as the judge gave them
            ("probability", matrix),  # K x K, P(i beats j)
            ("p_hat", pa.list_(pa.float64())),  # K, win rate against the policy
            ("rm_scores", pa.list_(pa.float64())),  # K, by which winner and loser are chosen
            ("policy_version", pa.int64()),
            ("policy_version_end", pa.int64()),
            ("templated", pa.string()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            ("response_token_ids", pa.list_(pa.list_(pa.int32()))),
            ("logprobs", pa.list_(pa.float64())),  # K, nats, under the sampling policy
            ("token_logprobs", pa.list_(pa.list_(pa.float32()))),  # K x T, their summands
            ("token_versions", pa.list_(pa.list_(pa.int32()))),  # K x T of a mixed group, else null
            ("epoch", pa.int64()),  # pass over the slice; 0 where it is sampled once
            ("finish_reasons", pa.list_(pa.string())),
            ("seeds", pa.list_(pa.int64())),
            ("cut_responses", pa.int64()),  # of the K, those that are longer than the judge reads
        ]
    )


TRAIN_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen", MESSAGES),
        ("rejected", MESSAGES),
        ("chosen_probs", pa.float64()),  # P(winner beats loser)
        ("chosen_probs_win", pa.float64()),  # P_hat of the winner
        ("chosen_probs_lose", pa.float64()),  # P_hat of the loser
        ("selected", pa.list_(pa.int32())),  # indices k of the responses trained on, winner first
        ("policy_version", pa.int64()),
    ]
)
CONSUMED = (  # columns that async adds
    pa.field("epoch", pa.int64()),
    pa.field("step", pa.int64()),  # the update that trained the row first, from 1 as in metrics.jsonl
    pa.field("consumed_version", pa.int64()),  # of the learner when that batch was cut
)


@dataclass(frozen=True, slots=True)
class SealedRow:
    """A row of the sealed tables, and in async what became of it."""

    prompt_id: str
    epoch: int = 0
    step: int | None = None
    consumed_version: int | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.epoch


def generated_table(judged: Sequence[JudgedGroup], mode: str) -> pa.Table:
    """Judged groups (all of one K, at least one) as rows, with win rates by formula `mode`."""
    probability, p_hat, scores = win_rates([j.logits for j in judged], mode)  # type: ignore[arg-type]
    groups, k = [j.group for j in judged], probability.shape[1]
    prompts, responses = [g.prompt for g in groups], [g.responses for g in groups]
    every = [r for of_group in responses for r in of_group]  # response k of group n at n * K + k
    columns = {
        "prompt_id": [p.prompt_id for p in prompts],
        "prompt": [p.text for p in prompts],
        **{f"generate_{i}": _conversations(prompts, [of_group[i] for of_group in responses]) for i in range(k)},
        "logits": _matrices(np.stack([j.logits for j in judged]).astype(np.float64)),
        "probability": _matrices(probability),
        "p_hat": _lists_of(k, p_hat.ravel()),
        "rm_scores": _lists_of(k, scores.ravel()),
        "policy_version": [g.version_start for g in groups],
        "policy_version_end": [g.version_end for g in groups],
        "templated": [p.templated for p in prompts],
        "prompt_token_ids": _lists([p.token_ids for p in prompts]),
        "response_token_ids": _lists_of(k, _lists([r.token_ids for r in every])),
        "logprobs": _lists_of(k, [r.logprob for r in every]),
        "token_logprobs": _lists_of(k, _lists([r.token_logprobs for r in every])),
        "token_versions": [_token_versions(g) for g in groups],
        "epoch": [g.epoch for g in groups],
        "finish_reasons": _lists_of(k, [r.finish_reason for r in every]),
        "seeds": _lists_of(k, [r.seed for r in every]),
        "cut_responses": [j.cut for j in judged],
    }
    schema = generated_schema(k)
    return pa.table([_column(columns[field.name], field.type) for field in schema], schema=schema)


def with_every_column(table: pa.Table) -> pa.Table:
    """A `generated` table, also one written before responses were counted that the judge cut."""
    if "cut_responses" in table.column_names:
        return table
    return table.append_column("cut_responses", pa.array([0] * len(table), pa.int64()))


def examples_of(table: pa.Table, config: Config, iteration: int) -> list[TrainingExample]:
    """What the learner trains on, in the order of a `generated` table."""
    return [example for batch in _batches(table) for example in _examples_of(batch, config, iteration)]


def train_table(table: pa.Table, config: Config, iteration: int, sealed: Sequence[SealedRow]) -> pa.Table:
    """The reference pipeline's training columns, from a `generated` table, in its order; in async with CONSUMED."""
    made = [_train_batch(batch, config, iteration) for batch in _batches(table)]
    rows = pa.Table.from_batches(made, schema=TRAIN_SCHEMA)
    if config.schedule.mode == "async":
        for field in CONSUMED:
            rows = rows.append_column(field, pa.array([getattr(row, field.name) for row in sealed], field.type))
    return rows


def _batches(table: pa.Table) -> list[pa.RecordBatch]:
    """A few thousand rows at a time: what is made of them on the way takes memory, too."""
    return table.to_batches(max_chunksize=4096)


# Columns from arrays: a row at a time in Python would cost more than all else the buffer does.


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    return values.cast(kind) if isinstance(values, pa.Array) else pa.array(values, kind)


def _conversations(prompts: Sequence[Prompt], responses: Sequence[Response]) -> pa.Array:
    texts = [text for p, r in zip(prompts, responses, strict=True) for text in (p.text, r.text)]
    turns = pa.StructArray.from_arrays([pa.array(texts), pa.array(["user", "assistant"] * len(prompts))], fields=TURN)
    return _lists_of(2, turns)


def _matrices(values: NDArray[np.float64]) -> pa.Array:
    """[N, K, K]"""
    k = values.shape[1]
    return _lists_of(k, _lists_of(k, values.ravel()))


def _lists_of(size: int, values: Any) -> pa.Array:
    """Lists of equal size, one after the other."""
    offsets = np.arange(0, len(values) + 1, size, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values if isinstance(values, pa.Array) else pa.array(values))


def _lists(arrays: Sequence[NDArray[Any]]) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(arrays)))


def _token_versions(group: ResponseGroup) -> list[NDArray[np.int32]] | None:
    if group.version_start == group.version_end:
        return None
    return [
        np.full(len(r.token_ids), group.version_start, np.int32) if r.token_versions is None else r.token_versions
        for r in group.responses
    ]


# Rows from columns.


@dataclass(frozen=True, slots=True)
class _Ragged:
    """Row n of a column of lists of numbers; of lists of those, list k of row n."""

    values: NDArray[Any]
    ends: tuple[NDArray[np.int32], ...]  # offsets, from the outermost lists inwards

    @classmethod
    def of(cls, column: pa.Array) -> _Ragged:
        ends = []
        while isinstance(column, pa.ListArray):
            ends.append(column.offsets.to_numpy())
            column = column.values
        return cls(column.to_numpy(), tuple(ends))

    def row(self, n: int, k: int | None = None) -> NDArray[Any]:
        """A copy: a view would keep the whole column in memory."""
        at = n if k is None else int(self.ends[0][n]) + k
        return self.values[self.ends[-1][at] : self.ends[-1][at + 1]].copy()


def _examples_of(batch: pa.RecordBatch, config: Config, iteration: int) -> Iterator[TrainingExample]:
    probability, p_hat = _win_rates_of(batch)
    prompts, responses = _Ragged.of(batch["prompt_token_ids"]), _Ragged.of(batch["response_token_ids"])
    logprobs = _Ragged.of(batch["token_logprobs"])
    names, versions = batch["prompt_id"].to_pylist(), batch["policy_version"].to_pylist()
    for n, selected in enumerate(_selected(batch, config, iteration)):
        yield TrainingExample(
            prompt_id=names[n],
            prompt_ids=prompts.row(n),
            response_ids=tuple(responses.row(n, k) for k in selected),
            p_hat=tuple(float(p_hat[n, k]) for k in selected),
            p_pair=float(probability[n, selected[0], selected[-1]]),
            policy_version=versions[n],
            token_logprobs=tuple(logprobs.row(n, k) for k in selected),
        )


def _train_batch(batch: pa.RecordBatch, config: Config, iteration: int) -> pa.RecordBatch:
    probability, p_hat = _win_rates_of(batch)
    selected = _selected(batch, config, iteration)
    rows, winner, loser = np.arange(len(batch)), np.array([s[0] for s in selected]), np.array([s[-1] for s in selected])
    conversations = pa.concat_arrays([batch[f"generate_{i}"] for i in range(p_hat.shape[1])])
    columns = {
        "prompt_id": batch["prompt_id"],
        "chosen": conversations.take(pa.array(winner * len(batch) + rows)),
        "rejected": conversations.take(pa.array(loser * len(batch) + rows)),
        "chosen_probs": probability[rows, winner, loser],
        "chosen_probs_win": p_hat[rows, winner],
        "chosen_probs_lose": p_hat[rows, loser],
        "selected": selected,
        "policy_version": batch["policy_version"],
    }
    arrays = [_column(columns[field.name], field.type) for field in TRAIN_SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=TRAIN_SCHEMA)


def _win_rates_of(batch: pa.RecordBatch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """probability [N, K, K] and p_hat [N, K]"""
    p_hat = batch["p_hat"].flatten().to_numpy().reshape(len(batch), -1)
    k = p_hat.shape[1]
    return batch["probability"].flatten().flatten().to_numpy().reshape(len(batch), k, k), p_hat


def _selected(batch: pa.RecordBatch, config: Config, iteration: int) -> list[tuple[int, ...]]:
    """Of each row."""
    scores = batch["rm_scores"].flatten().to_numpy().reshape(len(batch), -1)
    names = batch["prompt_id"].to_pylist()
    return [
        select(config.selection.rule, row, seed=config.run.seed, iteration=iteration, prompt_id=name)
        for row, name in zip(scores, names, strict=True)
    ]
