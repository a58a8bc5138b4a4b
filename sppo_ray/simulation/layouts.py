"""Which split of the GPUs over rollout workers, learner ranks and judges carries the most groups a second."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sppo_ray.batching import split
from sppo_ray.config import Config
from sppo_ray.config import Learner as LearnerConfig
from sppo_ray.simulation.rates import RateCard
from sppo_ray.simulation.run import simulate
from sppo_ray.simulation.workload import RESPONSE_TOKENS, make_workload

CANDIDATES = 3  # splits that are simulated, those with the best bounds
UPDATES = 32  # of such a simulation
SAMPLE = 8  # batches from which a learner's rate is taken

Split = tuple[int, int, int]  # rollout workers, learner ranks, judges


@dataclass(frozen=True, slots=True)
class Rates:
    """Groups a second that each role could carry if it never waited."""

    rollout: float
    judge: float
    learner: float

    @property
    def bound(self) -> float:
        """Of the async schedule, where all work at once."""
        return min(self.rollout, self.judge, self.learner)

    @property
    def slowest(self) -> str:
        return min(("rollout", self.rollout), ("judge", self.judge), ("learner", self.learner), key=lambda r: r[1])[0]

    @property
    def in_turns(self) -> float:
        """Of the sync schedule, where the learner waits for the slice and the others for the learner."""
        return 1 / (1 / min(self.rollout, self.judge) + 1 / self.learner)


@dataclass(frozen=True, slots=True)
class Recommended:
    split: Split
    rates: Rates
    groups_per_s: (
        float  # async: once the learner has begun, since the run it stands for is longer than the simulated one
    )
    learner_idle: float  # share of its time, likewise


def role_rates(config: Config, card: RateCard, quantiles: Sequence[float] = RESPONSE_TOKENS) -> Rates:
    """From mean lengths and full batches. Publishing is in the learner's rate; the drain before an update in no one's."""
    rollout, learner = config.rollout, config.learner
    k, size = rollout.responses_per_prompt, learner.batch_size
    work = make_workload([SAMPLE * size], k, rollout.max_new_tokens, quantiles)
    prompts, responses = np.array([int(p.token_ids[0]) for p in work.prompts[0]]), work.responses[0][0]
    running = min(rollout.max_num_seqs, rollout.in_flight * k)
    sampled = float(responses.sum(axis=1).mean())
    group_s = sampled * card.decode_s(running) / running + card.prefill_s(float(prompts.mean()))
    lengths = np.minimum(prompts + responses[:, :2].max(axis=1), learner.max_length)
    updates = [card.optimizer_s + _passes_s(batch, learner, card) for batch in lengths.reshape(SAMPLE, size)]
    every = config.publish_every
    publish_s = 0.0 if every == "slice" else card.publish_s / every
    return Rates(
        rollout=rollout.num_workers / group_s,
        judge=config.judge.num_workers / card.judge_s(k * (k - 1)),
        learner=size / (float(np.mean(updates)) + publish_s),
    )


def _passes_s(lengths: NDArray[np.int32], learner: LearnerConfig, card: RateCard) -> float:
    """Of a batch of pairs, on the slowest rank, padding included."""
    dealt = split(lengths.tolist(), learner.num_workers, learner.micro_batch_size)
    longest = np.append(lengths, 0)[dealt].max(axis=(1, 2))  # PADDING, -1, picks the zero
    return sum(card.train_s(learner.micro_batch_size * 2 * int(tokens)) for tokens in longest)


def splits(gpus: int, shared: bool = False) -> list[Split]:
    """Every way to give each role at least one of `gpus`. shared: and those with a judge beside every rollout worker."""
    apart = [(r, gpus - r - j, j) for r in range(1, gpus - 1) for j in range(1, gpus - r)]
    return apart + ([(r, gpus - r, r) for r in range(1, gpus)] if shared else [])


def with_split(config: Config, workers: Split, gpus: int | None = None) -> Config:
    """The config with these numbers of workers on so many GPUs: judges sit beside rollout workers if they are fewer than the
    workers. None: each has its own."""
    rollout, learner, judge = workers
    return config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"num_workers": rollout}),
            "learner": config.learner.model_copy(update={"num_workers": learner}),
            "judge": config.judge.model_copy(update={"num_workers": judge}),
            "cluster": config.cluster.model_copy(update={"gpus": gpus or sum(workers), "layout": "disaggregated"}),
        }
    )


def split_rates(
    config: Config, card: RateCard, workers: Split, gpus: int, quantiles: Sequence[float] = RESPONSE_TOKENS
) -> Rates:
    """Where judges sit beside rollout workers, their GPUs carry a group's sampling and its judging one after the other."""
    return _scaled(role_rates(with_split(config, (1, workers[1], 1)), card, quantiles), workers, gpus)


def _scaled(one: Rates, workers: Split, gpus: int) -> Rates:
    """From the rates of one rollout worker and one judge beside as many ranks."""
    rollout, _, judge = workers
    if sum(workers) <= gpus:
        return Rates(rollout * one.rollout, judge * one.judge, one.learner)
    both = rollout / (1 / one.rollout + 1 / one.judge)
    return Rates(both, min(both, judge * one.judge), one.learner)


def shortlist(
    config: Config,
    card: RateCard,
    gpus: int,
    quantiles: Sequence[float] = RESPONSE_TOKENS,
    shared: bool = False,
    usable: Callable[[Split], bool] = lambda split: True,
) -> list[tuple[Split, Rates]]:
    """The usable splits with the best bounds for the config's schedule, the best first. shared: as in `splits`."""
    candidates = [workers for workers in splits(gpus, shared) if workers[1] <= config.learner.batch_size]
    by_ranks = {n: role_rates(with_split(config, (1, n, 1)), card, quantiles) for n in {w[1] for w in candidates}}
    found = [(workers, _scaled(by_ranks[workers[1]], workers, gpus)) for workers in candidates]
    in_turns = config.schedule.mode == "sync"
    found.sort(key=lambda entry: entry[1].in_turns if in_turns else entry[1].bound, reverse=True)
    return list(itertools.islice((entry for entry in found if usable(entry[0])), CANDIDATES))


def recommend(
    config: Config,
    card: RateCard,
    gpus: int,
    quantiles: Sequence[float] = RESPONSE_TOKENS,
    include: Split | None = None,
    usable: Callable[[Split], bool] = lambda split: True,
) -> list[Recommended]:
    """The shortlisted splits of so many GPUs (and `include`, usable or not), simulated over some updates, the fastest first.
    Judges that share GPUs are considered if those of `include` do."""
    prompts = [UPDATES * config.learner.batch_size]
    shared = include is not None and sum(include) > gpus
    candidates = dict(shortlist(config, card, gpus, quantiles, shared, usable))
    if include is not None and include not in candidates:
        candidates[include] = split_rates(config, card, include, gpus, quantiles)
    found = []
    for workers, rates in candidates.items():
        outcome = simulate(with_split(config, workers, gpus), prompts, card, quantiles)
        fill_s = outcome.fill_s if config.schedule.mode == "async" else 0.0
        idle = (outcome.learner["idle"] * outcome.seconds - fill_s) / (outcome.seconds - fill_s)
        found.append(Recommended(workers, rates, outcome.groups / (outcome.seconds - fill_s), idle))
    return sorted(found, key=lambda r: r.groups_per_s, reverse=True)
