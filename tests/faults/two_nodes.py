"""A run on a cluster of two nodes, one of which is killed. A process of its own:
`python two_nodes.py workers|everything RUN_DIR overrides...`.

What the lost node had of it: some of its workers, or all actors, with the head left to the driver. Another node joins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from tests.actors.job_runs import LIMIT_S, ROOT, free_port, shards, wait_for

PLAIN = "from sppo_ray.cli import main; main()"
# Actors that ask for no CPU may be anywhere; with one each they are where there are CPUs.
WITH_SHARES = (
    "from dataclasses import replace; from actors import build; build.LIGHT = replace(build.LIGHT, cpus=1); " + PLAIN
)


def main() -> None:
    lost, run_dir, *overrides = sys.argv[1:]
    everything = lost == "everything"
    head = {"num_cpus": 0 if everything else 2, "include_dashboard": True, "dashboard_port": free_port()}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    size = 9 if everything else 4
    other = cluster.add_node(num_cpus=size)
    command = [
        sys.executable, "-c", WITH_SHARES if everything else PLAIN, "train", "--config", "configs/tiny_cpu.yaml", f"run.dir={run_dir}",
        f"cluster.address={cluster.address}", "rollout.num_workers=2", "judge.num_workers=2", *overrides,
    ]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ray.init(cluster.address, namespace="watching")  # beforehand: the run may not be over when the node is killed
    wait_for(lambda: run.poll() is not None or shards(Path(run_dir), 1) >= 2)
    on_the_other = [("node_id", "=", other.node_id), ("state", "=", "ALIVE")]
    there = [actor.name for actor in list_actors(filters=on_the_other, timeout=120)]
    cluster.add_node(num_cpus=size)
    cluster.remove_node(other, allow_graceful=False)
    output, _ = run.communicate(timeout=LIMIT_S)
    print(json.dumps({"exit": run.returncode, "killed": there, "output": output}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
