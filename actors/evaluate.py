"""`sppo eval`: one policy against the config's, on the held-out prompts, with the run's own workers and judge."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from actors.build import running
from actors.cluster import connected
from actors.policy_folder import local_folder
from actors.publish import publish_folder
from sppo_ray.config import Config
from sppo_ray.layout import Layout
from sppo_ray.metrics import read_metrics
from sppo_ray.preflight import Preflight
from sppo_ray.summary import closing_table

VERSION = 1  # of the policy under evaluation; policy.model is version 0


def evaluate(config: Config, layout: Layout, checked: Preflight, policy: str, console: Console) -> Table | None:
    """The held-out table of policy.model and `policy`. Leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="sppo-eval-") as scratch, connected(config, layout):
        there = config.model_copy(update={"run": config.run.model_copy(update={"dir": scratch})})
        asyncio.run(_evaluate(there, layout.without_learner(), checked, policy, console))
        return closing_table(read_metrics(Path(scratch) / "metrics.jsonl"), policy)


async def _evaluate(config: Config, layout: Layout, checked: Preflight, policy: str, console: Console) -> None:
    console.print("starting the workers", highlight=False)
    async with running(config, layout, checked.prompts.heldout, slices=None) as now:
        console.print(f"sampling {len(checked.prompts.heldout)} held-out prompts from each policy", highlight=False)
        await now.evaluator.evaluate(0)
        folder = Path(local_folder(policy))
        await asyncio.to_thread(publish_folder, config, now.hub, folder, VERSION)
        await now.rollout.load(VERSION)
        await now.evaluator.evaluate(VERSION)
