"""Runs the training engine on one rank of a plain process group, through several scenarios; started by test_learner.py.

    python learner_probe.py POLICY OUT RANK WORLD

Each scenario leaves OUT/<name>.safetensors (weights afterwards) or an entry in OUT/results.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learner_factory import config_for, examples, scripted_task, tasks
from safetensors.torch import save_file

from actors import trainer_engine
from actors.policy_folder import write_policy
from actors.ranks import Ranks
from actors.trainer_engine import TrainingEngine
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError
from sppo_ray.types import PublishTask, ReferenceTask, SaveTask, StopTask, TrainTask


class Probe:
    def __init__(self, policy: Path, out: Path, ranks: Ranks) -> None:
        self.policy, self.out, self.ranks = policy, out, ranks
        self.results: dict[str, Any] = {}

    def config(self, **settings: Any) -> Config:
        return config_for(self.out, self.policy, **settings)

    def engine(self, config: Config, policy: Path | None = None) -> TrainingEngine:
        return TrainingEngine(config, str(policy or self.policy), self.ranks)

    def keep(self, name: str, engine: TrainingEngine) -> None:
        state = dict(engine.consolidated_state())
        if self.ranks.first:
            save_file(state, self.out / f"{name}.safetensors")

    def save_folder(self, engine: TrainingEngine, name: str) -> Path:
        folder, state = self.out / name, engine.consolidated_state()
        if self.ranks.first:
            write_policy(folder, str(self.policy), engine.config.policy.dtype, state)
        else:
            assert list(state) == []
        dist.barrier()
        return folder

    # Scenarios.

    def epoch(self, name: str, **settings: Any) -> None:
        """Reference log-probabilities, then three updates; the last on a smaller batch."""
        engine = self.engine(self.config(**settings))
        self.results[f"{name} reference"] = engine.reference(examples(9))
        self.results[f"{name} metrics"] = [engine.step(task) for task in tasks()]
        self.keep(name, engine)

    def turns(self, name: str, **settings: Any) -> None:
        """Offloaded and reloaded before every update, as where rollouts share the GPU."""
        engine = TrainingEngine(self.config(**settings), str(self.policy), self.ranks, takes_turns=True)
        for task in tasks():
            engine.offload()
            engine.reload()
            engine.step(task)
        self.keep(name, engine)

    def restart(self, name: str, **settings: Any) -> None:
        """A second iteration, with the same engine and with one that starts from the saved folder."""
        config = self.config(**settings)
        going_on = self.engine(config)
        for task in tasks():
            going_on.step(task)
        folder = self.save_folder(going_on, f"{name} folder")
        resumed = self.engine(config, folder)
        for engine, suffix in ((going_on, "going on"), (resumed, "resumed")):
            self.results[f"{name} {suffix}"] = engine.reference(examples(5))
            for task in tasks(iteration=2, first_step=3):
                engine.step(task)
            self.keep(f"{name} {suffix}", engine)

    def script(self, name: str, **settings: Any) -> None:
        """The run that the Ray test makes, without Ray and without interruption."""
        engine = self.engine(self.config(**settings))
        step, saved, references, published = 0, 0, {}, 0
        while True:
            match scripted_task(step, saved, references, published):
                case ReferenceTask(iteration, rows):
                    references[iteration] = engine.reference(rows)
                case TrainTask() as task:
                    engine.step(task)
                    step += 1
                case PublishTask(version=published):
                    self.keep(f"{name} version {published}", engine)
                case SaveTask(version=published):
                    self.keep(f"{name} version {published}", engine)
                    saved += 1
                case StopTask():
                    return

    def not_finite(self, name: str, reference: str, **settings: Any) -> None:
        """One prompt's reference log-probability is such that every rank must say which."""
        engine = self.engine(self.config(**settings))
        task = tasks()[0]
        bad = replace(task.examples[4], prompt_id="the-bad-one", reference_logps=(float(reference), -1.0))
        self.refused(name, engine, replace(task, examples=(*task.examples[:4], bad, *task.examples[5:])))
        self.keep(name, engine)

    def gradient_not_finite(self, name: str, **settings: Any) -> None:
        engine = self.engine(self.config(**settings))
        next(engine.engine.parameters()).register_hook(lambda gradient: gradient * float("inf"))
        self.refused(name, engine, tasks()[0])

    def refused(self, name: str, engine: TrainingEngine, task: TrainTask) -> None:
        message = "no error"
        try:
            engine.step(task)
        except LearnerError as error:
            message = str(error)
        self.results[name] = self.ranks.gather(message)


def plain_sgd(config: Config, parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Makes weights a linear function of gradients, so that comparing one compares the other."""
    return torch.optim.SGD(parameters, lr=config.learner.learning_rate)


def main(policy: Path, out: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    probe = Probe(policy, out, Ranks.join(b"of the test"))
    rmsprop = trainer_engine.build_optimizer
    for stage in (0, 2, 3):
        trainer_engine.build_optimizer = plain_sgd
        probe.epoch(f"sgd {stage}", zero_stage=stage, gradient_checkpointing=stage == 3)
        probe.epoch(f"clipped {stage}", zero_stage=stage, max_grad_norm=0.5, learning_rate=1.0)
        trainer_engine.build_optimizer = rmsprop
        probe.epoch(f"rmsprop {stage}", zero_stage=stage)
    if world > 1:
        probe.epoch("adamw 3", zero_stage=3, optimizer="adamw")
        for stage in (0, 2, 3):
            probe.restart(f"restart bf16 {stage}", zero_stage=stage, dtype="bfloat16", saved="bfloat16")
        probe.restart("restart rounding 3", zero_stage=3, dtype="float32", saved="bfloat16")
        probe.turns("turns 3", zero_stage=3)
        probe.script("script", zero_stage=3)
        for reference in ("nan", "inf", "-inf"):
            probe.not_finite(f"not finite {reference}", reference, zero_stage=3)
        for stage in (0, 3):
            probe.gradient_not_finite(f"gradient not finite {stage}", zero_stage=stage)
    if rank == 0:
        (out / "results.json").write_text(json.dumps(probe.results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
