"""What a live weight publish costs: seconds, the pause of a running stream of requests, memory.

    python scripts/bench/publish.py --models tiny random --channels ray disk --dtype float32

One publisher that holds the policy as the learner does, the weights hub and one rollout worker (vLLM in the worker's
process, on the CPU) that samples without pause. Memory is what the processes have to themselves (resident minus shared)
plus what the object store has touched of /dev/shm. Pages of mapped files are the kernel's cache, which it gives back when
asked, and are left out.

A worker's memory goes up and down as it samples, so what is compared are peaks: of each process over a time without a publish,
of all together in one.
"kept MiB" is what the processes keep of the first publish (libraries, threads, buffers). The other columns are the growth in
later publishes: of the processes over their state after the first, of the store over its state before anything was published;
"copies" is their sum over one copy of the weights, without "kept".
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when Ray is imported
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import numpy as np
import psutil
import ray
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from actors.access import stay_on_loopback
from actors.cluster import set_ray_defaults
from actors.policy_folder import SMALL_FILES, read_policy
from actors.process import environment, give_memory_back
from actors.publish import publish
from actors.ranks import Ranks
from actors.rollout import RolloutWorker
from actors.weights import NAME, WeightsHub
from sppo_ray.config import Config
from sppo_ray.types import Prompt, Sampling

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "sppo_ray" / "assets"
ROLES = ("publisher", "hub", "worker", "store")
IN_FLIGHT = 4  # groups
STREAM_S = 15.0  # the stream runs this long before the first update
MIB = 1 << 20


class Publisher:
    """Rank 0 of a learner, as far as publishing goes: the model in memory, and layers of it on their way out."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._weights = {name: tensor.clone() for name, tensor in read_policy(Path(folder))}
        give_memory_back()

    def size(self) -> int:
        """Bytes of one copy of the weights."""
        return sum(tensor.nbytes for tensor in self._weights.values())

    def publish(self, config: Config, hub: Any, version: int) -> float:
        """Seconds."""
        started = time.perf_counter()
        publish(config, hub, Ranks(rank=0, world=1, group=None, key=b""), version, self._gathered(), self._folder)
        return time.perf_counter() - started

    def _gathered(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights.items():
            yield name, tensor.clone()

    def pid(self) -> int:
        return os.getpid()


@dataclass
class Memory:
    """Samples the memory of the roles from a thread. Bytes."""

    pids: dict[str, int]
    before: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    peaks: dict[str, int] = field(default_factory=dict)  # over `before`: each role's own, and "sum" of all at one time
    _ended: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Memory:
        self.peaks = dict.fromkeys((*ROLES, "sum"), 0)
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.01):
            growth = {role: now - self.before[role] for role, now in memory_of(self.pids).items()}
            growth["sum"] = sum(growth.values())
            self.peaks = {role: max(peak, growth[role]) for role, peak in self.peaks.items()}


def peaks_of(pids: dict[str, int], seconds: float) -> dict[str, int]:
    """Bytes that each role has at most in the next seconds."""
    with Memory(pids) as memory:
        time.sleep(seconds)
    return {role: memory.peaks[role] for role in ROLES}


def memory_of(pids: dict[str, int]) -> dict[str, int]:
    """Bytes that each role has now."""
    used = {role: psutil.Process(pid).memory_info() for role, pid in pids.items()}
    return {role: m.rss - m.shared for role, m in used.items()} | {"store": psutil.disk_usage("/dev/shm").used}


class Stream:
    """Groups on one worker, IN_FLIGHT at a time, without end; remembers when each was finished."""

    def __init__(self, worker: Any, sampling: Sampling) -> None:
        self.finished: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(worker, sampling))

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self, worker: Any, sampling: Sampling) -> None:
        prompt = Prompt("p", "", "", np.arange(3, 19, dtype=np.int32))
        running: list[Any] = []
        while not self._ended.is_set():
            while len(running) < IN_FLIGHT:
                running.append(worker.generate.options(num_returns=2).remote(prompt, sampling, 1)[1])
            done, running = ray.wait(running)
            ray.get(done)
            self.finished.append(time.perf_counter())
        ray.get(running)

    def longest_gap(self, since: float, until: float) -> float:
        """Seconds between two groups finished one after the other, of those gaps that touch the interval."""
        gaps = [(a, b) for a, b in itertools.pairwise(self.finished) if b >= since and a <= until]
        return max(b - a for a, b in gaps)


def random_policy(folder: Path, dtype: torch.dtype) -> None:
    """A Llama of 200 million random parameters under the embedded policy's tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "num_hidden_layers": 12, "num_attention_heads": 16, "intermediate_size": 2816}
    config = LlamaConfig(**shape, vocab_size=22_000, max_position_embeddings=512, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for path in (path for pattern in SMALL_FILES for path in (ASSETS / "policy").glob(pattern)):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def config_of(scratch: Path, policy: Path, channel: str, options: argparse.Namespace) -> Config:
    dtype = json.loads((policy / "config.json").read_text())["dtype"]
    return Config.model_validate(
        {
            "run": {"dir": str(scratch / f"run-{policy.name}-{channel}")},
            "data": {"prompts": str(ASSETS / "prompts_train.jsonl")},
            "policy": {"model": str(policy), "dtype": dtype},
            "rollout": {"max_model_len": 128, "max_new_tokens": 48},
            "judge": {"model": str(ASSETS / "judge")},
            "weights": {"channel": channel} | ({"chunk_mb": options.chunk_mb} if options.chunk_mb else {}),
        }
    )


def measure(scratch: Path, policy: Path, channel: str, options: argparse.Namespace) -> list[str]:
    """One line of the table. Starts and ends a Ray of its own, so that the object store is fresh."""
    config = config_of(scratch, policy, channel, options)
    env = {"PYTHONPATH": str(ROOT), **environment(gpus=False, threads=1)}
    stay_on_loopback()
    set_ray_defaults()
    ray.init(
        address="local", num_cpus=2, namespace="bench", include_dashboard=False, log_to_driver=False,
        object_store_memory=6 << 30, runtime_env={"env_vars": env},
    )  # fmt: skip
    try:
        hub = ray.remote(WeightsHub).options(name=NAME, num_cpus=0).remote(config)
        publisher = ray.remote(Publisher).options(num_cpus=0).remote(str(policy))
        serving = ray.remote(RolloutWorker).options(num_cpus=0, max_concurrency=100)
        worker = serving.remote("rollout-0", config, str(policy), 0, NAME)
        ray.get(worker.ping.remote())
        return _measured(config, hub, publisher, worker, options)
    finally:
        ray.shutdown()


def _measured(config: Config, hub: Any, publisher: Any, worker: Any, options: argparse.Namespace) -> list[str]:
    hub_pid = ray.get(hub.__ray_call__.remote(lambda _: os.getpid()))
    pids = {
        "publisher": ray.get(publisher.pid.remote()),
        "hub": hub_pid,
        "worker": ray.get(worker.stats.remote())["pid"],
    }
    size = ray.get(publisher.size.remote())
    published, loaded, gaps = [], [], []
    with Stream(worker, Sampling(1.0, 1.0, options.tokens, (0, 1))) as stream:
        started = time.perf_counter()
        time.sleep(STREAM_S / 3)
        idle = peaks_of(pids, STREAM_S)
        before = stream.longest_gap(started + STREAM_S / 3, time.perf_counter())
        ray.get(publisher.publish.remote(config, hub, 1))
        ray.get(worker.load.remote(1))
        warm = peaks_of(pids, STREAM_S) | {"store": idle["store"]}
        with Memory(pids, warm) as memory:
            for version in range(2, 2 + options.publishes):
                begun = time.perf_counter()
                published.append(ray.get(publisher.publish.remote(config, hub, version)))
                loading = time.perf_counter()
                ray.get(worker.load.remote(version))
                loaded.append(time.perf_counter() - loading)
                time.sleep(STREAM_S / 5)  # the group after the update
                gaps.append(stream.longest_gap(begun, loading + loaded[-1]))
    seconds = [f"{value:.2f}" for value in (np.median(published), np.median(loaded), before, max(gaps))]
    kept = sum(warm.values()) - sum(idle.values())
    memory_mib = [f"{used / MIB:.0f}" for used in (kept, *(memory.peaks[role] for role in (*ROLES, "sum")))]
    return [f"{size / MIB:.0f}", *seconds, *memory_mib, f"{memory.peaks['sum'] / size:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=("tiny", "random"), default=["tiny", "random"])
    parser.add_argument("--channels", nargs="+", choices=("ray", "disk"), default=["ray", "disk"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the random policy")
    parser.add_argument("--chunk-mb", type=int, help="weights.chunk_mb; default: the config's")
    parser.add_argument("--publishes", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of each response of the stream")
    options = parser.parse_args()
    table = Table(title="One publish: medians of the seconds, peaks of the memory")
    columns = ("model", "channel", "weights MiB", "publish s", "load s", "gap before s", "gap s")
    for column in (*columns, "kept MiB", *(f"{role} MiB" for role in ROLES), "sum MiB", "copies"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="sppo-publish-") as temporary:
        scratch = Path(temporary)
        folders = {"tiny": ASSETS / "policy", "random": scratch / "random"}
        if "random" in options.models:
            random_policy(folders["random"], getattr(torch, options.dtype))
        for model, channel in itertools.product(options.models, options.channels):
            table.add_row(model, channel, *measure(scratch, folders[model], channel, options))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
