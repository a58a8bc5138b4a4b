"""The learner as the driver sees it: `protocols.Learner` over the learner actor and the buffer, whose answers come with what
the learner has done."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.learner import NAME
from actors.rank_pulse import START_GRACE_S
from actors.revival import RESTART_LIMIT_S
from actors.stacks import Place
from actors.workers import call, failure
from sppo_ray.errors import SppoError, WorkerDied, WorkerFailed
from sppo_ray.layout import Assignment
from sppo_ray.types import TrainedIteration

logger = logging.getLogger(__name__)


class LearnerProcess:
    """Fails as soon as the learner does, whatever is waited for."""

    def __init__(self, actor: Any, buffer: Any, timeout_s: float) -> None:
        """actor, buffer: handles of the LearnerActor and the buffer. timeout_s: learner.timeout_s, after which ranks that
        hang while they start are named by the learner itself; a shorter wait would hide that."""
        self._actor, self._buffer = actor, buffer
        self._start_limit_s = max(RESTART_LIMIT_S, timeout_s + START_GRACE_S)
        self._fit = actor.fit.remote()

    async def placed(self) -> list[Assignment]:
        """Waits until every rank has loaded the policy (and offloaded it, where it takes turns). Raises WorkerFailed;
        WorkerDied if that takes too long."""
        try:
            async with asyncio.timeout(self._start_limit_s):
                return await self._answer(self._buffer.learner_placed.remote(), "every rank was ready")
        except TimeoutError:
            raise WorkerDied(
                f"{NAME}: not every rank was ready after {self._start_limit_s:g} s; is there room for them in the cluster? "
                f"Their logs are logs/{NAME}-*.log in the run directory."
            ) from None

    async def train(self, iteration: int) -> TrainedIteration:
        """Raises LearnerError or WorkerFailed if the learner ends before the iteration's policy is published."""
        return await self._answer(self._buffer.train.remote(iteration), f"iteration {iteration} was trained")

    def check(self) -> None:
        """Raises WorkerFailed if the learner has failed."""
        if ray.wait([self._fit], timeout=0)[0]:
            _result(self._fit)

    async def ping(self) -> Place:
        """Where the process of its actor is, which watches over the ranks. Raises WorkerDied if it is no more."""
        place: Place = await call(self._actor, NAME, "ping")
        return place

    async def join(self, timeout_s: float) -> None:
        """Wait until the learner is at its StopTask, but no longer than this: it has nothing left to do. Raises WorkerFailed
        if it failed."""
        ended, _ = await asyncio.to_thread(ray.wait, [self._fit], timeout=timeout_s)
        if ended:
            _result(self._fit)
        else:
            logger.warning("%s: still running %g s after its last iteration; it ends with the run", NAME, timeout_s)

    async def _answer(self, reference: Any, event: str) -> Any:
        """The buffer's answer, which comes with `event`, unless the learner ends first."""
        answer, fit = asyncio.ensure_future(_awaited(reference)), asyncio.ensure_future(_awaited(self._fit))
        try:
            await asyncio.wait([answer, fit], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                _result(self._fit)
                # It ended of itself: after its last iteration, or giving up, and the buffer has been told.
                await asyncio.wait([answer], timeout=30)
            if answer.done():
                return _result(reference)
            raise WorkerFailed(f"{NAME}: stopped before {event}")
        finally:
            answer.cancel()
            fit.cancel()


async def _awaited(reference: Any) -> Any:
    return await reference


def _result(reference: Any) -> Any:
    """What a finished call gave; our own errors as they were raised in the actor, Ray's as WorkerFailed."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, SppoError) else failure(NAME, error)) from None
    except RayError as error:
        raise failure(NAME, error) from error
