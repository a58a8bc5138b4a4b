"""The NCCL broadcast from a learner's GPU into a rollout worker on another one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.process import environment
from actors.publish import publish
from actors.ranks import Ranks
from actors.rollout import RolloutWorker
from actors.weights import NAME, WeightsHub
from sppo_ray.config import Config
from sppo_ray.types import Prompt, Sampling

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "sppo_ray" / "assets"
GREEDY = Sampling(0.0, 1.0, 32, (0,))
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs: NCCL takes one rank per GPU"),
]


class Learner:
    """Publishes changed weights from a GPU of its own."""

    def publish(self, config: Config, hub: Any, version: int, seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        weights = load_file(ASSETS / "policy" / "model.safetensors")
        noisy = ((n, (w + 0.05 * torch.randn(w.shape, generator=generator)).bfloat16()) for n, w in weights.items())
        return publish(config, hub, Ranks(rank=0, world=1, group=None, key=b""), version, noisy, str(ASSETS / "policy"))


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, namespace="tests", include_dashboard=False)
    yield
    ray.shutdown()


def config_of(run_dir: Path, channel: str) -> Config:
    config = Config.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "data": {"prompts": str(ASSETS / "prompts_train.jsonl")},
            "policy": {"model": str(ASSETS / "policy"), "dtype": "bfloat16"},
            "rollout": {"max_model_len": 256, "max_new_tokens": 48, "gpu_memory_utilization": 0.3},
            "judge": {"model": str(ASSETS / "judge")},
            "cluster": {"gpus": 3, "gpus_per_node": 3, "layout": "disaggregated"},
        }
    )
    # The run's checks of a channel against schedule and layout are not the subject here.
    return config.model_copy(update={"weights": config.weights.model_copy(update={"channel": channel, "chunk_mb": 1})})


def test_a_broadcast_serves_what_pulling_serves_and_a_restarted_worker_pulls(cluster: None, tmp_path: Path) -> None:
    config = config_of(tmp_path, "nccl")
    env = {"env_vars": {"PYTHONPATH": str(ROOT), **environment(gpus=True, threads=1)}}
    hub = ray.remote(WeightsHub).options(name=NAME, num_cpus=0, runtime_env=env).remote(config)
    workers = [
        ray.remote(RolloutWorker)
        .options(name=name, num_gpus=1, num_cpus=1, max_restarts=1, max_concurrency=100, runtime_env=env)
        .remote(name, config, str(ASSETS / "policy"), 0, NAME)
        for name in ("rollout-0", "rollout-1")
    ]
    ray.get([worker.ping.remote() for worker in workers])
    learner = ray.remote(Learner).options(num_gpus=1, runtime_env=env).remote()

    prompt = Prompt("p", "", "", np.arange(3, 13, dtype=np.int32))

    def greedy(worker: Any) -> list[int]:
        group, _ = worker.generate.options(num_returns=2).remote(prompt, GREEDY, 1)
        return ray.get(group).responses[0].token_ids.tolist()

    def served(worker: Any) -> tuple[int, str]:
        stats = ray.get(worker.stats.remote())
        return stats["version"], stats["checksum"]

    base = greedy(workers[0])
    for version, seed in ((1, 1), (2, 2)):  # each publish makes its own group
        checksum = ray.get(learner.publish.remote(config, hub, version, seed))
        assert [served(worker) for worker in workers] == [(version, checksum)] * 2
    broadcast = [greedy(worker) for worker in workers]
    assert broadcast[0] == broadcast[1] != base
    assert ray.get(hub.current.remote()).broadcast is None

    pulled = ray.get(learner.publish.remote(config_of(tmp_path, "ray"), hub, 3, 2))
    assert pulled == checksum
    ray.get([worker.load.remote(3) for worker in workers])
    assert [greedy(worker) for worker in workers] == broadcast

    ray.get(learner.publish.remote(config, hub, 4, 2))
    ray.kill(workers[0], no_restart=False)
    ray.get(workers[0].ping.options(max_task_retries=-1).remote())
    assert served(workers[0]) == (4, checksum)
    assert greedy(workers[0]) == broadcast[0]
