"""Signs of life from the learner's ranks to the actor that watches over them, which ends those that hang.

From outside, since a rank that hangs, or is stopped, says nothing itself, and those that wait for it in a collective
can only say that they do.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors import stacks
from actors.ranks import Ranks
from sppo_ray.rank_watch import Place, RankWatch

logger = logging.getLogger(__name__)
ANSWER_S = 5.0  # for a process that is not stopped to say that it is there
AT_MOST_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class Member:
    """A rank's process."""

    group: str  # one name for all ranks that were started together
    rank: int
    handle: Any  # of its actor
    process: stacks.Place


def interval_s(timeout_s: float) -> float:
    """Between signs of life, and between looks for missing ones."""
    return min(timeout_s / 10, 5.0)


def start_pulse(ranks: Ranks, watcher: Any, timeout_s: float) -> None:
    """Tell `watcher` (the handle of a LearnerActor), from a thread and for as long as this process lives, where the rank
    is: when it moves on, and at intervals. Collective."""
    context = ray.get_runtime_context()
    group = ranks.broadcast(context.get_actor_id() if ranks.first else None)
    member = Member(group, ranks.rank, context.current_actor, stacks.here())

    def beat() -> None:
        while True:
            ranks.way.moved.clear()
            watcher.beat.remote(member, ranks.way.place)
            time.sleep(AT_MOST_EVERY_S)
            ranks.way.moved.wait(interval_s(timeout_s))

    threading.Thread(target=beat, name="pulse", daemon=True).start()


class Watchman:
    """Hears the ranks, and ends those that hang: Ray Train then starts the group again."""

    def __init__(self, timeout_s: float, run_dir: str) -> None:
        self.said = ""  # of ranks that were ended, until others are there
        self._timeout_s, self._run_dir = timeout_s, run_dir
        self._watch = RankWatch(timeout_s)
        self._members: dict[int, Member] = {}
        self._over: set[str] = set()  # groups that are no more

    def heard(self, member: Member, place: Place) -> None:
        if member.group in self._over:
            return
        if any(known.group != member.group for known in self._members.values()):
            self._forget()
        self.said = ""
        self._members[member.rank] = member
        self._watch.heard(member.rank, place, time.monotonic())

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(interval_s(self._timeout_s))
            hanging = [self._members[rank] for rank in self._watch.hanging(time.monotonic())]
            if not hanging:
                continue
            if any(await asyncio.gather(*map(_is_dead, self._members.values()))):
                self._forget()  # Ray Train is about to start them all again
            else:
                await self._end(hanging)

    async def _end(self, hanging: list[Member]) -> None:
        text = self._watch.describe([member.rank for member in hanging])
        dumps = (stacks.dump(f"learner-{m.rank}", m.process.node_id, m.process.pid, self._run_dir) for m in hanging)
        paths = await asyncio.gather(*dumps)
        self.said = f"{text}. Where it hung: {', '.join(map(str, paths))}"
        logger.error("%s", self.said)
        for member in hanging:
            ray.kill(member.handle)
        self._forget()

    def _forget(self) -> None:
        self._over |= {member.group for member in self._members.values()}
        self._members = {}
        self._watch.forget()


async def _is_dead(member: Member) -> bool:
    """False too of a process that does not answer."""
    try:
        await asyncio.wait_for(_ready(member.handle), ANSWER_S)
    except RayActorError:
        return True
    except TimeoutError:
        return False
    return False


async def _ready(handle: Any) -> None:
    await handle.__ray_ready__.remote()
