"""What a schedule may call. The Ray actors implement these (`actors/`); unit tests pass in-process fakes.

A `Handle` stands for data that is elsewhere (an object reference): schedules pass it on and never look inside, so groups
move from rollout to judge to buffer without passing through the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sppo_ray.types import Prompt, Receipt, Sampling, SliceSummary, TrainedIteration


@dataclass(frozen=True, slots=True)
class Handle:
    """A group somewhere in the cluster, and what is known of it."""

    ref: Any
    receipt: Receipt


class Rollout(Protocol):
    """The rollout workers as one."""

    async def generate(self, prompt: Prompt, sampling: Sampling, iteration: int) -> Handle:
        """Sample a group. Any worker gives the same tokens for the same weights and seeds."""
        ...

    async def load(self, version: int) -> None:
        """Serve the published weights `version`; raises WeightSyncError naming the worker that does not."""
        ...

    async def sleep(self) -> None:
        """Free the device while the learner trains (colocated layout; otherwise nothing). `load` wakes."""
        ...


class Judge(Protocol):
    """The judge workers as one."""

    async def judge(self, group: Handle) -> Handle:
        """Add the K x K logits to a group."""
        ...


class Buffer(Protocol):
    """Judged groups between the judges and the learner, and their durable record."""

    async def held(self, iteration: int) -> frozenset[str]:
        """Prompt ids of the iteration that are already on disk."""
        ...

    async def add(self, judged: Handle) -> None:
        """Returns when the group is on disk. Adding a group twice keeps one."""
        ...

    async def seal(self, iteration: int, prompt_ids: Sequence[str]) -> SliceSummary:
        """Write generated.parquet and train.parquet, in the order of prompt_ids."""
        ...


class Learner(Protocol):
    """The learner, which pulls the batches of the iteration it is told to train from the buffer by itself."""

    async def train(self, iteration: int) -> TrainedIteration:
        """Train on the sealed iteration; returns when its policy is saved and its weights are published to the hub.

        The learner touches its device from here until this returns, and at no other time.
        """
        ...


class Evaluator(Protocol):
    """Held-out evaluation of the policy that is being served."""

    async def evaluate(self, iteration: int) -> None:
        """Sample the held-out prompts from the served policy, judge them against earlier ones, record the figures."""
        ...


class Watch(Protocol):
    """Someone who looks on: the progress display. Never part of the logic."""

    def sampling(self, iteration: int, total: int, held: int) -> None: ...

    def sampled(self, receipt: Receipt) -> None: ...

    def judged(self, receipt: Receipt) -> None: ...

    def sealed(self, summary: SliceSummary) -> None: ...

    def trained(self, trained: TrainedIteration) -> None: ...


@dataclass(frozen=True, slots=True)
class System:
    """The running parts a schedule works with."""

    rollout: Rollout
    judge: Judge
    buffer: Buffer
    learner: Learner
    evaluator: Evaluator
