"""Algorithm 1 against in-process fakes: what is called, in which order, how much at once, and what a restart skips."""

from __future__ import annotations

import asyncio
import random

import pytest
from groups import config, judged, prompt

from sppo_ray.buffer import TrainingBuffer
from sppo_ray.protocols import Handle, System
from sppo_ray.schedules.synchronous import run
from sppo_ray.types import Receipt, ReferenceTask, SaveTask, TrainedIteration, TrainTask

SLICES = [[prompt(f"{t}-{n}") for n in range(12)] for t in (1, 2, 3)]


class Fakes:
    """Every role in one object, with a log of what happened. The learner trains a number, not a network."""

    def __init__(self, cfg, seed=0, fail_at=None):
        self.config, self.log, self.rng, self.fail_at = cfg, [], random.Random(seed), fail_at
        self.store = TrainingBuffer(cfg)
        done = self.store.last_trained()
        self.version = done.version if done else 0
        self.weights = float(done.checksum) if done else 0.0
        self.in_flight = self.most_in_flight = 0
        self.asleep = False
        self.system = System(self, self, self, self, self)

    async def generate(self, one, sampling, iteration):
        assert not self.asleep
        assert self.store.next_task(self.store.resume_point().step) is None  # nothing for the learner meanwhile
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(self.rng.random() / 1000)
        if one.prompt_id == self.fail_at:
            raise RuntimeError("rollout-0 died")
        self.log.append(("generate", iteration, one.prompt_id, self.version, sampling.seeds))
        return Handle((one.prompt_id, iteration), Receipt(one.prompt_id, "rollout-0", 10, 0, self.version))

    async def judge(self, group):
        await asyncio.sleep(self.rng.random() / 1000)
        name, iteration = group.ref
        return Handle(judged(name, iteration, version=group.receipt.version), group.receipt)

    async def held(self, iteration):
        return self.store.held(iteration)

    async def add(self, group):
        self.store.add([group.ref])
        self.in_flight -= 1

    async def seal(self, iteration, prompt_ids):
        self.log.append(("seal", iteration))
        return self.store.seal(iteration, prompt_ids)

    async def sleep(self):
        self.log.append(("sleep",))
        self.asleep = True

    async def train(self, iteration):
        assert self.asleep  # on shared GPUs the two never hold the device together
        self.store.release(iteration)
        step = self.store.resume_point().step
        while True:
            match self.store.next_task(step):
                case ReferenceTask(examples=examples):
                    self.store.record_reference(iteration, [(self.weights, self.weights)] * len(examples))
                case TrainTask(examples=examples):
                    self.weights += sum(e.p_hat[0] * (n + 1) for n, e in enumerate(examples))
                    step += 1
                case SaveTask(version=version):
                    done = TrainedIteration(iteration, version, step, repr(self.weights), "policy")
                    self.store.saved(done)
                    self.log.append(("trained", iteration))
                    return done

    async def load(self, version):
        self.version, self.asleep = version, False
        self.log.append(("load", version))

    async def evaluate(self, iteration):
        assert self.version == iteration  # the served policy is the one that is evaluated
        self.log.append(("evaluate", iteration))


class Silent:
    def sampling(self, iteration, total, held): ...
    def sampled(self, receipt): ...
    def judged(self, receipt): ...
    def sealed(self, summary): ...
    def trained(self, trained): ...


def go(cfg, **options):
    fakes = Fakes(cfg, **options)
    done = fakes.store.last_trained()
    asyncio.run(run(fakes.system, SLICES, cfg, Silent(), done.iteration if done else 0))
    return fakes


def test_algorithm_one_in_order(tmp_path):
    log = go(config(tmp_path)).log
    phases = [entry[:2] for entry in log if entry[0] != "generate"]
    iteration = lambda t: [("seal", t), ("sleep",), ("trained", t), ("load", t), ("evaluate", t)]  # noqa: E731
    assert phases == [("evaluate", 0), *iteration(1), *iteration(2), *iteration(3)]
    sampled = [entry for entry in log if entry[0] == "generate"]
    assert sorted(entry[2] for entry in sampled) == sorted(p.prompt_id for s in SLICES for p in s)
    assert all(version == t - 1 for _, t, _, version, _ in sampled)  # slice t is sampled from pi_t alone
    assert len({seeds for *_, seeds in sampled}) == 36


def test_the_result_does_not_depend_on_interleaving(tmp_path):
    results = {go(config(tmp_path / str(seed)), seed=seed).weights for seed in range(5)}
    assert len(results) == 1
    tables = {(tmp_path / f"{seed}/iter_3/train.parquet").read_bytes() for seed in range(5)}
    assert len(tables) == 1


def test_back_pressure_bounds_the_groups_in_flight(tmp_path):
    assert go(config(tmp_path, rollout__in_flight=2, rollout__num_workers=2)).most_in_flight == 4


def test_a_failure_is_raised_and_the_next_run_makes_only_what_is_missing(tmp_path):
    whole = go(config(tmp_path / "whole"))
    cfg = config(tmp_path / "cut", rollout__in_flight=1)
    with pytest.raises(ExceptionGroup) as failure:
        go(cfg, fail_at="2-7")
    assert "rollout-0 died" in str(failure.value.exceptions[0])
    resumed = go(cfg)
    assert resumed.weights == whole.weights
    again = [entry[2] for entry in resumed.log if entry[0] == "generate"]
    assert again == [f"2-{n}" for n in range(7, 12)] + [f"3-{n}" for n in range(12)]
    assert ("seal", 1) not in resumed.log
