"""Actor handles in this process: calls that end with the actor's death, names that are free a moment after it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorAlreadyExistsError, ObjectLostError, RayActorError, RayError, RayTaskError

from actors.revival import Worker
from actors.stacks import Place
from actors.workers import Workers
from sppo_ray.types import Receipt


class Actor:
    """`work(actor, *args)` is its sampling or judging: a coroutine function; `start(actor)` what it does before it serves.
    Either may call `actor.die(...)`, after which nothing answers."""

    def __init__(self, stage: Stage, name: str, work: Callable[..., Any], start: Callable[..., Any]) -> None:
        self.stage, self.name, self.work, self.start = stage, name, work, start
        self.ended = asyncio.get_running_loop().create_future()
        self.calls: list[tuple[Any, ...]] = []
        self.number = len(stage.actors)  # of the stage's actors, in the order of creation

    def die(self, why: str) -> None:
        self.end(RayActorError("id", why))

    def end(self, error: RayError) -> None:
        """What its callers get from now on."""
        if not self.ended.done():
            self.ended.set_result(error)

    def __getattr__(self, method: str) -> Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return Method(self, method)

    async def answer(self, method: str, args: tuple[Any, ...]) -> Any:
        self.calls.append((method, *args))
        match method:
            case "ping":
                await self.start(self)
                return Place(f"node of {self.name}", 1)
            case "score" | "generate" | "load" | "sleep":
                return await self.work(self, method, *args)
            case _:
                return self.name


class Method:
    def __init__(self, actor: Actor, method: str) -> None:
        self.actor, self.method = actor, method

    def options(self, num_returns: int) -> Method:
        assert num_returns == 2
        self.remote = self.remote_pair  # type: ignore[method-assign]
        return self

    def remote(self, *args: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self._call(args))

    def remote_pair(self, *args: Any) -> tuple[str, asyncio.Task[Any]]:
        return f"group of {self.actor.name}", asyncio.create_task(self._call(args))

    async def _call(self, args: tuple[Any, ...]) -> Any:
        ended = self.actor.ended
        answer = asyncio.create_task(self.actor.answer(self.method, args))
        await asyncio.wait([answer, ended], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            answer.cancel()
            raise ended.result()
        try:
            return answer.result()
        except ObjectLostError as error:  # of an argument: what the actor itself raises reaches its caller wrapped
            raise RayTaskError(self.method, "traceback", error).as_instanceof_cause() from None


class Stage:
    """Creates the actors of a test and remembers them; `free_s`: how long a name is taken after its actor's death."""

    def __init__(self, work: Callable[..., Any], start: Callable[..., Any] | None = None, free_s: float = 0.0) -> None:
        self.work, self.start, self.free_s = work, start or serves, free_s
        self.actors: list[Actor] = []
        self.created_at: list[float] = []
        self.taken: dict[str, Actor] = {}

    def create(self, name: str) -> Actor:
        if name in self.taken:
            raise ActorAlreadyExistsError(f"{name} is taken")
        actor = self.taken[name] = Actor(self, name, self.work, self.start)
        actor.ended.add_done_callback(lambda _: asyncio.get_running_loop().call_later(self.free_s, self._free, name))
        self.actors.append(actor)
        self.created_at.append(asyncio.get_running_loop().time())
        return actor

    def _free(self, name: str) -> None:
        del self.taken[name]


async def serves(_: Actor) -> None:
    """At once."""


def receipt(prompt_id: str = "p") -> Receipt:
    return Receipt(prompt_id, "w", 1, 0, 0)


def now() -> float:
    return asyncio.get_running_loop().time()


async def rejoin(worker: Worker) -> None:
    worker.returning = None


def workers_on(stage: Stage, *names: str, max_restarts: int = 3, timeout_s: float = 100.0) -> Workers:
    handles = {name: stage.create(name) for name in names or ("w",)}
    return Workers(handles, stage.create, rejoin, timeout_s, max_restarts, "run")  # type: ignore[arg-type]


async def quick(actor: Actor, *_: Any) -> str:
    await asyncio.sleep(1)
    return actor.name


async def never(*_: Any) -> None:
    await asyncio.sleep(10**6)
