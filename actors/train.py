"""One run, from a checked config to the closing table: what `sppo train` does once the input is accepted."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from rich.console import Console
from rich.text import Text

from actors.bookkeepers import answered
from actors.buffer import NAME as BUFFER
from actors.build import Running, running
from actors.cluster import connected
from actors.fleet import Fleet
from actors.learner import NAME as LEARNER
from actors.process import give_memory_back
from actors.tally import Tally
from actors.weights import NAME as HUB
from actors.workers import call
from sppo_ray import scaling
from sppo_ray.attempts import Attempts
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.layout import Layout
from sppo_ray.ledger import Ledger
from sppo_ray.mirror import Mirror
from sppo_ray.preflight import Preflight
from sppo_ray.progress import RunProgress, say
from sppo_ray.progress_async import AsyncProgress
from sppo_ray.recovery import recover
from sppo_ray.run_dir import claimed, read_manifest, update_manifest
from sppo_ray.schedules import asynchronous, synchronous
from sppo_ray.step_plan import StepPlan
from sppo_ray.storage import Storage
from sppo_ray.threads import in_daemon_thread

T = TypeVar("T")
LEAVE_LIMIT_S = 60.0
RECORD_LIMIT_S = 10.0  # for the last line of an attempt: its disk may be what it failed of


def train(config: Config, layout: Layout, checked: Preflight, console: Console) -> None:
    """Run to the end. Raises what stopped it; everything done so far is in the run directory."""
    give_memory_back()
    root, storage = Path(config.run.dir), Storage(config.run.storage_patience_s)
    attempts = Attempts(root, config.cluster.max_restarts, partial(say, console, style="yellow"))
    facts = {"prompts": dataclasses.asdict(checked.prompts.report)}
    while attempts.more:
        with attempts.next(), connected(config, layout) as cluster, claimed(config, facts):
            if attempts.begun == 1:
                storage.patiently("an earlier request", root / scaling.FILE, partial(scaling.forget, root), "remove")
            if cluster.dashboard:
                say(console, f"Ray dashboard: {cluster.dashboard} (namespace {cluster.namespace})")
            _run(config, layout, checked, console)


def _run(config: Config, layout: Layout, checked: Preflight, console: Console) -> None:
    root = Path(config.run.dir)
    mirror = Mirror(config, partial(say, console), partial(say, console, style="yellow")) if config.run.mirror else None
    try:
        asyncio.run(_train(config, layout, checked, console, mirror))
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | asyncio.CancelledError)
        with suppress(OSError, SppoError):  # of a full disk, of damaged records: what stopped the run is to be read
            ended = {"status": "interrupted"} if stopped else {"status": "failed", "cause": _told(error)}
            update_manifest(root, **ended)
            update_manifest(root, **counts(config))
        raise
    update_manifest(root, Storage(config.run.storage_patience_s), status="done", **_patiently(counts, config))
    if mirror:
        asyncio.run(mirror.finish())


def _told(error: BaseException) -> str:
    text = "\n".join([str(error) or repr(error), *getattr(error, "__notes__", ())])
    return Text.from_ansi(text).plain  # Ray colours what it quotes


def _patiently(read: Callable[[Config], T], config: Config) -> T:
    """What is read of the record, as soon as the disk or file server lets it."""
    storage = Storage(config.run.storage_patience_s)
    return storage.patiently("the record in", Path(config.run.dir), partial(read, config), "read")


async def _train(config: Config, layout: Layout, checked: Preflight, console: Console, mirror: Mirror | None) -> None:
    task = asyncio.current_task()
    assert task is not None
    # `ray job stop` sends SIGTERM, and the actors end with us.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with _display(config, checked, console) as progress:
        await _alone()
        for found in await in_daemon_thread(partial(recover, config)):
            progress.alarm(found)
        held = await in_daemon_thread(partial(_patiently, groups_on_disk, config))
        progress.say("starting the workers")
        async with running(config, layout, checked.prompts.heldout, checked.prompts.slices) as now:
            await now.buffer.record({"event": "prompts"} | dataclasses.asdict(checked.prompts.report))
            tally = Tally(Path(config.run.dir), held)
            followers = _followers(now, config, progress, tally, mirror)
            try:
                await _first_of(_schedule(now, config, checked, progress, held), *followers)
            except SppoError as error:
                await _record_failure(now, error)
                raise
            finally:
                tally.keep(now, progress)


async def _record_failure(now: Running, error: SppoError) -> None:
    """In metrics.jsonl, at its place among the updates; where the buffer is what failed, manifest.json alone tells of it."""
    line = {"event": "failed", "cause": _told(error), "at": datetime.now(UTC).isoformat(timespec="microseconds")}
    with suppress(SppoError, TimeoutError):
        await asyncio.wait_for(now.buffer.record(line), RECORD_LIMIT_S)


async def _alone() -> None:
    """Returns when no actor of an earlier driver of this run is left: Ray ends them soon after their driver."""
    deadline = asyncio.get_running_loop().time() + LEAVE_LIMIT_S
    while left := ray.util.list_named_actors():
        if asyncio.get_running_loop().time() > deadline:
            raise SppoError(f"actors of an earlier driver of this run do not end: {', '.join(sorted(left))}")
        await asyncio.sleep(0.2)


def _display(config: Config, checked: Preflight, console: Console) -> RunProgress:
    if config.schedule.mode == "sync":
        return RunProgress(console, config.schedule.iterations)
    return AsyncProgress(console, StepPlan(config, [len(part) for part in checked.prompts.slices]))


async def _schedule(now: Running, config: Config, checked: Preflight, progress: RunProgress, held: int) -> None:
    """held: groups that are on disk already."""
    if now.done:
        progress.resumed(now.done)
    start, slices = now.done.iteration if now.done else 0, checked.prompts.slices
    if config.schedule.mode == "async":
        assert isinstance(progress, AsyncProgress)
        progress.holds(held)
        await asynchronous.run(now.system, slices, config, progress, start, now.version)
        return
    try:
        await synchronous.run(now.system, slices, config, progress, start)
    except ExceptionGroup as group:  # of the lanes that sample and judge: the first to fail is the cause
        raise group.exceptions[0] from None


def _followers(
    now: Running, config: Config, progress: RunProgress, tally: Tally, mirror: Mirror | None
) -> list[Coroutine[Any, Any, None]]:
    """What goes on beside the schedule, for as long as it does."""
    followers = [_follow(now, progress, tally, config.run.dir)]
    if mirror:
        followers.append(mirror.follow())
    if config.schedule.mode == "async":
        followers.append(Fleet(config, now.rollout, now.judge, now.create, now.buffer.record, progress.say).follow())
    return followers


async def _follow(now: Running, progress: RunProgress, tally: Tally, run_dir: str) -> None:
    """Look after the actors that nobody calls for a while: show the learner's steps, say when the run waits for its disk, and
    raise at once if one of them has failed."""
    shown, waits_for = None, ""
    while True:
        await asyncio.sleep(1.0)
        if now.learner:
            now.learner.check()
            await answered(LEARNER, now.learner.ping(), now.places[LEARNER], run_dir)
        await answered(HUB, call(now.hub, HUB, "ping"), now.places[HUB], run_dir)
        seen = await answered(BUFFER, now.buffer.look(), now.places[BUFFER], run_dir)
        if seen.step and seen.step["step"] != shown:
            shown = seen.step["step"]
            progress.stepped(seen.step)
        if seen.trouble != waits_for:
            waits_for = seen.trouble
            progress.alarm(seen.trouble or "the storage works again; the run goes on")
        tally.seen = seen
        tally.keep_now_and_then(now, progress)


async def _first_of(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run together until the first ends or fails; the others are cancelled."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def groups_on_disk(config: Config) -> int:
    ledger = Ledger(config)
    return sum(ledger.groups(t) for t in range(1, config.schedule.iterations + 1))


def counts(config: Config) -> dict[str, int]:
    """Totals over the iterations: groups on disk, and those of them that a saved policy was trained on."""
    ledger, groups = Ledger(config), groups_on_disk(config)
    iterations = range(1, config.schedule.iterations + 1)
    trained = sum(summary.examples for t in iterations if ledger.trained(t) and (summary := ledger.sealed(t)))
    again = max(0, read_manifest(ledger.root).get("groups_sampled", 0) - groups)
    return {
        "groups_generated": groups,
        "groups_judged": groups,
        "groups_trained": trained,
        "groups_regenerated": again,
    }
