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
from sppo_ray.types import JudgedGroup, ResponseGroup, TrainingExample
from sppo_ray.win_rates import win_rates

MESSAGES = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))


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
    """Judged groups (all of one K) as rows, with win rates by formula `mode`."""
    probability, p_hat, scores = win_rates([j.logits for j in judged], mode)  # type: ignore[arg-type]
    rows = [
        _generated_row(j, probability[n].tolist(), p_hat[n].tolist(), scores[n].tolist())
        for n, j in enumerate(judged)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=generated_schema(probability.shape[1]))


def examples_of(table: pa.Table, config: Config, iteration: int) -> list[TrainingExample]:
    """What the learner trains on, a row of `generated` at a time."""
    return [_example_of(row, config, iteration) for row in _rows(table)]


def train_table(table: pa.Table, config: Config, iteration: int, sealed: Sequence[SealedRow]) -> pa.Table:
    """The reference pipeline's training columns, from a `generated` table, in its order; in async with CONSUMED."""
    rows = pa.Table.from_pylist([_train_row(r, config, iteration) for r in _rows(table)], schema=TRAIN_SCHEMA)
    if config.schedule.mode == "async":
        for field in CONSUMED:
            rows = rows.append_column(field, pa.array([getattr(row, field.name) for row in sealed], field.type))
    return rows


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as Python objects, a few at a time: token ids take ten times the memory as Python lists."""
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _generated_row(judged: JudgedGroup, probability: Any, p_hat: Any, scores: Any) -> dict[str, Any]:
    group, prompt, responses = judged.group, judged.group.prompt, judged.group.responses
    return {
        "prompt_id": prompt.prompt_id,
        "prompt": prompt.text,
        **{f"generate_{i}": _conversation(prompt.text, r.text) for i, r in enumerate(responses)},
        "logits": judged.logits.astype(np.float64).tolist(),
        "probability": probability,
        "p_hat": p_hat,
        "rm_scores": scores,
        "policy_version": group.version_start,
        "policy_version_end": group.version_end,
        "templated": prompt.templated,
        "prompt_token_ids": prompt.token_ids.tolist(),
        "response_token_ids": [r.token_ids.tolist() for r in responses],
        "logprobs": [r.logprob for r in responses],
        "token_logprobs": [r.token_logprobs.tolist() for r in responses],
        "token_versions": _token_versions(group),
        "epoch": group.epoch,
        "finish_reasons": [r.finish_reason for r in responses],
        "seeds": [r.seed for r in responses],
    }


def _token_versions(group: ResponseGroup) -> list[list[int]] | None:
    if group.version_start == group.version_end:
        return None
    return [
        [group.version_start] * len(r.token_ids) if r.token_versions is None else r.token_versions.tolist()
        for r in group.responses
    ]


def _conversation(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"content": prompt, "role": "user"}, {"content": response, "role": "assistant"}]


def _selected(row: dict[str, Any], config: Config, iteration: int) -> tuple[int, ...]:
    scores = np.array(row["rm_scores"])
    return select(
        config.selection.rule, scores, seed=config.run.seed, iteration=iteration, prompt_id=row["prompt_id"]
    )  # fmt: skip


def _example_of(row: dict[str, Any], config: Config, iteration: int) -> TrainingExample:
    selected = _selected(row, config, iteration)
    return TrainingExample(
        prompt_id=row["prompt_id"],
        prompt_ids=_ids(row["prompt_token_ids"]),
        response_ids=tuple(_ids(row["response_token_ids"][k]) for k in selected),
        p_hat=tuple(row["p_hat"][k] for k in selected),
        p_pair=row["probability"][selected[0]][selected[-1]],
        policy_version=row["policy_version"],
        token_logprobs=tuple(np.array(row["token_logprobs"][k], dtype=np.float32) for k in selected),
    )


def _train_row(row: dict[str, Any], config: Config, iteration: int) -> dict[str, Any]:
    selected = _selected(row, config, iteration)
    winner, loser = selected[0], selected[-1]
    return {
        "prompt_id": row["prompt_id"],
        "chosen": row[f"generate_{winner}"],
        "rejected": row[f"generate_{loser}"],
        "chosen_probs": row["probability"][winner][loser],
        "chosen_probs_win": row["p_hat"][winner],
        "chosen_probs_lose": row["p_hat"][loser],
        "selected": list(selected),
        "policy_version": row["policy_version"],
    }


def _ids(tokens: Sequence[int]) -> NDArray[np.int32]:
    return np.array(tokens, dtype=np.int32)
