"""In-process fakes of every role around the real `BufferService`; the learner trains a number, not a network."""

from __future__ import annotations

import asyncio
import random

import numpy as np
from groups import judged

from sppo_ray.buffer_service import BufferService
from sppo_ray.errors import GroupAborted
from sppo_ray.protocols import Handle, System
from sppo_ray.types import (
    Probe,
    Publication,
    PublishTask,
    Receipt,
    ReferenceTask,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainTask,
)


class Buffer(BufferService):
    """As the schedule sees it: groups come as handles."""

    async def add(self, handle):
        await super().add([handle.ref])


class Fakes:
    def __init__(self, config, slices, seed=0, fail_at=None, abort_at=None, wrong_by=0.0, slowness=0):
        self.slowness = slowness
        self.config, self.rng = config, random.Random(seed)
        self.fail_at, self.abort_at, self.wrong_by = fail_at, abort_at, wrong_by
        self.buffer = Buffer(config, [[prompt.prompt_id for prompt in part] for part in slices])
        self.slots, self.in_flight, self.most_in_flight = config.rollout.in_flight, 0, 0
        self.log, self.alarms, self.steps = [], [], []
        self.system = System(self, self, self.buffer, self, self)

    async def start(self):
        done = await self.buffer.last_trained()
        self.version = self.hub = done.version if done else 0
        self.weights = float(done.checksum) if done else 0.0
        self.learner = asyncio.create_task(self.learn())
        return done

    async def sleep_a_little(self):
        await asyncio.sleep(self.rng.random() / 500)

    # Rollout.

    async def generate(self, prompt, sampling, iteration, epoch=0, protected=False):
        version = self.version
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await self.sleep_a_little()
        self.in_flight -= 1
        if prompt.prompt_id == self.fail_at:
            raise RuntimeError("rollout-0 died")
        if prompt.prompt_id == self.abort_at and not protected:
            self.log.append(("aborted", prompt.prompt_id))
            raise GroupAborted(prompt.prompt_id)
        self.log.append(("generate", iteration, epoch, prompt.prompt_id, version, sampling.seeds))
        receipt = Receipt(prompt.prompt_id, "rollout-0", 10, 0, version, iteration, epoch)
        return Handle((prompt.prompt_id, iteration, version, epoch), receipt)

    async def load(self, version):
        await self.sleep_a_little()
        await asyncio.sleep(0.005 * self.slowness)
        assert version <= self.hub
        self.version = version
        return {"rollout-0": {"version": version, "checksum": repr(self.weights)}}

    async def sleep(self):
        pass

    async def score(self, prompt_ids, response_ids):
        return np.full(len(response_ids), self.wrong_by, np.float32), self.version

    # Judge.

    async def judge(self, group):
        await self.sleep_a_little()
        name, iteration, version, epoch = group.ref
        return Handle(judged(name, iteration, version=version, epoch=epoch), group.receipt)

    # Learner.

    async def train(self, iteration):
        return await self.buffer.train(iteration)

    async def learn(self):
        step = (await self.buffer.resume_point()).step
        while True:
            task = await self.buffer.next_task(step)
            await self.sleep_a_little()
            match task:
                case ReferenceTask(iteration=iteration, examples=examples):
                    logps = [(self.weights, self.weights / 2)] * len(examples)
                    await self.buffer.record_reference(iteration, logps)
                case TrainTask(examples=examples):
                    self.steps.append(task)
                    # Depends on every row, its place in the batch, its reference and all updates before.
                    rows = ((e.reference_logps or (0.0,))[0] + e.p_hat[0] * (n + 1) for n, e in enumerate(examples))
                    self.weights = 0.9 * self.weights + sum(rows)
                    step += 1
                case PublishTask(iteration=iteration, version=version):
                    self.hub = version
                    await self.buffer.published(self.publication(task, step, ends=False))
                case SaveTask(iteration=iteration, version=version):
                    self.hub = version
                    trained = TrainedIteration(iteration, version, step, repr(self.weights), "policy")
                    await self.buffer.saved(trained, self.publication(task, step, ends=True))
                case StopTask():
                    return

    def publication(self, task, step, ends):
        probe = None
        if task.probe:
            responses = tuple(ids for example in task.probe for ids in example.response_ids)
            prompts = tuple(example.prompt_ids for example in task.probe for _ in example.response_ids)
            probe = Probe(prompts, responses, tuple(np.zeros(len(ids), np.float32) for ids in responses))
        return Publication(task.version, step, task.iteration, ends, repr(self.weights), 0.0, probe)

    # Evaluator and watch.

    async def evaluate(self, iteration):
        version = self.version
        for _ in range(self.slowness):
            await asyncio.sleep(0.01)
            assert (self.version, self.hub) == (version, version)  # nothing newer, not even in the hub
        self.log.append(("evaluate", iteration, version))

    def alarm(self, text):
        self.alarms.append(text)

    def sampling(self, *args, **kwargs): ...

    def sampled(self, receipt): ...

    def judged(self, receipt): ...

    def sealed(self, summary):
        self.log.append(("sealed", summary.iteration))

    def trained(self, trained):
        self.log.append(("trained", trained.iteration))
