"""Signs of life from the learner's ranks to the actor that watches over them, which ends those that hang.

From outside, since a rank that hangs, or is stopped, says nothing itself, and those that wait for it in a collective
can only say that they do.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import ray

from actors import stacks
from actors.ranks import Way
from actors.revival import DEATHS
from sppo_ray.errors import WorkerDied
from sppo_ray.rank_watch import Place, RankWatch

logger = logging.getLogger(__name__)
ANSWER_S = 5.0  # for a process that is not stopped to say that it is there
AT_MOST_EVERY_S = 0.2
START_GRACE_S = 300.0  # for ranks to get their places, before their own time limit counts


@dataclass(frozen=True, slots=True)
class Member:
    """A rank's process."""

    group: str  # one name for all ranks that were started together: Ray Train gives each start a placement group
    rank: int
    handle: Any  # of its actor
    process: stacks.Place


def interval_s(timeout_s: float) -> float:
    """Between signs of life, and between looks for missing ones."""
    return min(timeout_s / 10, 5.0)


def start_pulse(rank: int, way: Way, watcher: Any, timeout_s: float) -> None:
    """Tell `watcher` (the handle of a LearnerActor), from a thread and for as long as this process lives, where the rank
    is: when it moves on, and at intervals. Not collective: to be called before anything that can hang."""
    context = ray.get_runtime_context()
    member = Member(context.get_placement_group_id(), rank, context.current_actor, stacks.here())

    def beat() -> None:
        while True:
            way.moved.clear()
            watcher.beat.remote(member, way.place)
            time.sleep(AT_MOST_EVERY_S)
            way.moved.wait(interval_s(timeout_s))

    threading.Thread(target=beat, name="pulse", daemon=True).start()


class Watchman:
    """Hears the ranks, and ends those that hang: Ray Train then starts the group again."""

    def __init__(self, timeout_s: float, run_dir: str) -> None:
        self.said = ""  # of ranks that were ended, until others are there
        self._timeout_s, self._run_dir = timeout_s, run_dir
        self._watch = RankWatch(timeout_s)
        self._members: dict[int, Member] = {}
        self._over: set[str] = set()  # groups that are no more
        self._ended_at: float | None = None  # when ranks were ended, until others are there

    def heard(self, member: Member, place: Place) -> None:
        if member.group in self._over:
            return
        if any(known.group != member.group for known in self._members.values()):
            self._forget()
        self.said, self._ended_at = "", None
        self._members[member.rank] = member
        self._watch.heard(member.rank, place, time.monotonic())

    async def over(self, work: Coroutine[Any, Any, None]) -> None:
        """Watch until `work` ends. Raises what it raises, or what ended the watch."""
        working, watching = asyncio.create_task(work), asyncio.create_task(self.watch())
        try:
            await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
            (working if working.done() else watching).result()
        finally:
            working.cancel()
            watching.cancel()

    async def watch(self) -> None:
        """Until cancelled. Raises WorkerDied if Ray Train, which may hang itself, does not start ranks again."""
        limit_s = self._timeout_s + START_GRACE_S
        while True:
            await asyncio.sleep(interval_s(self._timeout_s))
            if self._ended_at is not None and time.monotonic() > self._ended_at + limit_s:
                raise WorkerDied(f"learner: Ray Train did not start its ranks again within {limit_s:g} s. {self.said}")
            if ranks := self._watch.hanging(time.monotonic()):
                text, hanging = self._watch.describe(ranks), [self._members[rank] for rank in ranks]
                members = list(self._members.values())
                self._forget()  # first: the next group may begin in the meantime
                if not any(await asyncio.gather(*map(_is_dead, members))):
                    await self._end(hanging, text)
                # else Ray Train is about to start them all again

    async def _end(self, hanging: list[Member], text: str) -> None:
        dumps = (stacks.dump(f"learner-{m.rank}", m.process.node_id, m.process.pid, self._run_dir) for m in hanging)
        paths = await asyncio.gather(*dumps)
        self.said = f"{text}. Where it hung: {', '.join(map(str, paths))}"
        logger.error("%s", self.said)
        for member in hanging:
            ray.kill(member.handle)
        self._ended_at = time.monotonic()

    def _forget(self) -> None:
        self._over |= {member.group for member in self._members.values()}
        self._members = {}
        self._watch.forget()


async def _is_dead(member: Member) -> bool:
    """False too of a process that does not answer."""
    try:
        await asyncio.wait_for(_ready(member.handle), ANSWER_S)
    except DEATHS:
        return True
    except TimeoutError:
        return False
    return False


async def _ready(handle: Any) -> None:
    await handle.__ray_ready__.remote()
