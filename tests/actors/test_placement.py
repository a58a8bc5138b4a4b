"""Where Ray really puts the roles of a colocated layout, on pretended GPUs (no GPU needed): one of each on each GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from sppo_ray.layout import Assignment, PlacementError, check_placement, compute_layout
from tests.unit.gpu_configs import gpu_config

ROOT = Path(__file__).parents[2]
PROBE = Path(__file__).with_name("placement_probe.py")
LIMIT_S = 400  # two dozen processes start: a minute or two on two cores


def place(nodes: int, gpus_per_node: int, *order: str) -> list[Assignment]:
    """What every worker of a run on that cluster was given; order: roles as they are created, the layout's unless given."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:  # short: Ray's sockets lie below it
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": folder, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120"}
        output = Path(folder) / "found.json"
        probe = subprocess.Popen(
            [sys.executable, str(PROBE), str(nodes), str(gpus_per_node), str(output), *order],
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
        found = json.loads(output.read_text())
    return [Assignment(**item | {"gpus": tuple(item["gpus"])}) for item in found]


@pytest.mark.timeout(LIMIT_S + 20)
@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(1, 8), (2, 4)])
def test_one_of_each_role_on_each_gpu(nodes: int, gpus_per_node: int) -> None:
    found = place(nodes, gpus_per_node)
    assert Counter(assignment.role for assignment in found) == {"rollout": 8, "learner": 8, "judge": 8}
    assert len({(assignment.role, assignment.node, assignment.gpus) for assignment in found}) == 24
    assert len({assignment.node for assignment in found}) == nodes
    check_placement(compute_layout(gpu_config(8, gpus_per_node=gpus_per_node)), found)


@pytest.mark.timeout(LIMIT_S + 20)
def test_judges_before_the_learner_pile_up_and_are_caught() -> None:
    found = place(1, 2, "rollout", "judge")
    with pytest.raises(PlacementError, match=r"carries judge-0, judge-1, rollout-\d"):
        check_placement(compute_layout(gpu_config(2)), found)
