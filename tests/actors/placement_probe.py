"""Starts one Ray with pretended GPUs, places the roles of a colocated layout in it, writes who got which GPU as JSON.

    python placement_probe.py NODES GPUS_PER_NODE OUTPUT [ROLE ...]

The roles, if given, are the order of creation. Run by test_placement.py in a process and with a temporary folder of its own
(RAY_TMPDIR), so that no other Ray on the machine is joined, or sees this one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from sppo_ray.layout import Assignment, Layout, Role, RoleLayout, compute_layout
from tests.unit.gpu_configs import gpu_config

LEARNER_TIMEOUT_S = 240


@ray.remote
class Dummy:
    """Stands for a rollout or judge worker: holds its GPU share and does nothing."""

    def where(self) -> tuple[str, list[Any]]:
        return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()


@ray.remote(num_cpus=0)
class Meeting:
    """Where the learner's ranks report, and wait so that they hold their GPUs while judges are placed."""

    def __init__(self) -> None:
        self.found: list[tuple[str, str, list[Any]]] = []
        self.over = asyncio.Event()

    async def report_and_wait(self, name: str, node: str, gpus: list[Any]) -> None:
        self.found.append((name, node, gpus))
        await self.over.wait()

    async def reports(self) -> list[tuple[str, str, list[Any]]]:
        return self.found

    async def end(self) -> None:
        self.over.set()


def learner_loop(config: dict[str, Any]) -> None:
    context = ray.get_runtime_context()
    name = f"learner-{ray.train.get_context().get_world_rank()}"
    ray.get(config["meeting"].report_and_wait.remote(name, context.get_node_id(), ray.get_gpu_ids()))


class Probe:
    def __init__(self, layout: Layout, storage: str) -> None:
        self.layout, self.storage = layout, storage
        self.kept: list[Any] = []  # an actor dies with its last handle
        self.assignments: list[Assignment] = []
        self.meeting = Meeting.remote()
        self.learner: threading.Thread | None = None

    def place(self, role: Role) -> None:
        ask = self.layout.of(role)
        found = self._start_learner(ask) if role == "learner" else self._start_actors(role, ask)
        self.assignments += [Assignment(role, name, node, tuple(map(str, gpus))) for name, node, gpus in found]

    def end(self) -> None:
        ray.get(self.meeting.end.remote())
        if self.learner is not None:
            self.learner.join()

    def _start_actors(self, role: Role, ask: RoleLayout) -> list[tuple[str, str, list[Any]]]:
        actors = [Dummy.options(num_gpus=ask.gpus, num_cpus=ask.cpus).remote() for _ in range(ask.workers)]
        self.kept += actors
        found = ray.get([actor.where.remote() for actor in actors])
        return [(f"{role}-{index}", node, gpus) for index, (node, gpus) in enumerate(found)]

    def _start_learner(self, ask: RoleLayout) -> list[tuple[str, str, list[Any]]]:
        trainer = TorchTrainer(
            learner_loop,
            train_loop_config={"meeting": self.meeting},
            scaling_config=ScalingConfig(
                num_workers=ask.workers, use_gpu=True, resources_per_worker={"GPU": ask.gpus, "CPU": ask.cpus}
            ),
            torch_config=TorchConfig(backend="gloo"),  # the GPUs are pretended
            run_config=RunConfig(name="p", storage_path=self.storage, failure_config=FailureConfig(max_failures=0)),
        )
        self.learner = threading.Thread(target=trainer.fit, daemon=True)
        self.learner.start()
        deadline = time.monotonic() + LEARNER_TIMEOUT_S
        while len(found := ray.get(self.meeting.reports.remote())) < ask.workers:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(found)} of {ask.workers} learner ranks were placed: {found}")
            time.sleep(0.2)
        return found


def main(nodes: int, gpus_per_node: int, output: Path, order: list[str]) -> None:
    node = {"num_cpus": 2 * gpus_per_node, "num_gpus": gpus_per_node, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    environment = {"RAY_ADDRESS": cluster.address, "PYTHONPATH": os.pathsep.join(sys.path)}
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": environment})
    with tempfile.TemporaryDirectory() as storage:
        layout = compute_layout(gpu_config(nodes * gpus_per_node, gpus_per_node=gpus_per_node))
        probe = Probe(layout, storage)
        for role in order or layout.creation_order:
            probe.place(role)  # type: ignore[arg-type]
        probe.end()
    output.write_text(json.dumps([asdict(assignment) for assignment in probe.assignments]))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
