"""One run, from a checked config to the closing table: what `sppo train` does once the input is accepted."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from rich.console import Console

from actors.build import BufferClient, Running, running
from actors.cluster import connected
from sppo_ray.config import Config
from sppo_ray.layout import Layout
from sppo_ray.ledger import Ledger
from sppo_ray.preflight import Preflight
from sppo_ray.progress import RunProgress
from sppo_ray.run_dir import update_manifest
from sppo_ray.schedules import synchronous


def train(config: Config, layout: Layout, checked: Preflight, console: Console) -> None:
    """Run to the end. Raises what stopped it; everything done so far is in the run directory."""
    root = Path(config.run.dir)
    with connected(config, layout) as cluster:
        if cluster.dashboard:
            console.print(f"Ray dashboard: {cluster.dashboard} (namespace {cluster.namespace})", highlight=False)
        try:
            asyncio.run(_train(config, layout, checked, console))
        except BaseException as error:
            update_manifest(root, status="interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
    update_manifest(root, status="done", **counts(config))


async def _train(config: Config, layout: Layout, checked: Preflight, console: Console) -> None:
    task = asyncio.current_task()
    assert task is not None
    # After ray.init(), which installs a handler of its own: `ray job stop` sends SIGTERM, and the actors end with us.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with RunProgress(console, config.schedule.iterations) as progress:
        progress.say("starting the workers")
        async with running(config, layout, checked.prompts.heldout) as now:
            follower = asyncio.create_task(_follow(now.buffer, progress))
            try:
                await _schedule(now, config, checked, progress)
            finally:
                follower.cancel()


async def _schedule(now: Running, config: Config, checked: Preflight, progress: RunProgress) -> None:
    if now.done:
        progress.resumed(now.done)
    start = now.done.iteration if now.done else 0
    await synchronous.run(now.system, checked.prompts.slices, config, progress, start)


async def _follow(buffer: BufferClient, progress: RunProgress) -> None:
    """Show the learner's steps; the learner works in its own process, so the driver looks now and then."""
    shown = None
    while True:
        await asyncio.sleep(1.0)
        line = await buffer.last_step()
        if line and line["step"] != shown:
            shown = line["step"]
            progress.stepped(line)


def counts(config: Config) -> dict[str, int]:
    """Totals over the sealed and trained iterations."""
    ledger = Ledger(config)
    iterations = range(1, config.schedule.iterations + 1)
    groups = sum(summary.groups for t in iterations if (summary := ledger.sealed(t)))
    trained = sum(summary.examples for t in iterations if ledger.trained(t) and (summary := ledger.sealed(t)))
    return {"groups_generated": groups, "groups_judged": groups, "groups_trained": trained}
