"""Where a run's actors really end up on shared GPUs, pretended ones (no GPU needed): one of each role on each GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sppo_ray.layout import Assignment

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("placement_probe.py")
LIMIT_S = 1200  # two dozen processes start: a minute or two on two cores that have nothing else to do
pytestmark = pytest.mark.timeout(LIMIT_S + 20)


def start(nodes: int, gpus_per_node: int, mode: str) -> dict[str, Any]:
    """What the probe found; see there."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600"}
        environment |= {"RAY_prestart_worker_first_driver": "0"}
        output = Path(folder) / "found.json"
        probe = subprocess.Popen(
            [sys.executable, str(PROBE), str(nodes), str(gpus_per_node), mode, str(output)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            log, _ = probe.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(probe.pid, signal.SIGKILL)  # Ray's own processes end with their driver's
            raise
        assert probe.returncode == 0, log[-3000:]
        found: dict[str, Any] = json.loads(output.read_text())
        return found


def assignments(found: dict[str, Any]) -> list[Assignment]:
    assert "assignments" in found, found
    return [Assignment(**item | {"gpus": tuple(item["gpus"])}) for item in found["assignments"]]


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(1, 8), (2, 1)])
def test_one_of_each_role_on_each_gpu(nodes: int, gpus_per_node: int) -> None:
    found, count = start(nodes, gpus_per_node, "full"), nodes * gpus_per_node
    workers = assignments(found)
    assert {worker.name for worker in workers} == {
        f"{r}-{n}" for r in ("rollout", "learner", "judge") for n in range(count)
    }
    gpus = Counter((worker.node, *worker.gpus) for worker in workers)
    assert len(gpus) == count
    assert set(gpus.values()) == {3}
    assert len({(worker.role, worker.node, worker.gpus) for worker in workers}) == 3 * count
    assert len({worker.node for worker in workers}) == nodes
    # The rollouts slept while the learner loaded the policy, and got their weights back from the hub.
    assert found["told"] == [["sleep", "load 0"]] * count


def test_without_a_learner_one_rollout_and_one_judge_on_each_gpu() -> None:
    workers = assignments(start(1, 2, "eval"))
    assert len({(worker.role, worker.gpus) for worker in workers}) == len(workers) == 4


def test_judges_that_pile_up_end_the_start() -> None:
    """Without the learner's ranks to fill the GPUs, judges that ask for their small share only all fit on the first."""
    refused = start(1, 2, "eval-wrong")["refused"]
    assert "carries judge-0, judge-1, rollout-" in refused
