"""One whole job in virtual time: the real schedule and buffer, a ledger in a temporary folder, fakes for the rest."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sppo_ray.buffer_service import BufferService
from sppo_ray.config import Config
from sppo_ray.protocols import Handle, System
from sppo_ray.schedules import asynchronous, synchronous
from sppo_ray.simulation.clock import inline, run_virtual
from sppo_ray.simulation.gpu import Gpu, Queue
from sppo_ray.simulation.learner import Learner
from sppo_ray.simulation.rates import RateCard
from sppo_ray.simulation.workers import JudgePool, RolloutPool, RolloutWorker
from sppo_ray.simulation.workload import RESPONSE_TOKENS, make_workload
from sppo_ray.types import Receipt, SliceSummary, Ticket, TrainedIteration


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run gave. Shares are of worker-seconds over the whole run; with `idle` they add up to 1."""

    groups: int
    seconds: float
    rollout: dict[str, float]  # sampling, updating, idle
    judge: dict[str, float]  # judging, idle
    learner: dict[str, float]  # training, publishing (saving and taking turns too), idle
    fill_s: float  # until the first update
    staleness: dict[int, int]  # groups trained by staleness
    resampled: int
    trained_once: bool  # every group of the run was trained on exactly once

    @property
    def groups_per_s(self) -> float:
        return self.groups / self.seconds


def simulate(
    config: Config,
    prompts: Sequence[int],
    card: RateCard | None = None,
    quantiles: Sequence[float] = RESPONSE_TOKENS,
    seed: int = 0,
) -> Outcome:
    """prompts: of each iteration. config: its run.dir and objective.mismatch_groups are not used. The comparison with the
    learner's log-probabilities and the evaluation take no time."""
    with tempfile.TemporaryDirectory(prefix="sppo-simulation-") as folder:
        run = config.run.model_copy(update={"dir": folder})
        schedule = config.schedule.model_copy(update={"iterations": len(prompts)})
        objective = config.objective.model_copy(update={"mismatch_groups": 0})
        made = config.model_copy(update={"run": run, "objective": objective, "schedule": schedule})
        return run_virtual(_run(made, prompts, card or RateCard(), quantiles, seed))


async def _run(
    config: Config, prompts: Sequence[int], card: RateCard, quantiles: Sequence[float], seed: int
) -> Outcome:  # fmt: skip
    rollout, learner = config.rollout, config.learner
    epochs = learner.epochs if config.schedule.mode == "async" and config.schedule.batch_order == "ready" else 1
    work = make_workload(
        prompts, rollout.responses_per_prompt, rollout.max_new_tokens, quantiles, seed, epochs
    )  # fmt: skip
    gpus = [Gpu() for _ in range(rollout.num_workers)]
    workers = rollout.num_workers + learner.num_workers + config.judge.num_workers
    beside = config.cluster.layout == "colocated" or 0 < config.cluster.gpus < workers
    rollouts = [RolloutWorker(f"rollout-{n}", gpu, card, config) for n, gpu in enumerate(gpus)]
    queues = [Queue(gpus[n] if beside else Gpu()) for n in range(config.judge.num_workers)]
    service = BufferService(config, [[p.prompt_id for p in part] for part in work.prompts], inline)
    pool, judges = RolloutPool(config, card, rollouts, work), JudgePool(config, card, queues)
    trainer = Learner(config, card, service, lambda version: setattr(pool, "hub", version))
    buffer = _Buffer(service)
    system = System(pool, judges, buffer, trainer, _Nobody())
    loop = asyncio.get_running_loop()
    learning = asyncio.create_task(trainer.learn())
    schedule = asynchronous if config.schedule.mode == "async" else synchronous
    await schedule.run(system, work.prompts, config, _Nobody())
    seconds = loop.time()
    await learning
    expected = Counter({(t, p.prompt_id): learner.epochs for t, part in enumerate(work.prompts, 1) for p in part})
    sampling = sum(worker.engine.busy for worker in rollouts)
    updating = sum(worker.updating_s for worker in rollouts)
    return Outcome(
        groups=sum(trainer.trained.values()),
        seconds=seconds,
        rollout=_shares({"sampling": sampling, "updating": updating}, seconds * len(rollouts)),
        judge=_shares({"judging": sum(queue.busy for queue in queues)}, seconds * len(queues)),
        learner=_shares({"training": trainer.training_s, "publishing": trainer.publishing_s}, seconds),
        fill_s=trainer.first_step_at or 0.0,
        staleness=dict(sorted(trainer.staleness.items())),
        resampled=buffer.resampled,
        trained_once=trainer.trained == expected,
    )


def _shares(seconds: dict[str, float], total: float) -> dict[str, float]:
    found = {name: value / total for name, value in seconds.items()}
    return found | {"idle": 1.0 - sum(found.values())}


class _Buffer:
    """The service as a schedule sees it: groups come as handles."""

    def __init__(self, service: BufferService) -> None:
        self._service = service
        self.resampled = 0

    async def admit(self, room: int) -> list[Ticket]:
        tickets = await self._service.admit(room)
        self.resampled += sum(ticket.resamples > 0 for ticket in tickets)
        return tickets

    async def add(self, judged: Handle) -> None:
        await self._service.add([judged.ref])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service, name)


class _Nobody:
    """Evaluates nothing, watches nothing."""

    async def evaluate(self, iteration: int) -> None: ...

    def sampling(self, iteration: int, total: int, held: int) -> None: ...

    def sampled(self, receipt: Receipt) -> None: ...

    def judged(self, receipt: Receipt) -> None: ...

    def sealed(self, summary: SliceSummary) -> None: ...

    def trained(self, trained: TrainedIteration) -> None: ...

    def alarm(self, text: str) -> None: ...
