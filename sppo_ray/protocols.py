"""What a schedule may call. The Ray actors implement these (`actors/`); unit tests pass in-process fakes.

A `Handle` stands for data that is elsewhere (an object reference): schedules pass it on and never look inside, so groups
move from rollout to judge to buffer without passing through the driver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sppo_ray.types import Prompt, Publication, Receipt, Sampling, SliceSummary, Ticket, TrainedIteration


@dataclass(frozen=True, slots=True)
class Handle:
    """A group somewhere in the cluster, and what is known of it."""

    ref: Any
    receipt: Receipt


class Rollout(Protocol):
    """The rollout workers as one."""

    async def generate(
        self, prompt: Prompt, sampling: Sampling, iteration: int, epoch: int = 0, protected: bool = False
    ) -> Handle:
        """Sample a group. Any worker gives the same tokens for the same weights and seeds.

        Raises GroupAborted when a publish under `weights.pause=abort` ended it; never if `protected`.
        """
        ...

    async def load(self, version: int) -> Mapping[str, Any]:
        """Serve the published weights `version`; raises WeightSyncError naming the worker that does not. Returns figures
        of the update by worker.

        Workers that take turns with the learner all load at once; others a few at a time (`weights.at_once`), while the
        rest goes on sampling.
        """
        ...

    async def score(self, prompt_ids: np.ndarray, response_ids: np.ndarray) -> tuple[np.ndarray, int]:
        """float32 [T]: log pi(y_t | x, y_<t), nats, full softmax at temperature 1, under the weights served; their version."""
        ...

    @property
    def slots(self) -> int:
        """Groups that may be in flight now: `rollout.in_flight` for each worker that is up."""
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
        """Write generated.parquet and train.parquet, in the order of prompt_ids (ready order: of training)."""
        ...

    # Async only.

    async def admit(self, room: int) -> Sequence[Ticket]:
        """Waits until a group may be sampled without breaking the staleness bound: one to `room` tickets, oldest first.
        None are left: an empty sequence, once every group of the run is in a batch."""
        ...

    async def resample(self, ticket: Ticket) -> None:
        """The ticket's group was aborted: it is handed out again, before newer ones."""
        ...

    async def collected(self, iteration: int) -> None:
        """Waits until the iteration can be sealed: every group is on disk (ready order: and in a batch)."""
        ...

    async def publication(self, after: int) -> Publication:
        """Waits for published weights newer than version `after`; the newest ones."""
        ...

    async def evaluated(self, iteration: int) -> None:
        """The iteration's policy was evaluated while it was served; until then nothing newer is published."""
        ...

    async def serving(self, version: int) -> None:
        """Every rollout worker serves these weights: new groups may be sampled from them."""
        ...

    async def record_publish(self, publication: Publication, figures: Mapping[str, Any]) -> None:
        """Of weights that are served; `figures` of the update go into the metrics with it."""
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

    def alarm(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class System:
    """The running parts a schedule works with."""

    rollout: Rollout
    judge: Judge
    buffer: Buffer
    learner: Learner
    evaluator: Evaluator
