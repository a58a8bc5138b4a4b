"""A checkpoint is written beside the training, which stops only while the state is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from groups import config
from safetensors.torch import load_file

from actors.checkpoint import Checkpoints
from sppo_ray.checkpoints import newest
from sppo_ray.storage import Storage
from sppo_ray.types import TrainTask

ALONE: Any = SimpleNamespace(
    first=True, world=1, way=SimpleNamespace(at=lambda *_, **__: None), broadcast=lambda values: values
)


class State:
    """Of one weight, which is how often it was copied."""

    copies = 0

    def layout(self) -> dict[str, Any]:
        return {}

    def gather(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.copies += 1
        yield "weight", torch.tensor([float(self.copies)])


class SlowDisk(Storage):
    def __init__(self) -> None:
        super().__init__()
        self.takes = threading.Event()

    def patiently(self, what: str, path: Path, do: Callable[[], Any], verb: str = "write") -> Any:
        self.takes.wait()
        return super().patiently(what, path, do, verb)


def test_a_slow_disk_holds_up_the_next_checkpoint_not_the_training(tmp_path: Path) -> None:
    state: Any = State()
    disk, heard = SlowDisk(), list[int]()
    checkpoints = Checkpoints(config(tmp_path), ALONE, state, disk, lambda _ranks, step, _folder: heard.append(step))
    root = tmp_path / "checkpoints/learner"
    with ThreadPoolExecutor(2) as learner:
        learner.submit(checkpoints.save, TrainTask(0, 1, 0, 4, ())).result(timeout=60)
        assert not (root / "step-1").exists()  # the learner trains on
        second = learner.submit(checkpoints.save, TrainTask(1, 1, 1, 4, ()))
        wait([second], timeout=0.5)
        assert (second.done(), state.copies) == (False, 1)  # never two copies in memory
        disk.takes.set()
        second.result(timeout=60)
        assert heard == [1]
    checkpoints._wait()
    found = newest(root, lambda checkpoint: True)
    assert found is not None
    assert found.step == 2
    assert load_file(found.folder / "state-00000.safetensors")["weight"].item() == 2
