"""The asynchronous schedule with the real buffer, admission and ledger against in-process fakes."""

from __future__ import annotations

import asyncio

import numpy as np
import pyarrow.parquet as pq
import pytest
from groups import config, judged, prompt
from self_play import Fakes

from sppo_ray.errors import SppoError
from sppo_ray.metrics import read_metrics
from sppo_ray.protocols import Handle
from sppo_ray.schedules import asynchronous, synchronous
from sppo_ray.schedules.supervision import InFlight, supervised

SLICES = [[prompt(f"{t}-{n}") for n in range(size)] for t, size in ((1, 22), (2, 16), (3, 9))]


def async_config(folder, **overrides):
    given = {
        "schedule__mode": "async",
        "schedule__iterations": 3,
        "weights__publish_every": 1,
        "buffer__flush_s": 0.002,
        "rollout__in_flight": 8,
        "evaluation__prompts": "none",  # a name; the fakes look at nothing
    }
    return config(folder, **(given | overrides))


async def run_async(fakes, slices=SLICES):
    done = await fakes.start()
    start, version = (done.iteration, done.version) if done else (0, 0)
    try:
        await asyncio.wait_for(
            asynchronous.run(fakes.system, slices, fakes.config, fakes, start, version), timeout=600
        )  # fmt: skip
    finally:
        fakes.learner.cancel()
    return fakes


def table(folder, t, name="train"):
    return pq.read_table(folder / f"iter_{t}/{name}.parquet")


@pytest.mark.parametrize("seed", [0, 1])
async def test_at_zero_staleness_and_one_publish_per_slice_it_is_the_synchronous_schedule(tmp_path, seed):
    zero = {"schedule__max_staleness": 0, "schedule__batch_order": "slice", "objective__reference": "snapshot"}
    ours = Fakes(
        async_config(tmp_path / "async", weights__publish_every="slice", learner__epochs=2, **zero), SLICES, seed
    )
    await run_async(ours)
    sync = Fakes(config(tmp_path / "sync", schedule__iterations=3, learner__epochs=2, buffer__flush_s=0.002), SLICES)
    await sync.start()
    await synchronous.run(sync.system, SLICES, sync.config, sync)
    assert ours.weights == sync.weights  # a float that depends on every row, order and reference
    for t in (1, 2, 3):
        for name in ("train", "generated"):
            one, other = table(tmp_path / "async", t, name), table(tmp_path / "sync", t, name)
            assert one.select(other.column_names).equals(other)
        rows = table(tmp_path / "async", t).to_pylist()
        assert {(row["policy_version"], row["consumed_version"]) for row in rows} == {(t - 1, t - 1)}
        first = {e.prompt_id: task.step + 1 for task in reversed(ours.steps) for e in task.examples}
        assert {row["prompt_id"]: row["step"] for row in rows}.items() <= first.items()
    assert [entry for entry in ours.log if entry[0] == "evaluate"] == [("evaluate", t, t) for t in range(4)]


@pytest.mark.parametrize(("staleness", "every"), [(0, 1), (1, 1), (1, 2), (4, 3), (2, "slice")])
async def test_the_bound_holds_and_every_prompt_is_trained_once_per_epoch(tmp_path, staleness, every):
    run = async_config(
        tmp_path, schedule__max_staleness=staleness, weights__publish_every=every, learner__epochs=2
    )  # fmt: skip
    fakes = await run_async(Fakes(run, SLICES, seed=staleness))
    assert fakes.most_in_flight <= run.rollout.in_flight
    for t, prompts in enumerate(SLICES, start=1):
        rows = table(tmp_path, t).to_pylist()
        keys = sorted((row["prompt_id"], row["epoch"]) for row in rows)
        assert keys == sorted((p.prompt_id, epoch) for p in prompts for epoch in (0, 1))
        assert all(0 <= row["consumed_version"] - row["policy_version"] <= staleness for row in rows)
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    sampled = {(t, epoch, name): seeds for kind, t, epoch, name, _, seeds in _of(fakes, "generate")}
    assert sampled[1, 0, "1-0"] != sampled[1, 1, "1-0"]  # each pass draws other noise
    served = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "publish"]
    versions = [line["version"] for line in served]
    assert versions == sorted(set(versions))
    assert versions[-1] == (await fakes.buffer.last_trained()).version
    assert [entry[1] for entry in _of(fakes, "evaluate")] == [0, 1, 2, 3]
    ends = {t: fakes.buffer._async.plan.last_version(t) for t in (1, 2, 3)}
    assert {t: version for _, t, version in _of(fakes, "evaluate")[1:]} == ends  # each while it was served


def _of(fakes, kind):
    return [entry for entry in fakes.log if entry[0] == kind]


@pytest.mark.parametrize("order", ["ready", "slice"])
async def test_every_policy_is_evaluated_while_it_is_served_however_slow_that_is(tmp_path, order):
    run = async_config(
        tmp_path, schedule__max_staleness=2, weights__publish_every="slice", schedule__batch_order=order
    )  # fmt: skip
    fakes = await run_async(Fakes(run, SLICES, slowness=4))
    assert _of(fakes, "evaluate") == [("evaluate", t, t) for t in range(4)]


async def test_a_run_that_goes_on_under_a_smaller_bound_comes_to_its_end(tmp_path):
    """Everything was sampled before the first update; what is too old by then is sampled again, and nobody waits for ever."""
    loose = Fakes(async_config(tmp_path, schedule__max_staleness=99), SLICES, fail_at="3-8")
    loose.learn = lambda: asyncio.sleep(60)  # a learner that never asks
    with pytest.raises(RuntimeError, match="died"):
        await run_async(loose)
    strict = await run_async(Fakes(async_config(tmp_path, schedule__max_staleness=0, weights__publish_every=4), SLICES))
    rows = [row for t in (1, 2, 3) for row in table(tmp_path, t).to_pylist()]
    assert {row["consumed_version"] - row["policy_version"] for row in rows} == {0}
    served = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "publish"]
    assert served[-1]["resampled_groups"] > 0
    assert strict.buffer._async.admission.exhausted


async def test_sampling_and_training_overlap(tmp_path):
    """The first slice is sealed late: sampling of the second does not wait for it, or this would wait for ever."""
    fakes = Fakes(async_config(tmp_path, schedule__max_staleness=4), SLICES)
    seal = fakes.buffer.seal

    async def late(iteration, prompt_ids):
        while iteration == 1 and not any(entry[1] == 2 for entry in _of(fakes, "generate")):
            await asyncio.sleep(0.001)
        return await seal(iteration, prompt_ids)

    fakes.buffer.seal = late
    await run_async(fakes)
    rows = [row for t in (1, 2, 3) for row in table(tmp_path, t).to_pylist()]
    assert any(row["consumed_version"] > row["policy_version"] for row in rows)
    first_sealed = fakes.log.index(("sealed", 1))
    assert any(entry[0] == "generate" and entry[1] == 2 for entry in fakes.log[:first_sealed])


async def test_what_fails_is_named_and_the_run_goes_on_from_the_disk(tmp_path):
    with pytest.raises(RuntimeError, match="rollout-0 died") as caught:
        await run_async(Fakes(async_config(tmp_path), SLICES, fail_at="2-9"))
    assert any("'sampling'" in note for note in caught.value.__notes__)
    before = {row["prompt_id"] for row in table(tmp_path, 1).to_pylist()}
    fakes = await run_async(Fakes(async_config(tmp_path), SLICES))
    assert before.isdisjoint(entry[3] for entry in _of(fakes, "generate"))  # iteration 1 was trained, nothing again
    for t, prompts in enumerate(SLICES, start=1):
        assert sorted(table(tmp_path, t)["prompt_id"].to_pylist()) == sorted(p.prompt_id for p in prompts)


async def test_an_aborted_group_is_sampled_again_until_publishes_wait_for_it(tmp_path):
    run = async_config(tmp_path, schedule__max_resamples=2)
    fakes = await run_async(Fakes(run, SLICES, abort_at="1-5"))
    assert _of(fakes, "aborted") == [("aborted", "1-5")] * 2
    assert sum(entry[3] == "1-5" for entry in _of(fakes, "generate")) == 1


async def test_a_mismatch_of_log_probabilities_is_reported_and_alarmed(tmp_path):
    fakes = await run_async(Fakes(async_config(tmp_path, objective__mismatch_alarm=0.2), SLICES, wrong_by=0.25))
    assert "0.25" in fakes.alarms[0]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "publish"]
    assert all(line["mismatch_alarm"] and line["mismatch"]["mean_abs_per_token"] == 0.25 for line in lines)


async def test_scores_of_other_weights_are_not_compared(tmp_path):
    """A worker that was started again during the comparison serves what the hub holds by then."""
    fakes = Fakes(async_config(tmp_path, objective__mismatch_alarm=0.2), SLICES, wrong_by=0.25)

    async def score(prompt_ids, response_ids):
        return np.full(len(response_ids), 0.25, np.float32), fakes.version + 1

    fakes.score = score
    await run_async(fakes)
    assert fakes.alarms == []
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "publish"]
    assert lines
    assert not any("mismatch" in line for line in lines)


async def test_sampling_from_new_weights_does_not_wait_for_their_comparison(tmp_path):
    fakes = Fakes(async_config(tmp_path, schedule__max_staleness=0), SLICES)
    last = fakes.buffer._async.plan.last_version(3)  # nothing is sampled from it

    async def score(prompt_ids, response_ids):
        while fakes.version < last and all(entry[4] < fakes.version for entry in _of(fakes, "generate")):
            await asyncio.sleep(0.001)
        return np.zeros(len(response_ids), np.float32), fakes.version

    fakes.score = score
    await run_async(fakes)
    served = [line["version"] for line in read_metrics(tmp_path / "metrics.jsonl") if line.get("event") == "publish"]
    assert served == list(range(1, last + 1))


async def test_a_learner_that_gives_up_ends_the_run_with_its_reason(tmp_path):
    fakes = Fakes(async_config(tmp_path), SLICES)
    await fakes.start()
    fakes.learner.cancel()
    await fakes.buffer.give_up("learner-0: the loss is not finite")
    with pytest.raises(SppoError, match="not finite"):
        await asyncio.wait_for(asynchronous.run(fakes.system, SLICES, fakes.config, fakes), timeout=600)


async def test_a_caller_that_is_gone_keeps_nobody_from_the_acknowledgement(tmp_path):
    service = Fakes(async_config(tmp_path), SLICES).buffer
    names = [SLICES[0][ticket.index].prompt_id for ticket in await service.admit(2)]
    gone, stays = (asyncio.create_task(service.add(Handle(judged(name), None))) for name in names)
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait_for(stays, timeout=600)
    assert await service.held(1) == set(names)


async def test_a_task_that_ends_early_is_named():
    async def dies():
        raise asyncio.CancelledError

    async def returns():
        return None

    for task in (dies, returns):
        with pytest.raises(SppoError, match="'publishing' ended before its work was done"):
            await supervised(publishing=task(), sampling=asyncio.sleep(60))


async def test_the_others_are_cancelled_when_one_fails():
    ended = []

    async def waits():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("waits")

    async def fails():
        await asyncio.sleep(0.01)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await supervised(one=waits(), other=fails())
    assert ended == ["waits"]


async def test_room_grows_with_the_workers():
    slots, started = 2, []

    async def task(n):
        started.append(n)
        await asyncio.sleep(0.05)

    async with InFlight() as groups:
        for n in range(2):
            groups.start(task(n))
        slots = 5
        assert await groups.room(lambda: slots) == 3
