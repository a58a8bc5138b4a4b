"""Held-out evaluation of each iteration's policy: the judge's win rate against the base and the previous policy, mean length,
and for the tiny domain the known rule's score, so that a policy that only exploits the judge is seen.

Win rate: share of prompts whose debiased pairwise logit (both orders) prefers the new policy's response; ties count half.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from sppo_ray.atomic import write_json
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.protocols import Handle, Rollout
from sppo_ray.schedules.supervision import again_if_lost
from sppo_ray.seeds import sampling_seeds
from sppo_ray.storage import Storage
from sppo_ray.table_files import read_table, write_table
from sppo_ray.threads import in_daemon_thread
from sppo_ray.types import Prompt, ResponseGroup, Sampling

MODES = ("greedy", "sampled")
SCHEMA = pa.schema(
    [("prompt_id", pa.string()), ("prompt", pa.string()), ("templated", pa.string())]
    + [(mode, pa.string()) for mode in MODES]
    + [(f"{mode}_tokens", pa.int64()) for mode in MODES]
)


class Scorer(Protocol):
    """Judge calls on bare texts."""

    async def score(self, source: str, candidates: Sequence[str]) -> np.ndarray:
        """PairRM logits [K, K]."""
        ...


class Oracle(Protocol):
    def score(self, prompt: str, response: str) -> float: ...

    def is_junk(self, prompt: str, response: str) -> bool: ...


class HeldOutEvaluator:
    """Implements `protocols.Evaluator`. Responses of every iteration are kept, so no policy is sampled twice."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        rollout: Rollout,
        scorer: Scorer,
        fetch: Callable[[Handle], Awaitable[ResponseGroup]],
        record: Callable[[Mapping[str, Any]], Awaitable[bool]],
        oracle: Oracle | None,
    ) -> None:
        self.config, self.prompts, self.rollout, self.scorer = config, prompts, rollout, scorer
        self.fetch, self.record, self.oracle = fetch, record, oracle
        self._storage = Storage(config.run.storage_patience_s)

    async def evaluate(self, iteration: int) -> None:
        """Policy `iteration` must be the one that is served. Raises StorageError if the disk does not take its responses, or does
        not give back those of others."""
        if not self.prompts:
            return
        responses = await self._read(iteration)
        if responses is None:
            responses = list(await asyncio.gather(*(self._sample(prompt, iteration) for prompt in self.prompts)))
            await self._write(self._path(iteration), pa.Table.from_pylist(responses, schema=SCHEMA))
        figures = summarise(responses, self.oracle)
        if iteration > 0:
            for name, against in (("base", 0), ("previous", iteration - 1)):
                if (
                    others := await self._read(against)
                ) is not None:  # else damaged, and set aside when the run went on
                    figures |= await self._win_rates(responses, others, name)
        await self.record({"event": "evaluation", "iteration": iteration, "prompts": len(responses), **figures})

    async def _write(self, path: Path, table: pa.Table) -> None:
        def write() -> None:
            write_json(path.with_suffix(".json"), {path.name: write_table(path, table)})

        await in_daemon_thread(lambda: self._storage.patiently("held-out responses", path, write))

    def _path(self, iteration: int) -> Path:
        return Path(self.config.run.dir) / f"iter_{iteration}" / "evaluation.parquet"

    async def _read(self, iteration: int) -> list[dict[str, Any]] | None:
        """The responses of policy `iteration`, sampled when it was served; None if there are none."""
        path = self._path(iteration)

        def read() -> list[dict[str, Any]] | None:
            rows: list[dict[str, Any]] | None = read_table(path).to_pylist() if path.exists() else None
            return rows

        return await in_daemon_thread(lambda: self._storage.patiently("held-out responses", path, read, "read"))

    @again_if_lost
    async def _sample(self, prompt: Prompt, iteration: int) -> dict[str, Any]:
        rollout = self.config.rollout
        # The seed does not depend on the iteration: two policies answer with the same noise, which makes them comparable.
        seeds = sampling_seeds("derived", self.config.run.seed, 0, prompt.prompt_id, 1)
        row: dict[str, Any] = {"prompt_id": prompt.prompt_id, "prompt": prompt.text, "templated": prompt.templated}
        for mode, temperature, top_p in (("greedy", 0.0, 1.0), ("sampled", rollout.temperature, rollout.top_p)):
            sampling = Sampling(temperature, top_p, rollout.max_new_tokens, seeds)
            group = await self.fetch(await self.rollout.generate(prompt, sampling, iteration))
            row[mode] = group.responses[0].text
            row[f"{mode}_tokens"] = len(group.responses[0].token_ids)
        return row

    async def _win_rates(self, new: list[dict[str, Any]], old: list[dict[str, Any]], name: str) -> dict[str, float]:
        figures: dict[str, float] = {}
        source = "templated" if self.config.judge.source == "templated" else "prompt"
        for mode in MODES:
            logits = await asyncio.gather(
                *(self._score(a["prompt_id"], a[source], [a[mode], b[mode]]) for a, b in zip(new, old, strict=True))
            )
            # A candidate against itself is a tie whatever the judge's bias: L_01 - L_10 is then exactly zero.
            figures[f"judge_win_vs_{name}_{mode}"] = win_share([float(x[0, 1]) - float(x[1, 0]) for x in logits])
            if self.oracle:
                score = self.oracle.score
                margins = [
                    score(a["prompt"], a[mode]) - score(b["prompt"], b[mode]) for a, b in zip(new, old, strict=True)
                ]
                figures[f"oracle_win_vs_{name}_{mode}"] = win_share(margins)
        return figures

    async def _score(self, prompt_id: str, source: str, candidates: list[str]) -> np.ndarray:
        try:
            return await self.scorer.score(source, candidates)
        except SppoError as error:
            error.add_note(f"while the held-out prompt {prompt_id!r} was judged")
            raise


def win_share(margins: Sequence[float]) -> float:
    """Share of positive margins, ties half."""
    return float(np.mean([0.5 if m == 0 else float(m > 0) for m in margins]))


def summarise(rows: Sequence[Mapping[str, Any]], oracle: Oracle | None) -> dict[str, float]:
    """Mean length in tokens, and the known rule's figures, of one policy's responses."""
    figures: dict[str, float] = {}
    for mode in MODES:
        figures[f"mean_tokens_{mode}"] = float(np.mean([row[f"{mode}_tokens"] for row in rows]))
        if oracle:
            figures[f"oracle_mean_{mode}"] = float(np.mean([oracle.score(row["prompt"], row[mode]) for row in rows]))
            figures[f"junk_rate_{mode}"] = float(np.mean([oracle.is_junk(row["prompt"], row[mode]) for row in rows]))
    return figures
