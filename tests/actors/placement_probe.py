"""Starts a run's actors as actors/build.py does, in one Ray with pretended GPUs; writes who got which GPU as JSON.

    python placement_probe.py NODES GPUS_PER_NODE full|eval|eval-wrong OUTPUT

full: a colocated run. eval: one without a learner. eval-wrong: the same, with the shares of a run that has one. Order,
names, resources, the handing over of weights and the check of the placement are those of the real run; only the workers
are replaced, by ones that load no model. Run by test_placement.py in a process and with a temporary folder of its own
(RAY_TMPDIR), so that no other Ray on the machine is joined, or sees this one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.train.torch import TorchConfig

from actors import build
from actors.learner import LearnerActor
from actors.process import assignment
from sppo_ray.config import Config
from sppo_ray.config_io import load_config
from sppo_ray.layout import Assignment, Layout, PlacementError, compute_layout

TINY = Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml"


class NoEngine:
    """A rollout worker without vLLM: serves nothing, takes what the hub has, remembers what it was told."""

    def __init__(self, name: str, config: Config, model_path: str, version: int, hub: str) -> None:
        self.name, self._hub = name, ray.get_actor(hub)
        self.told: list[str] = []

    async def ping(self) -> str:
        return self.name

    async def where(self) -> Assignment:
        return assignment("rollout", self.name)

    async def sleep(self) -> None:
        self.told.append("sleep")

    async def load(self, version: int) -> str:
        self.told.append(f"load {version}")
        return (await self._hub.current.remote()).checksum

    async def stats(self) -> list[str]:
        return self.told


class NoJudge:
    """A judge worker without PairRM."""

    def __init__(self, name: str, config: Config) -> None:
        self.name = name

    async def ping(self) -> str:
        return self.name

    async def where(self) -> Assignment:
        return assignment("judge", self.name)


class NoTraining(LearnerActor):
    """The learner with its real Ray Train run, whose ranks report where they are and then only hold their GPUs."""

    def __init__(self, config: Config, layout: Layout, buffer: Any, hub: Any) -> None:
        from actors import learner

        learner.learner_loop = report_and_wait
        learner.TorchConfig = lambda **_: TorchConfig(backend="gloo")  # the GPUs are pretended
        super().__init__(config, layout, buffer, hub)


def report_and_wait(settings: dict[str, Any]) -> None:
    from actors.ranks import Ranks

    ranks = Ranks.join(b"of the test")
    placed = ranks.gather(assignment("learner", f"learner-{ranks.rank}"))
    if ranks.first:
        ray.get(settings["buffer"].learner_ready.remote(placed))
    threading.Event().wait()  # until the run ends


async def started(config: Config, mode: str) -> dict[str, Any]:
    """What the run's actors say when all are up, or why the run refused to go on."""
    layout = compute_layout(config)
    if mode == "eval":
        layout = layout.without_learner()
    slices: Any = [[]] * config.schedule.iterations if mode == "full" else None
    run = build.running(config, layout, [], slices)
    try:
        now = await run.__aenter__()  # never left: on the way out it would wait for the learner to finish
    except PlacementError as error:
        return {"refused": str(error)}
    placed = await now.learner.placed() if now.learner else []
    found = [*await now.rollout.where(), *placed, *await now.judge.where()]
    return {"assignments": [asdict(a) for a in found], "told": list((await now.rollout.stats()).values())}


def main(nodes: int, gpus_per_node: int, mode: str, output: Path) -> None:
    build.RolloutWorker, build.JudgeWorker, build.LearnerActor = NoEngine, NoJudge, NoTraining
    node = {"num_cpus": 2 * gpus_per_node, "num_gpus": gpus_per_node, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    environment = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(cluster.address, namespace="p", log_to_driver=False, runtime_env={"env_vars": environment})
    gpus = nodes * gpus_per_node
    with tempfile.TemporaryDirectory() as folder:
        workers = [f"{role}.num_workers={gpus}" for role in ("rollout", "learner", "judge")]
        cluster_keys = [f"cluster.gpus={gpus}", f"cluster.gpus_per_node={gpus_per_node}"]
        config = load_config(TINY, [f"run.dir={folder}/run", "learner.zero_stage=3", *workers, *cluster_keys])
        output.write_text(json.dumps(asyncio.run(started(config, mode))))
        ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
