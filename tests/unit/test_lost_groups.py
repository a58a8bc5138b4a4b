"""Groups that die with their node, in both schedules: sampled again from the same seeds, and the result is the same."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from groups import config, prompt
from self_play import Fakes

from sppo_ray.errors import GroupLost
from sppo_ray.schedules import asynchronous, synchronous

SLICES = [[prompt(f"{t}-{n}") for n in range(8)] for t in (1, 2)]
SLICE_BY_SLICE = {"schedule__max_staleness": 0, "schedule__batch_order": "slice", "objective__reference": "snapshot"}


class Losing(Fakes):
    """Every third group is lost `times` times: on its way to a judge, or from there to the buffer (then as a judge's)."""

    def __init__(self, *args, times, **options):
        super().__init__(*args, **options)
        self.times, self.lost, self.sampled_with = times, Counter(), {}

    async def generate(self, one, sampling, iteration, *rest):
        self.sampled_with.setdefault((one.prompt_id, iteration), []).append(sampling.seeds)
        return await super().generate(one, sampling, iteration, *rest)

    async def judge(self, group):
        name = group.receipt.prompt_id
        if name.endswith(("0", "3", "6")) and self.lost[name] < self.times:
            self.lost[name] += 1
            raise GroupLost(f"the group of prompt {name!r} was lost")
        return await super().judge(group)


async def run(folder, mode, times):
    more = SLICE_BY_SLICE if mode == "async" else {}
    run = config(
        folder, schedule__mode=mode, schedule__iterations=2, buffer__flush_s=0.002, weights__publish_every="slice", **more
    )  # fmt: skip
    fakes = Losing(run, SLICES, times=times)
    await fakes.start()
    schedule = asynchronous if mode == "async" else synchronous
    try:
        await asyncio.wait_for(schedule.run(fakes.system, SLICES, run, fakes), 600)
    finally:
        fakes.learner.cancel()
    return fakes


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_lost_group_is_sampled_again_and_changes_nothing(tmp_path, mode):
    whole, losing = await run(tmp_path / "whole", mode, times=0), await run(tmp_path / "losing", mode, times=2)
    assert losing.weights == whole.weights
    for t in (1, 2):
        tables = [(tmp_path / kind / f"iter_{t}/train.parquet").read_bytes() for kind in ("whole", "losing")]
        assert tables[0] == tables[1]
    assert sum(losing.lost.values()) == 2 * 6  # prompts 0, 3 and 6 of two slices
    for (name, _), seeds in losing.sampled_with.items():
        assert len(seeds) == (3 if name.endswith(("0", "3", "6")) else 1)
        assert len(set(seeds)) == 1


@pytest.mark.parametrize("mode", ["sync", "async"])
async def test_a_group_that_is_lost_every_time_ends_the_run(tmp_path, mode):
    with pytest.raises((GroupLost, ExceptionGroup)) as failed:
        await run(tmp_path, mode, times=99)
    error = failed.value
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, GroupLost)
