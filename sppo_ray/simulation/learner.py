"""The learner: pulls its tasks from the real buffer and takes as long as the rate card says for their real lengths."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from sppo_ray.batching import PADDING, split
from sppo_ray.buffer_service import BufferService
from sppo_ray.config import Config
from sppo_ray.simulation.rates import RateCard
from sppo_ray.types import (
    Publication,
    PublishTask,
    ReferenceTask,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainingExample,
    TrainTask,
)


class Learner:
    def __init__(self, config: Config, card: RateCard, buffer: BufferService, publish: Callable[[int], None]) -> None:
        """publish: what tells the hub of a new version."""
        self.config, self.card, self.buffer, self._publish = config, card, buffer, publish
        self.takes_turns = config.cluster.layout == "colocated"
        self.training_s = self.publishing_s = 0.0  # publishing: saving and taking turns as well
        self.first_step_at: float | None = None
        self.staleness: Counter[int] = Counter()  # groups trained by staleness
        self.trained: Counter[tuple[int, str]] = Counter()  # times by (iteration, prompt)
        self._loaded = not self.takes_turns

    async def train(self, iteration: int) -> TrainedIteration:
        return await self.buffer.train(iteration)

    async def learn(self) -> None:
        step = 0
        while True:
            task = await self.buffer.next_task(step)
            if not isinstance(task, StopTask):
                await self._take_turn(loaded=True)
            match task:
                case ReferenceTask(iteration=iteration, examples=examples):
                    await self._compute(self._seconds(examples, self.card.forward_s))
                    await self.buffer.record_reference(iteration, [(0.0, 0.0)] * len(examples))
                case TrainTask(iteration=iteration, examples=examples):
                    if self.first_step_at is None:
                        self.first_step_at = asyncio.get_running_loop().time()
                    self.staleness.update(example.staleness for example in examples)
                    self.trained.update((iteration, example.prompt_id) for example in examples)
                    await self._compute(self._seconds(examples, self.card.train_s) + self.card.optimizer_s)
                    step += 1
                case PublishTask():
                    await self._hand_out(self.card.publish_s)
                    self._publish(task.version)
                    await self.buffer.published(_publication(task, ends=False))
                case SaveTask():
                    await self._hand_out(self.card.publish_s + self.card.save_s)
                    await self._take_turn(loaded=False)
                    self._publish(task.version)
                    trained = TrainedIteration(task.iteration, task.version, step, "", "policy")
                    await self.buffer.saved(trained, _publication(task, ends=True))
                case StopTask():
                    return

    async def _compute(self, seconds: float) -> None:
        self.training_s += seconds
        await asyncio.sleep(seconds)

    async def _hand_out(self, seconds: float) -> None:
        self.publishing_s += seconds
        await asyncio.sleep(seconds)

    async def _take_turn(self, loaded: bool) -> None:
        if self.takes_turns and loaded != self._loaded:
            self._loaded = loaded
            await self._hand_out(self.card.turn_s(self.config.learner.num_workers))

    def _seconds(self, examples: Sequence[TrainingExample], seconds_of: Callable[[float], float]) -> float:
        """Of passes over the examples, dealt as the learner deals them; the slowest rank counts, padding included."""
        learner, responses = self.config.learner, len(examples[0].response_ids)
        size = learner.batch_size
        seconds = 0.0
        for start in range(0, len(examples), size):  # the reference pass is in batches, too
            lengths = np.array([self._length(example) for example in examples[start : start + size]] + [0])
            dealt = split(lengths[:-1].tolist(), learner.num_workers, learner.micro_batch_size)
            assert PADDING == -1  # picks the zero at the end
            longest = lengths[dealt].max(axis=(1, 2))
            seconds += sum(seconds_of(learner.micro_batch_size * responses * int(tokens)) for tokens in longest)
        return seconds

    def _length(self, example: TrainingExample) -> int:
        """Tokens of prompt and longest response after `batching.truncate`; tokens here stand for lengths."""
        learner, prompt = self.config.learner, int(example.prompt_ids[0])
        longest = max(int(ids[0]) for ids in example.response_ids)
        if prompt + longest > learner.max_length:
            prompt = min(prompt, learner.max_prompt_length)
        if prompt + longest > learner.max_length:
            longest = min(longest, learner.max_length - learner.max_prompt_length)
        return prompt + longest


def _publication(task: PublishTask | SaveTask, ends: bool) -> Publication:
    return Publication(task.version, task.step, task.iteration, ends, "", 0.0)
