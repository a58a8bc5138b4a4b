"""Workers that join and leave while others work: a newcomer serves the current weights first, nothing running is lost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from serving_factory import Serving, dead, start_worker

from actors import fleet as fleet_module
from actors.fleet import Fleet
from actors.pool import JudgePool, RolloutPool
from actors.stacks import Place, here
from actors.weights import WeightsHub
from sppo_ray.atomic import write_json
from sppo_ray.config import Config
from sppo_ray.scaling import FILE, Desired
from sppo_ray.types import Prompt, Receipt, Sampling
from sppo_ray.weight_chunks import WeightChunk
from tests.actors.job_runs import wait_for

pytestmark = pytest.mark.timeout(900)  # with the start of the engines that all tests share, and of one more
GREEDY = Sampling(0.0, 1.0, 32, (0,))
PROMPT = Prompt("p", "text", "templated", np.zeros(3, np.int32))


def stub(name: str, broken: bool = False, hold: bool = False) -> Any:
    """A worker of either role that remembers its calls. broken: it cannot start; hold: it does not answer a ping until
    `release`."""

    class Stub:
        def __init__(self) -> None:
            if broken:
                raise ValueError("no such model")
            self.calls: list[str] = []
            self.free = asyncio.Event()
            if not hold:
                self.free.set()

        async def ping(self) -> Place:
            self.calls.append("ping")
            await self.free.wait()
            return here()

        async def release(self) -> None:
            self.free.set()

        async def load(self, version: int) -> str:
            self.calls.append(f"load {version}")
            return f"checksum {version}"

        async def generate(self, prompt: Any, sampling: Any, iteration: int, epoch: int, protected: bool) -> Any:
            self.calls.append("generate")
            await asyncio.sleep(0.05)
            return name, Receipt(prompt.prompt_id, name, 1, 0, 0)

        async def stats(self) -> list[str]:
            return self.calls

        async def shutdown(self) -> None: ...

    wait_for(lambda: free(name), timeout=300)
    options = {"num_cpus": 0.01, "max_concurrency": 100, "name": name, "namespace": "stubs"}
    return ray.remote(Stub).options(**options).remote()


def free(name: str) -> bool:
    """Ray frees a stub's name a moment after it was killed."""
    try:
        ray.get_actor(name, namespace="stubs")
    except ValueError:
        return True
    return False


def publish(hub: Any, version: int) -> None:
    ray.get(hub.begin.remote(version))
    ray.get(hub.put_chunk.remote(version, 0, WeightChunk((), (), (), np.zeros(0, np.uint8))))
    ray.get(hub.commit.remote(version, f"checksum {version}", 1))


class Bench:
    """A fleet over stubs, one of each role, with version 1 published."""

    def __init__(self, config: Config) -> None:
        self.hub = ray.remote(WeightsHub).options(num_cpus=0).remote(config)
        publish(self.hub, 1)
        self.actors = {name: stub(name) for name in ("rollout-0", "judge-0")}
        self.rollout = RolloutPool(config, {"rollout-0": self.actors["rollout-0"]}, self.hub, all_at_once=False)
        self.judge = JudgePool(config, {"judge-0": self.actors["judge-0"]})
        self.behaviour: dict[str, dict[str, Any]] = {}  # of newcomers, by name
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.fleet = Fleet(config, self.rollout, self.judge, self._create, self._record, self.said.append)

    def _create(self, role: str, name: str) -> Any:
        self.actors[name] = stub(name, **self.behaviour.get(name, {}))
        return self.actors[name]

    async def _record(self, line: Any) -> None:
        self.lines.append(dict(line))

    def end(self) -> None:
        for actor in (self.hub, *self.actors.values()):
            ray.kill(actor)


@pytest.fixture
def bench(ray_local: None, actor_config: Config, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(actor_config.model_copy(update={"run": actor_config.run.model_copy(update={"dir": str(tmp_path)})}))
    yield bench
    bench.end()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not true():
            await asyncio.sleep(0.05)


async def test_a_file_server_that_hangs_does_not_hold_up_the_driver(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, back, held_up = threading.Event(), threading.Event(), list[bool]()

    def hangs(*_: object) -> None:
        asked.set()
        held_up.append(not back.wait(30))

    monkeypatch.setattr(fleet_module, "desired", hangs)
    following = asyncio.create_task(bench.fleet.follow())
    await until(asked.is_set)
    back.set()
    await until(lambda: bool(held_up))
    following.cancel()
    assert held_up[0] is False


async def test_the_driver_follows_the_file(bench: Bench, tmp_path: Path) -> None:
    following = asyncio.create_task(bench.fleet.follow())
    write_json(tmp_path / FILE, {"rollout": 3, "judge": 2, "at": "one"})
    await until(lambda: len(bench.lines) == 3)
    assert sorted(bench.rollout.names) == ["rollout-0", "rollout-1", "rollout-2"]
    assert bench.judge.names == ["judge-0", "judge-1"]
    await bench.judge.ready()

    (tmp_path / FILE).write_text("three")
    await until(lambda: any("stay as they are" in text for text in bench.said))
    write_json(tmp_path / FILE, {"rollout": 1, "judge": 1, "at": "two"})
    await until(lambda: len(bench.lines) == 6)
    assert (bench.rollout.names, bench.judge.names) == (["rollout-0"], ["judge-0"])
    await dead(bench.actors["rollout-2"])

    assert {(line["event"], line["iteration"]) for line in bench.lines} == {("scale", 0)}
    rollouts, judges = ([line["workers"] for line in bench.lines if line["role"] == r] for r in ("rollout", "judge"))
    assert (len(rollouts), rollouts[1], rollouts[3]) == (4, 3, 1)  # two that join at once may count each other
    assert judges == [2, 1]
    assert "judge-1 joins: 2 judge workers" in bench.said
    assert not following.done()
    following.cancel()


async def test_a_newcomer_loads_what_was_published_while_it_started(bench: Bench) -> None:
    bench.behaviour["rollout-1"] = {"hold": True}
    scaling = asyncio.create_task(bench.fleet.scale(Desired(rollout=2, judge=1)))
    await until(lambda: "rollout-1" in bench.actors)
    publish(bench.hub, 2)
    assert list(await bench.rollout.load(2)) == ["rollout-0"]  # an update does not wait for who only starts
    assert (await bench.rollout.generate(PROMPT, GREEDY, 1)).receipt.worker == "rollout-0"
    await bench.actors["rollout-1"].release.remote()
    await scaling
    handles = await asyncio.gather(*(bench.rollout.generate(PROMPT, GREEDY, 1) for _ in range(2)))
    assert {handle.receipt.worker for handle in handles} == {"rollout-0", "rollout-1"}
    assert await bench.actors["rollout-1"].stats.remote() == ["ping", "load 2", "generate"]


@pytest.mark.parametrize(
    ("behaviour", "limit_s", "reason"),
    [({"broken": True}, 300.0, "no such model"), ({"hold": True}, 3.0, "did not serve within 3 s")],
)
async def test_a_newcomer_that_cannot_start_ends_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, behaviour: dict[str, Any], limit_s: float, reason: str
) -> None:
    monkeypatch.setattr(fleet_module, "START_LIMIT_S", limit_s)
    bench.behaviour["rollout-1"] = behaviour
    await bench.fleet.scale(Desired(rollout=2, judge=1))
    (text,) = bench.said
    assert text.startswith("rollout-1 could not join")
    assert reason in text
    assert bench.lines == []
    assert bench.rollout.names == ["rollout-0"]
    assert (await bench.rollout.generate(PROMPT, GREEDY, 1)).receipt.worker == "rollout-0"
    monkeypatch.undo()
    del bench.behaviour["rollout-1"]
    await bench.fleet.scale(Desired(rollout=2, judge=1))  # asked for again, under the same name
    assert bench.rollout.names == ["rollout-0", "rollout-1"]


async def test_a_worker_that_is_gone_for_good_is_not_counted(bench: Bench) -> None:
    """It can be asked for again, and is never kept in place of one that works."""
    await bench.fleet.scale(Desired(rollout=2, judge=1))
    ray.kill(bench.actors["rollout-0"])  # this pool starts none again
    await until(lambda: free("rollout-0"))
    await asyncio.gather(*(bench.rollout.generate(PROMPT, GREEDY, 1) for _ in range(2)))
    assert bench.rollout.names == ["rollout-1"]
    await bench.fleet.scale(Desired(rollout=1, judge=1))  # as it is
    assert (await bench.rollout.generate(PROMPT, GREEDY, 1)).receipt.worker == "rollout-1"
    await bench.fleet.scale(Desired(rollout=2, judge=1))
    assert sorted(bench.rollout.names) == ["rollout-0", "rollout-1"]
    handles = await asyncio.gather(*(bench.rollout.generate(PROMPT, GREEDY, 1) for _ in range(2)))
    assert {handle.receipt.worker for handle in handles} == {"rollout-0", "rollout-1"}
    assert set(await bench.rollout.load(1)) == {"rollout-0", "rollout-1"}


async def test_a_real_worker_joins_with_the_current_weights_and_leaves_without_a_trace(
    serving: Serving, base_weights: dict[str, torch.Tensor], prompts: list[Prompt], policy: Path
) -> None:
    generator = torch.Generator().manual_seed(9)
    changed = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in base_weights.items()}
    checksum = serving.publish(changed)
    pool = serving.pool()
    await pool.load(serving.version)
    judge_stub = stub("judge-0")
    lines: list[Any] = []

    async def record(line: Any) -> None:
        lines.append(line)

    def create(role: str, name: str) -> Any:
        return start_worker(name, serving.config, policy, 0)  # from the base policy, as at the start of the run

    fleet = Fleet(serving.config, pool, JudgePool(serving.config, {"judge-0": judge_stub}), create, record, print)

    async def answer(prompt: Prompt) -> tuple[str, int, str, list[int]]:
        """Worker, version, prompt and tokens of a greedy response."""
        handle = await pool.generate(prompt, GREEDY, 1)
        ids = (await handle.ref).responses[0].token_ids.tolist()
        return handle.receipt.worker, handle.receipt.version, prompt.prompt_id, ids

    joining = asyncio.create_task(fleet.scale(Desired(rollout=3, judge=1)))
    answers = []
    while not joining.done():  # the others work on
        answers += await asyncio.gather(*map(answer, prompts))
    await joining
    answers += await asyncio.gather(*map(answer, prompts))
    assert {worker for worker, *_ in answers} == {"rollout-0", "rollout-1", "rollout-2"}
    assert {version for _, version, *_ in answers} == {serving.version}
    assert len({(name, tuple(ids)) for *_, name, ids in answers}) == len(prompts)  # one answer to each, whoever gave it
    newcomer = (await pool.stats())["rollout-2"]
    assert (newcomer["version"], newcomer["checksum"]) == (serving.version, checksum)

    process = psutil.Process(newcomer["pid"])
    running = [asyncio.create_task(pool.generate(p, Sampling(1.0, 1.0, 100, (0, 50)), 1)) for p in prompts]
    await asyncio.sleep(0.1)
    await fleet.scale(Desired(rollout=2, judge=1))
    assert pool.names == ["rollout-0", "rollout-1"]
    groups = [await (await task).ref for task in running]
    assert "rollout-2" in {group.worker for group in groups}  # what it had begun was finished, not made again
    _, alive = psutil.wait_procs([process], timeout=120)
    assert not alive
    assert [line["workers"] for line in lines] == [3, 2]
    ray.kill(judge_stub)
