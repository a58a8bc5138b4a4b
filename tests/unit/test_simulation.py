"""Virtual time to the second, engines against times worked out by hand, whole runs: repeatable, nothing lost, within the bound."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from groups import config

from sppo_ray.errors import SppoError
from sppo_ray.simulation.clock import run_virtual
from sppo_ray.simulation.gpu import Engine, Gpu, Queue
from sppo_ray.simulation.layouts import role_rates, split_rates, splits, with_split
from sppo_ray.simulation.rates import RateCard
from sppo_ray.simulation.run import simulate
from sppo_ray.simulation.workload import make_workload


class Card(RateCard):
    """A step takes 1 s and 0.5 s more for every running sequence; a prompt token 1 s."""

    def decode_s(self, sequences: int) -> float:
        return 1 + 0.5 * sequences

    def prefill_s(self, tokens: float) -> float:
        return tokens


def now() -> float:
    return asyncio.get_running_loop().time()


async def done_at(job) -> float:
    await job
    return now()


def test_the_clock_shows_the_timers_time_and_nothing_else_takes_time() -> None:
    async def job() -> list[tuple[str, float]]:
        seen = []

        async def sleeper(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((name, now()))
            sum(range(100_000))  # real work
            await asyncio.sleep(0.25)
            seen.append((name, now()))

        await asyncio.gather(sleeper("b", 3600.5), sleeper("a", 0.5))
        return seen

    assert run_virtual(job()) == [("a", 0.5), ("a", 0.75), ("b", 3600.5), ("b", 3600.75)]


def test_a_wait_that_never_ends_is_an_error() -> None:
    async def job() -> None:
        await asyncio.Event().wait()

    with pytest.raises(SppoError, match="never happen"):
        run_virtual(job())


def test_engine_shares_its_time_between_the_sequences_that_run() -> None:
    async def job() -> tuple[list[float], float, float]:
        engine = Engine(Gpu(), Card(), max_running=2)

        async def later() -> float:
            await asyncio.sleep(3)
            return await done_at(engine.sample(0, [2]))

        ends = await asyncio.gather(done_at(engine.sample(0, [1, 4])), later())
        return ends, engine.busy

    # Two run: 2 s a token. At 2 s the first response is done; then one runs, 1.5 s a token. At 3 s the other group comes,
    # when the long response has 1 + 1/1.5 tokens; two run again. 2 tokens more take both until 7 s, when the long one has
    # 3 2/3; its last third of a token takes 0.5 s.
    ends, busy = run_virtual(job())
    assert ends == pytest.approx([7.5, 7.0])
    assert busy == pytest.approx(7.5)


def test_engine_queues_beyond_its_places_and_prefills_before_it_decodes() -> None:
    async def job() -> list[float]:
        engine = Engine(Gpu(), Card(), max_running=1)
        return await asyncio.gather(done_at(engine.sample(3, [2])), done_at(engine.sample(1, [1])))

    # 4 s of prefill hold all up; then 2 tokens and 1 token, 1.5 s each, one after the other.
    assert run_virtual(job()) == pytest.approx([7.0, 8.5])


def test_an_engine_held_still_prefills_again_what_it_had_decoded() -> None:
    async def job() -> float:
        engine = Engine(Gpu(), Card(), max_running=4)
        ended = asyncio.create_task(done_at(engine.sample(0, [4])))
        await asyncio.sleep(3)  # two tokens
        engine.hold(True)
        await asyncio.sleep(10)
        engine.hold(False)
        return await ended

    assert run_virtual(job()) == pytest.approx(3 + 10 + 2 + 3)


def test_processes_on_one_gpu_take_as_long_together_as_one_after_the_other() -> None:
    async def job() -> list[float]:
        gpu = Gpu()
        one, other = Queue(gpu), Queue(gpu)
        return await asyncio.gather(done_at(one.run(2)), done_at(other.run(3)), done_at(one.run(1)))

    # Half speed each: the first 2 s end at 4; by then the other has done 2 of 3; both end their last second at 6.
    assert run_virtual(job()) == pytest.approx([4, 6, 6])


def small(tmp_path, mode="async", **more):
    roles = {"rollout__num_workers": 2, "learner__num_workers": 2, "judge__num_workers": 1, "cluster__gpus": 5}
    given = roles | {"schedule__mode": mode, "learner__batch_size": 8, "rollout__in_flight": 8} | more
    if mode == "async":
        given = {"weights__publish_every": 2} | given
    return config(tmp_path, cluster__layout="disaggregated", **given)


@pytest.mark.parametrize("pause", ["finish", "keep", "abort"])
@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_every_group_is_trained_once_and_within_the_bound(tmp_path, staleness: int, pause: str) -> None:
    made = small(tmp_path, schedule__max_staleness=staleness, weights__pause=pause)
    outcome = simulate(made, [61, 50])
    assert outcome.groups == 111
    assert outcome.trained_once
    assert sum(outcome.staleness.values()) == 111
    assert max(outcome.staleness) <= staleness
    for shares in (outcome.rollout, outcome.judge, outcome.learner):
        assert all(-1e-9 <= share <= 1 for share in shares.values())
        assert sum(shares.values()) == pytest.approx(1)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path) -> None:
    made = small(tmp_path)
    assert simulate(made, [60]) == simulate(made, [60])
    assert simulate(made, [60], seed=1).seconds != simulate(made, [60]).seconds


def test_sync_takes_the_sum_of_its_phases(tmp_path) -> None:
    made = small(tmp_path, mode="sync", objective__reference="behavior")  # no pass before the first update
    outcome = simulate(made, [64])
    assert outcome.staleness == {0: 64}
    busy = outcome.learner["training"] + outcome.learner["publishing"]
    # The learner waits while the slice is sampled and judged, and while the workers load; nothing else happens.
    waits = outcome.fill_s + RateCard().load_s
    assert outcome.seconds == pytest.approx(waits + busy * outcome.seconds, rel=1e-6)


def test_async_is_never_faster_than_its_slowest_role(tmp_path) -> None:
    made = small(tmp_path, schedule__max_staleness=4, rollout__max_num_seqs=512)
    for card in (RateCard(), replace(RateCard(), judge_pairs_per_s=10.0)):
        assert simulate(made, [400], card).groups_per_s < 1.05 * role_rates(made, card).bound  # lengths are drawn anew


def test_lengths_are_drawn_from_the_table_and_alike_within_a_group() -> None:
    work = make_workload([20_000], k=2, longest=2048)
    lengths = work.responses[0][0]
    # The table's own mean, cut at 2048: trapezes between its percentiles. Its median is its middle entry.
    assert lengths.mean() == pytest.approx(521, rel=0.03)
    assert sorted(lengths.ravel())[20_000] == pytest.approx(509, rel=0.02)
    assert lengths.max() == 2048
    apart = abs(lengths[:, 0] - lengths[:, 1]).mean()
    assert apart < 0.75 * abs(lengths[:-1, 0] - lengths[1:, 1]).mean()


def test_splits_give_every_role_a_gpu() -> None:
    assert splits(4) == [(1, 2, 1), (1, 1, 2), (2, 1, 1)]
    assert all(sum(split) == 8 and min(split) >= 1 for split in splits(8))
    assert splits(2) == []
    assert splits(2, shared=True) == [(1, 1, 1)]
    assert splits(4, shared=True)[3:] == [(1, 3, 1), (2, 2, 2), (3, 1, 3)]


def test_a_judge_beside_a_rollout_worker_takes_its_time(tmp_path) -> None:
    """One GPU that samples and judges is as slow as both together; a GPU more, and only the slower of the two counts."""
    made = small(tmp_path, schedule__max_staleness=4, rollout__max_num_seqs=512)
    card = replace(RateCard(), judge_pairs_per_s=20.0)
    apart, beside = (simulate(with_split(made, (1, 1, 1), gpus), [400], card) for gpus in (3, 2))
    bounds = [split_rates(made, card, (1, 1, 1), gpus) for gpus in (3, 2)]
    assert 1 / bounds[1].rollout == pytest.approx(1 / bounds[0].rollout + 1 / bounds[0].judge)
    assert beside.seconds > 1.2 * apart.seconds
    assert beside.groups_per_s < 1.05 * bounds[1].bound
