"""One Ray and one pair of rollout workers for all actor tests: an engine takes longer to start than to test."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside the tests
# Ray reads the mode when it is imported: set later, the driver would talk to its own cluster without a token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import pytest
import ray
import torch
from safetensors.torch import load_file
from serving_factory import Serving, start_worker
from transformers import AutoTokenizer

from actors.access import stay_on_loopback
from actors.process import environment
from actors.weights import NAME, WeightsHub
from sppo_ray.config import Config
from sppo_ray.types import Prompt

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "sppo_ray" / "assets"


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A small Ray of our own, with a token, on loopback, ended by us."""
    stay_on_loopback()
    ray.init(
        address="local",
        num_cpus=2,
        namespace="tests",
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=200 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), **environment(gpus=False, threads=1)}},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded policy, with a second stop token in generation_config.json as Llama 3 has it (<|eot_id|>)."""
    folder = tmp_path_factory.mktemp("models") / "policy"
    shutil.copytree(ASSETS / "policy", folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    (second,) = AutoTokenizer.from_pretrained(folder).encode(" because", add_special_tokens=False)
    generation["eos_token_id"] = [2, second]
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.fixture(scope="session")
def base_weights(policy: Path) -> dict[str, torch.Tensor]:
    return load_file(policy / "model.safetensors")


@pytest.fixture(scope="session")
def actor_config(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(tmp_path_factory.mktemp("run"))},
            "data": {"prompts": str(ASSETS / "prompts_train.jsonl")},
            "policy": {"model": str(policy), "dtype": "float32"},
            "rollout": {"max_model_len": 256, "max_new_tokens": 48},
            "judge": {"model": str(ASSETS / "judge")},
            "weights": {"timeout_s": 60},
        }
    )


@pytest.fixture(scope="session")
def prompts(policy: Path) -> list[Prompt]:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = [json.loads(line) for line in (ASSETS / "prompts_train.jsonl").read_text().splitlines()[:12]]
    made = []
    for row in rows:
        messages = [{"role": "user", "content": row["prompt"]}]
        templated = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = np.asarray(tokenizer.encode(templated, add_special_tokens=False), dtype=np.int32)
        made.append(Prompt(row["prompt_id"], row["prompt"], templated, ids))
    return made


@pytest.fixture(scope="session")
def started(ray_local: None, actor_config: Config, policy: Path) -> Serving:
    hub = ray.remote(WeightsHub).options(name=NAME, num_cpus=0).remote(actor_config)
    workers = {name: start_worker(name, actor_config, policy, 0) for name in ("rollout-0", "rollout-1")}
    ray.get([worker.ping.remote() for worker in workers.values()])
    return Serving(actor_config, hub, workers)


@pytest.fixture
async def serving(started: Serving, base_weights: dict[str, torch.Tensor]) -> Serving:
    """Both workers serve the embedded policy, whichever tests ran before."""
    if started.version:
        started.publish(base_weights)
        await started.pool().load(started.version)
    return started
