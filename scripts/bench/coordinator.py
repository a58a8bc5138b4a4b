"""How many groups a second the coordinating parts can carry, and whether their memory stays flat. No Ray, real time.

    python scripts/bench/coordinator.py --groups 200000

The real asynchronous schedule, admission, buffer service and ledger (parquet on disk, every shard and every batch synced),
between workers that answer at once: 256 rollout workers, a judge and a learner that do nothing. All runs in one process on
one event loop; in a job the driver and the buffer actor are two. The same tasks with nothing behind them (no-op) are the
most that asyncio alone could carry here.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from sppo_ray.buffer_service import BufferService
from sppo_ray.config import Config
from sppo_ray.config_io import build_config
from sppo_ray.protocols import Handle, System
from sppo_ray.schedules import asynchronous
from sppo_ray.schedules.supervision import InFlight
from sppo_ray.types import (
    JudgedGroup,
    Prompt,
    Publication,
    PublishTask,
    Receipt,
    Response,
    ResponseGroup,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainTask,
)

K, WORKERS, TOKENS = 5, 256, 16
MARKS = (0, 10_000, 100_000, 1_000_000)  # groups at which memory is read


class Slice(Sequence[Prompt]):
    """Prompts made when asked for, so that what is measured is the coordinator's memory and not the prompts'."""

    def __init__(self, iteration: int, size: int) -> None:
        self.iteration, self.size = iteration, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        name = f"{self.iteration}-{index}"
        return Prompt(name, "a prompt", "<s>a prompt", np.arange(8, dtype=np.int32))


@dataclass
class Memory:
    """Resident MiB of this process at the marks, and at the end of each slice."""

    at: dict[int, float] = field(default_factory=dict)
    groups: int = 0

    def quarters(self) -> list[tuple[str, list[float]]]:
        """Of the run: the readings at the slices' ends, which come in waves."""
        ends = [resident for groups, resident in self.at.items() if groups not in (0, *MARKS)]
        bounds = np.linspace(0, len(ends), 5).astype(int)
        names = ("first", "second", "third", "last")
        return [(name, ends[a:b]) for name, a, b in zip(names, bounds, bounds[1:], strict=False) if b > a]

    def read(self) -> None:
        self.at[self.groups] = psutil.Process().memory_info().rss / 2**20


class Idle:
    """Rollout workers, judge, learner, evaluator and watch in one: all answer at once."""

    def __init__(self, config: Config, buffer: BufferService) -> None:
        self.config, self.buffer, self.memory = config, buffer, Memory()
        self.slots = WORKERS * config.rollout.in_flight
        self.version, self._next = 0, 0
        rng = np.random.default_rng(0)
        self._logits = rng.normal(size=(64, K, K)).astype(np.float32)
        self._responses = [tuple(_response(rng, k) for k in range(K)) for _ in range(64)]

    async def generate(self, prompt: Prompt, sampling: Any, iteration: int, epoch: int, protected: bool) -> Handle:
        self._next = (self._next + 1) % (WORKERS * 64)
        worker = f"rollout-{self._next % WORKERS}"
        group = ResponseGroup(prompt, iteration, self._responses[self._next % 64], self.version, self.version, worker)
        receipt = Receipt(prompt.prompt_id, worker, K * TOKENS, 0, self.version, iteration, epoch)
        return Handle(group, receipt)

    async def judge(self, handle: Handle) -> Handle:
        logits = self._logits[self._next % 64]
        return Handle(JudgedGroup(handle.ref, logits, "judge-0"), handle.receipt)

    async def add(self, handle: Handle) -> None:
        await self.buffer.add([handle.ref])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)  # what the schedule calls of the buffer beside `add`

    async def load(self, version: int) -> dict[str, Any]:
        self.version = version
        return {}

    async def evaluate(self, iteration: int) -> None: ...

    def sampled(self, receipt: Receipt) -> None: ...

    def judged(self, receipt: Receipt) -> None:
        self.memory.groups += 1
        if self.memory.groups in MARKS:
            self.memory.read()

    def sealed(self, summary: Any) -> None: ...

    def trained(self, trained: Any) -> None:
        self.memory.read()

    async def learn(self) -> None:
        step = 0
        while True:
            task = await self.buffer.next_task(step)
            match task:
                case TrainTask(iteration=t):
                    step += 1
                    await self.buffer.record_step({"step": step, "iteration": t, "loss": 0.0})
                case PublishTask(iteration=t, version=version):
                    await self.buffer.published(Publication(version, step, t, False, "", 0.0))
                case SaveTask(iteration=t, version=version):
                    trained = TrainedIteration(t, version, step, "", "policy")
                    await self.buffer.saved(trained, Publication(version, step, t, True, "", 0.0))
                case StopTask():
                    return


def _response(rng: np.random.Generator, k: int) -> Response:
    tokens = rng.integers(0, 32_000, TOKENS).astype(np.int32)
    logprobs = -rng.random(TOKENS).astype(np.float32)
    return Response(tokens, "a short response", "stop", float(logprobs.sum()), logprobs, seed=k)


@dataclass(frozen=True)
class Timing:
    """Of this process: seconds by the clock, and of CPU time (the clock also counts what else the machine does)."""

    wall: float
    cpu: float

    @classmethod
    def since(cls, began: Timing) -> Timing:
        now = cls.now()
        return cls(now.wall - began.wall, now.cpu - began.cpu)

    @classmethod
    def now(cls) -> Timing:
        return cls(time.perf_counter(), time.process_time())


async def carry(config: Config, slices: Sequence[Slice]) -> tuple[Timing, Memory]:
    """A whole run."""
    buffer = BufferService(config, [[f"{part.iteration}-{n}" for n in range(len(part))] for part in slices])
    parts = Idle(config, buffer)
    system = System(parts, parts, parts, parts.buffer, parts)
    parts.memory.read()
    began = Timing.now()
    learning = asyncio.create_task(parts.learn())
    await asynchronous.run(system, slices, config, parts)
    await learning
    return Timing.since(began), parts.memory


async def no_op(groups: int) -> Timing:
    """As many tasks that wait three times for nothing."""

    async def one() -> None:
        for _ in range(3):
            await asyncio.sleep(0)

    began = Timing.now()
    async with InFlight() as tasks:
        while groups:
            room = min(groups, await tasks.room(lambda: WORKERS * 16))
            for _ in range(room):
                tasks.start(one())
            groups -= room
    return Timing.since(began)


def configured(run_dir: str, slices: int) -> Config:
    return build_config(
        {
            "run": {"dir": run_dir},
            "schedule": {"mode": "async", "iterations": slices, "max_staleness": 4},
            "data": {"prompts": "none"},
            "policy": {"model": "none", "dtype": "float32"},
            "rollout": {"num_workers": WORKERS, "responses_per_prompt": K, "in_flight": 16},
            "learner": {"batch_size": 1024, "schedule_epochs": None},
            "weights": {"publish_every": 4},
            "buffer": {"shard_groups": 1024, "flush_s": 0.2},
        }
    )


def table(groups: int, took: Timing, idle: Timing, memory: Memory) -> Table:
    made = Table(
        title=f"{groups:,} groups of {K} responses, {WORKERS} workers that answer at once", title_justify="left"
    )
    made.add_column("what")
    made.add_column("", justify="right")
    made.add_row("groups/s", f"{groups / took.wall:,.0f}")
    made.add_row("groups per second of CPU time", f"{groups / took.cpu:,.0f}")
    made.add_row("no-op tasks per second of CPU time", f"{groups / idle.cpu:,.0f}")
    made.add_row("ratio to no-op, CPU time", f"{idle.cpu / took.cpu:.1%}")
    for mark in MARKS:
        if mark in memory.at:
            made.add_row(f"resident MiB at {mark:,} groups", f"{memory.at[mark]:,.0f}")
    for name, readings in memory.quarters():
        made.add_row(f"resident MiB at slices' ends, {name} quarter", f"{min(readings):,.0f} to {max(readings):,.0f}")
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, default=200_000)
    parser.add_argument("--slice", type=int, default=20_000, help="prompts of an iteration")
    parser.add_argument("--dir", type=Path, default=None, help="where the run directory is made (and removed)")
    options = parser.parse_args()
    sizes = [options.slice] * (options.groups // options.slice) + [options.groups % options.slice]
    slices = [Slice(t, size) for t, size in enumerate(filter(None, sizes), start=1)]
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        asyncio.run(carry(configured(f"{folder}/warm-up", 1), [Slice(1, 2_000)]))  # imports, pools
        took, memory = asyncio.run(carry(configured(f"{folder}/run", len(slices)), slices))
    Console(width=100).print(table(options.groups, took, asyncio.run(no_op(options.groups)), memory))


if __name__ == "__main__":
    main()
