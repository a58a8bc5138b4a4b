"""A node dies with what is on it: workers, for which others on the nodes that are left take over, or all actors of the run.
Tables and weights are the same."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from tests.actors.job_runs import LIMIT_S, ROOT, SLOW, SMALL


@pytest.mark.timeout(3 * LIMIT_S)
@pytest.mark.parametrize("lost", ["workers", "everything"])
def test_a_node_dies(whole, tmp_path, lost):
    command = [sys.executable, "-m", "tests.faults.two_nodes", lost, str(tmp_path / "run"), *SMALL, *SLOW]
    environ = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # both nodes keep to loopback
        "GLOO_SOCKET_IFNAME": "lo",
        "RAY_scheduler_spread_threshold": "0",  # workers on both nodes; by default a node is filled by half first
    }
    done = subprocess.run(
        command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True, timeout=2 * LIMIT_S, check=True
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit"] == 0, found["output"]
    killed = {name.partition("-")[0] for name in found["killed"]}
    if lost == "workers":
        assert {"rollout", "judge"} & killed
    else:
        assert {"rollout", "judge", "buffer", "weights", "learner"} <= killed
        assert "starting all actors again" in found["output"]
    for iteration in (1, 2):
        mine, undisturbed = (
            pq.read_table(folder / f"iter_{iteration}/train.parquet") for folder in (tmp_path / "run", whole[0])
        )
        assert mine.equals(undisturbed)
    weights = [folder / "iter_2/policy/model.safetensors" for folder in (tmp_path / "run", whole[0])]
    assert weights[0].read_bytes() == weights[1].read_bytes()
