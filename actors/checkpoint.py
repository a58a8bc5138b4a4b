"""The learner's checkpoints within an iteration: its full state in safetensors, for any number of ranks at any ZeRO stage.

Made inside Ray Train's ranks, which Ray Train starts again after a failure, and reported to it (`train_reports`); the files are
`<run>/checkpoints/learner/step-<n>`. Whoever starts ranks, Ray Train or the next driver, takes the newest sound one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from actors.full_state import FullState
from actors.ranks import Ranks
from sppo_ray import __version__
from sppo_ray.checkpoints import clear, fits, new_checkpoint, newest
from sppo_ray.config import Config
from sppo_ray.storage import Storage, StorageError
from sppo_ray.types import ResumePoint, TrainTask

log = logging.getLogger(__name__)

SHARD_BYTES = 1 << 30


class Checkpoints:
    """Every method is collective. Rank 0 alone reads and writes files.

    Training stops only while the state is copied to the host of rank 0, which holds it until a thread has written it: one
    float32 copy of weights and optimizer states (RMSprop 8 bytes a parameter, AdamW 12) and a frozen reference if there
    is one. A checkpoint waits for the one before to be written, so there is never more than one copy.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        state: FullState,
        storage: Storage,
        saved: Callable[[Ranks, int, Path], None],
    ) -> None:
        """saved: hears, on every rank, of each checkpoint that is on disk when the next one is to be made: (ranks, its step,
        its folder)."""
        self._keep = config.learner.keep_checkpoints
        self._root = Path(config.run.dir) / "checkpoints" / "learner"
        self._storage = storage
        self._ranks, self._state, self._saved = ranks, state, saved
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[int] | None = None  # of its step

    def resume(self, start: ResumePoint) -> int:
        """The step to go on from: that of the newest undamaged checkpoint of the iteration that begins at `start`, whose
        state is then taken up; else the iteration's beginning."""
        self._ranks.way.at("looking for a checkpoint", limited=False)
        chosen = newest(self._root, lambda checkpoint: fits(checkpoint, start)) if self._ranks.first else None
        found = self._ranks.broadcast((chosen,))[0]
        if found is None:
            return start.step
        with ExitStack() as stack:
            files = sorted(found.folder.glob("*.safetensors")) if self._ranks.first else []
            shards = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            place = {key: shard for shard in shards for key in shard.keys()}  # noqa: SIM118 - not a mapping
            self._state.restore(dict(found.notes["layout"]), lambda key: place[key].get_tensor(key))
        return found.step

    def save(self, task: TrainTask) -> None:
        """After the update of `task`. Raises StorageError if the one before could not be written."""
        if (written := self._wait()) is not None:
            self._saved(self._ranks, written, self._root / f"step-{written}")
        notes = {
            "first_step": task.step - task.step_in_iteration,
            "iteration": task.iteration,
            "layout": self._state.layout(),
            "written_by": f"sppo-ray {__version__}, torch {torch.__version__}, {self._ranks.world} ranks",
            "time": time.time(),
        }
        shards = list(_shards(self._state.gather()))
        if self._ranks.first:
            self._writing = self._thread.submit(self._write, task.step + 1, notes, shards)

    def iteration_ended(self) -> None:
        """Its policy is saved: its checkpoints are needed no more."""
        self._wait()
        if self._ranks.first:
            try:
                clear(self._root)
            except OSError as error:  # nobody goes on from them, and the next iteration clears them too
                log.warning("old checkpoints in %s stay for now: %s", self._root, error)

    def _wait(self) -> int | None:
        """Until nothing is being written: the step of what was, on every rank. Raises StorageError if it could not be."""
        problem, step = "", None
        self._ranks.way.at("waiting for a checkpoint to be written", limited=False)
        if self._writing is not None:
            try:
                step = self._writing.result()
            except StorageError as error:
                problem = str(error)
            self._writing = None
        problem, step = self._ranks.broadcast((problem, step))
        if problem:
            raise StorageError(problem)
        return step

    def _write(self, step: int, notes: dict[str, Any], shards: list[dict[str, Tensor]]) -> int:
        def write() -> None:
            with new_checkpoint(self._root, step, notes, self._keep) as folder:
                for number, shard in enumerate(shards):
                    (folder / f"state-{number:05}.safetensors").write_bytes(save(shard))

        self._storage.patiently("the learner's checkpoint", self._root / f"step-{step}", write)
        return step


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Of at most SHARD_BYTES, unless one tensor alone is larger."""
    shard: dict[str, Tensor] = {}
    size = 0
    for key, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[key] = tensor
        size += tensor.nbytes
    if shard:
        yield shard
