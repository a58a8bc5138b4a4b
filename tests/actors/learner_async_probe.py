"""Runs the training engine as async self-play does, on one rank of a plain process group; started by test_learner_async.py.

    python learner_async_probe.py POLICY OUT RANK WORLD

Leaves weights and OUT/results.json as learner_probe.py does, and the probes in OUT/probes.pkl.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learner_factory import examples, tasks
from learner_probe import Probe

from actors.ranks import Ranks
from actors.trainer_engine import TrainingEngine
from sppo_ray.errors import LearnerError
from sppo_ray.types import TrainingExample, TrainTask


def stale(examples: Sequence[TrainingExample]) -> tuple[TrainingExample, ...]:
    """0, 1, 2, 0, 1, ... versions old, and without reference log-probabilities."""
    return tuple(replace(e, reference_logps=None, staleness=i % 3) for i, e in enumerate(examples))


def stale_tasks() -> list[TrainTask]:
    return [replace(task, examples=stale(task.examples)) for task in tasks()]


def local_weights(engine: TrainingEngine) -> list[torch.Tensor]:
    engine.engine.empty_partition_cache()
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.engine.module.parameters()]


class AsyncProbe(Probe):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.probes: dict[str, Any] = {}

    def asynchronous(self, objective: Mapping[str, Any], **settings: Any) -> TrainingEngine:
        return self.engine(self.config(mode="async", objective=objective, **settings))

    # Scenarios.

    def beforehand(self, name: str, **settings: Any) -> None:
        """The whole epoch with references that were computed before its first update, batch by batch."""
        engine = self.engine(self.config(**settings))
        logps = [engine.reference(task.examples) for task in tasks()]
        for task, known in zip(stale_tasks(), logps, strict=True):
            with_reference = zip(task.examples, known, strict=True)
            engine.step(replace(task, examples=tuple(replace(e, reference_logps=v) for e, v in with_reference)))
        self.keep(name, engine)

    def snapshot(self, name: str, every: int | str, **settings: Any) -> None:
        """The same epoch against the frozen copy."""
        engine = self.asynchronous({"reference": "snapshot", "snapshot_every": every}, **settings)
        self.results[name] = [engine.step(task) for task in stale_tasks()]
        self.keep(name, engine)

    def no_snapshot(self, name: str, **settings: Any) -> None:
        """In the middle of a slice, after a resume that brought no copy."""
        engine = self.asynchronous({"reference": "snapshot"}, **settings)
        message = "no error"
        try:
            engine.step(stale_tasks()[1])
        except LearnerError as error:
            message = str(error)
        self.results[name] = self.ranks.gather(message)

    def behavior(self, name: str, **settings: Any) -> None:
        """What was recorded is what the policy itself says: its probe. Examples that would be cut are not in it."""
        engine = self.asynchronous({}, **settings)
        self.probes[name] = probe = engine.probe(examples(9))
        recorded = iter(probe.logprobs)
        whole = {tuple(ids) for ids in probe.prompt_ids}
        fitting = [e for e in examples(9) if tuple(e.prompt_ids) in whole]
        batch = tuple(replace(e, token_logprobs=(next(recorded), next(recorded))) for e in stale(fitting))
        self.results[name] = engine.step(TrainTask(0, 1, 0, 1, batch))

    def discounted(self, name: str, discount: float, **settings: Any) -> None:
        engine = self.asynchronous({"reference": "snapshot", "lag_discount": discount}, **settings)
        self.results[name] = engine.step(stale_tasks()[0])

    def rounding(self, name: str, **settings: Any) -> None:
        """Weights of more digits than are published: the probe is of the published ones, and the others stay."""
        engine = self.asynchronous({}, saved="bfloat16", **settings)
        before = local_weights(engine)
        self.probes[name] = engine.probe(examples(9))
        nothing = engine.probe([replace(e, prompt_ids=e.prompt_ids.repeat(40)) for e in examples(2)])
        same = [torch.equal(a, b) for a, b in zip(before, local_weights(engine), strict=True)]
        engine.round_weights()
        differ = [not torch.equal(a, b) for a, b in zip(before, local_weights(engine), strict=True)]
        self.results[name] = self.ranks.gather({"kept": all(same), "rounded": any(differ), "nothing": nothing is None})
        self.keep(name, engine)


def main(policy: Path, out: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    probe = AsyncProbe(policy, out, Ranks.join(b"of the test"))
    for stage in (0, 3) if world == 1 else (0, 2, 3):
        probe.beforehand(f"beforehand {stage}", zero_stage=stage)
        probe.snapshot(f"snapshot slice {stage}", "slice", zero_stage=stage)
        probe.snapshot(f"snapshot 2 {stage}", 2, zero_stage=stage)
        probe.behavior(f"behavior {stage}", zero_stage=stage)
    if world > 1:
        probe.discounted("discount 1", 1.0, zero_stage=3)
        probe.discounted("discount 0.5", 0.5, zero_stage=3)
        probe.no_snapshot("no snapshot", zero_stage=3)
        for stage in (2, 3):
            probe.rounding(f"rounding {stage}", zero_stage=stage)
    if rank == 0:
        (out / "results.json").write_text(json.dumps(probe.results))
        (out / "probes.pkl").write_bytes(pickle.dumps(probe.probes))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
