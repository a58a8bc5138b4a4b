"""Checkpoints of the training engine, on one rank of a plain process group; started by test_learner_checkpoint.py.

    python learner_checkpoint_probe.py POLICY OUT RANK WORLD

On two ranks: epochs, uninterrupted and taken up from a checkpoint after their first update. On other numbers: one of these
checkpoints, taken up at other stages too. Leaves weights as learner_probe.py does, and OUT/<name> state.safetensors.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from learner_async_probe import stale_tasks
from learner_factory import config_for, tasks
from learner_probe import Probe
from safetensors.torch import save_file

from actors.checkpoint import Checkpoints
from actors.ranks import Ranks
from actors.trainer_engine import TrainingEngine
from sppo_ray.config import Config
from sppo_ray.storage import Storage
from sppo_ray.types import ResumePoint, TrainTask

SHARED = "shared 3"  # the checkpoint that other numbers of ranks take up


def _unheard(ranks: Ranks, step: int, folder: Path) -> None: ...


class CheckpointProbe(Probe):
    def checkpoint(self, name: str, epoch: Sequence[TrainTask], **settings: Any) -> None:
        config = config_for(self.out / name, self.policy, **settings)
        first, *others = epoch
        going_on = self.engine(config)
        going_on.step(first)
        reported: list[tuple[int, Path]] = []
        checkpoints = Checkpoints(
            config, self.ranks, going_on.state, Storage(), lambda _, step, folder: reported.append((step, folder))
        )
        checkpoints.save(first)
        checkpoints.save(first)  # waits for the one before: now that is on disk
        assert reported == [(1, Path(config.run.dir) / "checkpoints" / "learner" / "step-1")]  # on every rank
        checkpoints._wait()
        resumed = self.taken_up(config)
        for engine, suffix in ((going_on, "going on"), (resumed, "resumed")):
            for task in others:
                engine.step(task)
            self.keep(f"{name} {suffix}", engine)

    def taken_up(self, config: Config) -> TrainingEngine:
        engine = self.engine(config)
        checkpoints = Checkpoints(config, self.ranks, engine.state, Storage(), _unheard)
        assert checkpoints.resume(ResumePoint(0, str(self.policy))) == 1
        return engine

    def elsewhere(self, name: str, **settings: Any) -> None:
        """On this number of ranks and at this stage: the state as taken up, and the epoch's end."""
        if self.ranks.first:
            shutil.copytree(self.out.parent / "world-2" / SHARED, self.out / name)
        self.ranks.barrier()
        engine = self.taken_up(config_for(self.out / name, self.policy, **settings))
        state = dict(engine.state.gather())
        if self.ranks.first:
            save_file(state, self.out / f"{name} state.safetensors")
        for task in tasks()[1:]:
            engine.step(task)
        self.keep(f"{name} resumed", engine)


def main(policy: Path, out: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    probe = CheckpointProbe(policy, out, Ranks.join(b"of the test"))
    if world == 2:
        probe.checkpoint(SHARED, tasks(), zero_stage=3, optimizer="adamw")
        for stage in (0, 2, 3):
            probe.checkpoint(f"rmsprop {stage}", tasks(), zero_stage=stage)
        half = {"dtype": "bfloat16", "saved": "bfloat16"}
        probe.checkpoint("adamw 0", tasks(), zero_stage=0, optimizer="adamw", **half)
        for stage in (2, 3):
            frozen = {"mode": "async", "objective": {"reference": "snapshot"}}
            probe.checkpoint(f"snapshot {stage}", stale_tasks(), zero_stage=stage, **half, **frozen)
    else:
        for stage in (0,) if world == 1 else (2, 3):
            probe.elsewhere(f"from two {stage}", zero_stage=stage, optimizer="adamw")
    (out / "results.json").write_text(json.dumps(probe.results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
