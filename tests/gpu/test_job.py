"""The colocated job on one GPU, as a user runs it: vLLM, PairRM and the learner share the GPU and take turns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.actors.job_runs import PROMPTS, manifest, sppo, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),
]
GIB = 2**30


@pytest.fixture(scope="module")
def colocated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny job of two iterations, in bfloat16, which vLLM's attention on GPUs wants."""
    run_dir = tmp_path_factory.mktemp("runs") / "colocated"
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    process = sppo(
        *train(run_dir),
        *("cluster.gpus=1", f"cluster.gpu_memory_gb={memory:.0f}", "rollout.gpu_memory_utilization=0.3"),
        *("policy.dtype=bfloat16", "learner.dtype=bfloat16", "learner.zero_stage=3"),
    )
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    return run_dir


def test_the_run_directory_is_complete(colocated: Path) -> None:
    record = manifest(colocated)
    assert (record["status"], record["groups_trained"]) == ("done", 2 * PROMPTS)
    for t in (1, 2):
        for name in ("generated.parquet", "train.parquet", "policy/model.safetensors"):
            assert (colocated / f"iter_{t}" / name).exists(), (t, name)
    lines = [json.loads(line) for line in (colocated / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in lines if line.get("event") == "evaluation"] == [0, 1, 2]


def test_the_engine_slept_while_the_learner_trained(colocated: Path) -> None:
    """Before the learner loads, and before each of the two iterations is trained; each time it woke up again."""
    log = (colocated / "logs/rollout-0.log").read_text()
    assert log.count("to fall asleep") == 3
    assert log.count("to wake up") >= 3


def test_what_is_served_is_what_was_trained(colocated: Path) -> None:
    """The checksum of the saved folder, computed anew, is the one the learner published and the engine received."""
    from actors.policy_folder import read_policy
    from sppo_ray.weight_chunks import Checksum, pack

    log = (colocated / "logs/rollout-0.log").read_text()
    received = dict(re.findall(r"serves version (\d+), checksum (\w+)", log))
    for t in (1, 2):
        saved = Checksum()
        for chunk in pack(read_policy(colocated / f"iter_{t}/policy"), chunk_bytes=1 << 20):
            saved.update(chunk)
        published = json.loads((colocated / f"iter_{t}/trained.json").read_text())["checksum"]
        assert saved.hexdigest() == published == received[str(t)]
