"""Held-out evaluation: win rates by hand, both orders, ties, and responses sampled once per policy."""

from __future__ import annotations

import asyncio
import errno
import io
import os

import numpy as np
import pytest
from groups import config, prompt
from rich.console import Console

from sppo_ray import storage
from sppo_ray.evaluation import HeldOutEvaluator, win_share
from sppo_ray.protocols import Handle
from sppo_ray.recovery import recover
from sppo_ray.storage import StorageError
from sppo_ray.summary import closing_table
from sppo_ray.types import Receipt, Response, ResponseGroup

PROMPTS = [prompt(f"h{n}") for n in range(4)]


class Fakes:
    """A policy that answers its version; a judge that prefers higher versions but is biased to the left by 1."""

    version, sampled = 0, 0

    async def generate(self, one, sampling, iteration):
        self.sampled += 1
        text = "same" if one.prompt_id == "h0" else f"{self.version}"
        tokens = np.arange(3 + self.version, dtype=np.int32)
        response = Response(tokens, text, "stop", -1.0, -np.ones(len(tokens), np.float32), sampling.seeds[0])
        group = ResponseGroup(one, iteration, (response,), self.version, self.version, "rollout-0")
        return Handle(group, Receipt(one.prompt_id, "rollout-0", 3, 0, self.version))

    async def fetch(self, handle):
        return handle.ref

    async def score(self, source, candidates):
        one, other = (0.0 if text == "same" else float(text) for text in candidates)
        return np.array([[0, 1 + one - other], [1 + other - one, 0]], dtype=np.float32)


class Oracle:
    @staticmethod
    def score(prompt, response):
        return 0.0 if response == "same" else float(response) * 2

    @staticmethod
    def is_junk(prompt, response):
        return response == "same"


def evaluator_of(folder, fakes):
    """With the lines it records."""
    recorded = []

    async def record(line):
        recorded.append(line)
        return True

    return HeldOutEvaluator(config(folder), PROMPTS, fakes, fakes, fakes.fetch, record, Oracle), recorded


@pytest.fixture
def lines(tmp_path):
    fakes = Fakes()
    evaluator, recorded = evaluator_of(tmp_path, fakes)
    for version in (0, 1, 2):
        fakes.version = version
        asyncio.run(evaluator.evaluate(version))
    asyncio.run(evaluator.evaluate(2))  # again: from disk
    assert fakes.sampled == 3 * 2 * len(PROMPTS)  # greedy and sampled, once per policy
    assert recorded[-1] == recorded[-2]
    return recorded[:3]


def test_win_rates_count_ties_half_and_cancel_the_bias(lines):
    # Three prompts won, one tied ("same" against "same"): (3 + 0.5) / 4.
    for line in lines[1:]:
        for key in ("judge_win_vs_base", "judge_win_vs_previous", "oracle_win_vs_base", "oracle_win_vs_previous"):
            assert line[f"{key}_greedy"] == line[f"{key}_sampled"] == 0.875
    assert "judge_win_vs_base_greedy" not in lines[0]


def test_lengths_and_oracle_figures(lines):
    assert [line["mean_tokens_greedy"] for line in lines] == [3, 4, 5]
    assert [line["oracle_mean_sampled"] for line in lines] == [0, 1.5, 3.0]  # 3 prompts x 2 x version / 4
    assert lines[0]["junk_rate_greedy"] == 0.25


def test_win_share():
    assert win_share([1.0, -1.0, 0.0, 2.0]) == 0.625


def test_the_table_has_two_rows_per_policy(lines):
    table = closing_table([{"step": 1, "loss": 1.0}, *lines])
    assert table.row_count == 6
    assert closing_table([{"step": 1}]) is None


def test_the_table_of_one_given_policy_names_it_and_has_no_previous_one(lines):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(closing_table(lines[:2], "runs/[bold]/iter_3/policy"))
    shown = console.export_text()
    assert "of runs/[bold]/iter_3/policy, 4 prompts" in shown
    assert ("policy" in shown, "iter 1" in shown, "previous" in shown) == (True, False, False)


@pytest.mark.parametrize("patience", [60, 0])
def test_a_full_disk_is_waited_for_beside_the_run(tmp_path, monkeypatch, patience):
    fakes, recorded, refusals, full = Fakes(), [], [], True

    async def record(line):
        recorded.append(line)
        return True

    def replace(source, target, real=os.replace):
        if full:
            refusals.append(target)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    async def evaluate():
        nonlocal full
        cfg = config(tmp_path, run__storage_patience_s=patience)
        asked = asyncio.create_task(HeldOutEvaluator(cfg, PROMPTS, fakes, fakes, fakes.fetch, record, None).evaluate(0))
        while not (refusals or asked.done()):
            await asyncio.sleep(0.01)
        full = False  # said while the other waits: the loop is free
        await asked

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    if patience:
        asyncio.run(evaluate())
        assert [line["prompts"] for line in recorded] == [4]
    else:
        with pytest.raises(StorageError, match=r"evaluation\.parquet.*No space left"):
            asyncio.run(evaluate())


def test_responses_of_an_earlier_policy_that_are_damaged_are_named_and_done_without(tmp_path):
    fakes = Fakes()
    evaluator, recorded = evaluator_of(tmp_path, fakes)
    asyncio.run(evaluator.evaluate(0))
    assert recover(config(tmp_path)) == []
    path = tmp_path / "iter_0/evaluation.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    (said,) = recover(config(tmp_path))
    assert str(path.parent) in said
    assert "evaluation.parquet in" in said
    assert recover(config(tmp_path)) == []
    fakes.version = 1
    asyncio.run(evaluator.evaluate(1))
    fakes.version = 2
    asyncio.run(evaluator.evaluate(2))
    assert "judge_win_vs_base_greedy" not in recorded[-1]
    assert recorded[-1]["judge_win_vs_previous_greedy"] == 0.875
    assert closing_table(recorded) is not None
