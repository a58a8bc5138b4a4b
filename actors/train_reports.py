"""What Ray Train hears of the run: its experiment folder is the run directory, and what the learner saves there is reported as
its checkpoints (`ray.train.get_checkpoint`, `Result.checkpoint`). Nothing is copied.

Which checkpoint a run goes on from is not Ray Train's to say: its list has no checksums, names some that are no longer kept, and
does not outlive a driver. Whoever starts ranks, Ray Train or the next driver, takes the newest sound one from the folder
(`sppo_ray.checkpoints`).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import CheckpointUploadMode

from actors.ranks import Ranks


class RunFiles(LocalFileSystem):  # type: ignore[misc]
    """The files of this node, except that what Ray Train writes, its own records, stays in its process's memory.

    Its controller writes its list of checkpoints at every report and reads it when it starts. On a disk, that fails the run when
    the disk is full, where our writes wait; and fails the start if a checkpoint of the list is gone or Ray has another version.
    """

    cachable = False  # an instance has its own records

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._records: dict[str, bytes] = {}

    def _open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
        if mode != "rb":
            return _Record(lambda content: self._records.__setitem__(path, content))
        return io.BytesIO(self._records[path]) if path in self._records else super()._open(path, mode, **settings)

    def isfile(self, path: Any) -> bool:
        return self._strip_protocol(path) in self._records or super().isfile(path)

    def info(self, path: Any, **settings: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name in self._records:
            return {"name": name, "size": len(self._records[name]), "type": "file"}
        return super().info(path, **settings)  # type: ignore[no-any-return]


class _Record(io.BytesIO):
    """A file being written: `keep` gets its content when it is closed."""

    def __init__(self, keep: Callable[[bytes], None]) -> None:
        super().__init__()
        self._keep = keep

    def close(self) -> None:
        if not self.closed:
            self._keep(self.getvalue())
        super().close()


def place(run_dir: str) -> dict[str, Any]:
    """Of the run directory: the arguments of `RunConfig` that say where it is."""
    path = Path(run_dir).resolve()
    return {
        "name": path.name,
        "storage_path": str(path.parent),
        "storage_filesystem": PyFileSystem(FSSpecHandler(RunFiles())),
    }


def report(ranks: Ranks, step: int, folder: Path) -> None:
    """Collective: after `step` updates `folder`, in the run directory, is saved. Waits until Ray Train has taken the report
    before this one. Where a link leads the folder out of the run directory, Ray Train, which would refuse it, hears the step only."""
    ranks.way.at("reporting to Ray Train")
    checkpoint, storage = None, ray.train.get_context().get_storage()
    path = folder.resolve()
    if ranks.first and path.is_relative_to(storage.experiment_fs_path):
        # The context's own object: one made here would count as another file system.
        checkpoint = ray.train.Checkpoint(str(path), storage.storage_filesystem)
    ray.train.report({"step": step}, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD)
