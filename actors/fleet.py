"""Rollout and judge workers come and go while an async run goes on: the driver follows scale.json of the run directory."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.pool import JudgePool, Pool, RolloutPool
from sppo_ray.config import Config
from sppo_ray.errors import ConfigError, SppoError
from sppo_ray.scaling import Desired, ScaledRole, desired, refuse_impossible
from sppo_ray.threads import in_daemon_thread

logger = logging.getLogger(__name__)

POLL_S = 1.0
START_LIMIT_S = 900.0  # for a newcomer to be placed, to load its model and the current weights
SHUTDOWN_LIMIT_S = 30.0  # for an engine to end its processes by itself before the actor is killed


class Fleet:
    """Brings the pools to the desired numbers of workers, one request after the other."""

    def __init__(
        self,
        config: Config,
        rollout: RolloutPool,
        judge: JudgePool,
        create: Callable[[ScaledRole, str], ActorHandle],
        record: Callable[[Mapping[str, Any]], Awaitable[Any]],
        say: Callable[[str], None],
    ) -> None:
        """create(role, name): a new actor, as at the start of the run. record: a line into the metrics. say: to the user."""
        self._config = config
        self._pools: dict[ScaledRole, Pool] = {"rollout": rollout, "judge": judge}
        self._create, self._record, self._say = create, record, say

    async def follow(self) -> None:
        """Apply each request once; never returns. A request that cannot be met is reported, and the run goes on."""
        handled: Desired | str | None = None  # the request, or what is wrong with it
        while True:
            try:
                wanted = await in_daemon_thread(partial(desired, Path(self._config.run.dir), self._config))
                refuse_impossible(self._config, wanted)
            except ConfigError as error:
                if handled != str(error):
                    handled = str(error)
                    self._report(f"workers stay as they are: {error}")
            else:
                if handled != wanted:
                    handled = wanted
                    await self.scale(wanted)
            await asyncio.sleep(POLL_S)

    async def scale(self, wanted: Desired) -> None:
        """Returns when as many workers serve as are wanted, or those that cannot start are reported."""
        await asyncio.gather(self._bring("rollout", wanted.rollout), self._bring("judge", wanted.judge))

    async def _bring(self, role: ScaledRole, count: int) -> None:
        names = self._pools[role].names
        by_number = sorted(names, key=lambda name: int(name.rsplit("-", 1)[1]))
        free = (name for n in itertools.count() if (name := f"{role}-{n}") not in names)
        newcomers = list(itertools.islice(free, max(0, count - len(names))))
        await asyncio.gather(
            *(self._add(role, name) for name in newcomers), *(self._remove(role, name) for name in by_number[count:])
        )

    async def _add(self, role: ScaledRole, name: str) -> None:
        try:
            await self._start(role, name)
        except (SppoError, RayError, ValueError, TimeoutError) as error:  # ValueError: another actor has the name
            reason = str(error) or f"it did not serve within {START_LIMIT_S:g} s; is there room for it in the cluster?"
            self._report(f"{name} could not join, the others go on: {reason}")
        else:
            await self._changed(role, f"{name} joins")

    async def _start(self, role: ScaledRole, name: str) -> None:
        actor = self._create(role, name)
        try:
            async with asyncio.timeout(START_LIMIT_S):
                await self._pools[role].add(name, actor)
        except BaseException:
            ray.kill(actor)
            raise

    async def _remove(self, role: ScaledRole, name: str) -> None:
        try:
            actor = await self._pools[role].remove(name)
        except ValueError as error:  # the others died meanwhile
            self._report(f"{name} stays: {error}")
            return
        if role == "rollout":  # its engine may have processes of its own
            try:
                await asyncio.wait_for(actor.shutdown.remote(), SHUTDOWN_LIMIT_S)
            except (RayError, TimeoutError) as error:
                logger.warning("%s did not end its engine by itself: %s", name, error)
        ray.kill(actor)
        await self._changed(role, f"{name} leaves")

    async def _changed(self, role: ScaledRole, what: str) -> None:
        workers = len(self._pools[role].names)
        logger.info("%s: %d %s workers", what, workers, role)
        self._say(f"{what}: {workers} {role} worker{'s' * (workers > 1)}")
        at = datetime.now(UTC).isoformat(timespec="microseconds")
        await self._record({"event": "scale", "role": role, "workers": workers, "iteration": 0, "at": at})

    def _report(self, text: str) -> None:
        logger.error(text)
        self._say(text)
