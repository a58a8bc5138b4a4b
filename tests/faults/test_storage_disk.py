"""A real small file system that is full or read-only for a while: the run waits, says so, and goes on with all it had."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from actors import policy_folder
from actors.policy_folder import read_policy, write_policy
from sppo_ray import storage
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.buffer_service import BufferService
from sppo_ray.metrics import read_metrics
from sppo_ray.recovery import recover
from sppo_ray.storage import Storage, StorageError
from tests.unit.groups import config, judged

NAMES = [f"p{i}" for i in range(40)]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tmpfs of one MiB; attempts follow each other quickly."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(storage, "LONGEST_WAIT_S", 0.1)
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs; the test is skipped where this process may not mount one."""
    folder.mkdir()
    done = mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    if done.returncode:
        pytest.skip(f"this process may not mount a tmpfs: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


class Full:
    """Nothing more fits but a few bytes."""

    remedy = ("No space left on device", "free some space")

    def __init__(self, disk: Path) -> None:
        self._ballast = disk / "ballast"

    def begin(self) -> None:
        with self._ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                file.truncate(file.tell() - 4096)  # a page: a write fails half-way, not at its first byte

    def end(self) -> None:
        self._ballast.unlink()


class ReadOnly:
    remedy = ("Read-only file system", "make it writable")

    def __init__(self, disk: Path) -> None:
        self._disk = disk

    def begin(self) -> None:
        assert mount("-o", "remount,ro", str(self._disk)).returncode == 0

    def end(self) -> None:
        assert mount("-o", "remount,rw", str(self._disk)).returncode == 0


@pytest.mark.parametrize("kind", [Full, ReadOnly])
async def test_a_run_waits_for_its_disk_at_every_write(disk, kind):
    """Groups, seal, reference, metrics, and the record of what was trained: each meets the fault, each is done after it."""
    cfg = config(disk / "run", run__storage_patience_s=60, buffer__flush_s=0.01)
    service, fault = BufferService(cfg, None), kind(disk)

    async def through(write):
        fault.begin()
        writing = asyncio.create_task(write)
        while not (trouble := (await service.look()).trouble):
            assert not writing.done(), "it was written to a disk that takes nothing"
            await asyncio.sleep(0.01)
        assert all(part in trouble for part in fault.remedy)
        assert str(disk / "run") in trouble
        fault.end()
        await writing
        assert (await service.look()).trouble == ""

    await through(service.add([judged(name) for name in NAMES]))
    await through(service.seal(1, NAMES))
    await through(service.record_reference(1, [(-1.0, -2.0)] * len(NAMES)))
    padding = "x" * 10_000  # more than the page that is left and what the slice's line left of its own
    await through(service.record_step({"step": 1, "note": padding}))
    assert recover(cfg) == []
    again = TrainingBuffer(cfg)
    again.release(1)
    assert again.held(1) == set(NAMES)
    assert again.next_task(0).examples[0].reference_logps == (-1.0, -2.0)
    of_slice, of_step = read_metrics(disk / "run/metrics.jsonl")
    assert (of_slice["event"], of_slice["groups"]) == ("slice", len(NAMES))
    assert of_step == {"step": 1, "note": padding}
    assert not list((disk / "run").rglob(".*"))


@pytest.mark.parametrize("kind", [Full, ReadOnly])
def test_a_run_that_stopped_for_its_disk_goes_on(disk, kind):
    cfg, fault = config(disk / "run", run__storage_patience_s=0.2), kind(disk)
    buffer = TrainingBuffer(cfg)
    buffer.add([judged(name) for name in NAMES[:10]])
    fault.begin()
    with pytest.raises(StorageError, match="by the same command"):
        buffer.add([judged(name) for name in NAMES[10:]])
    fault.end()
    assert recover(cfg) == []
    again = TrainingBuffer(cfg)
    assert again.held(1) == set(NAMES[:10])
    again.add([judged(name) for name in NAMES])
    assert again.seal(1, NAMES).groups == len(NAMES)


@pytest.mark.parametrize("kind", [Full, ReadOnly])
def test_a_policy_waits_for_its_disk_shard_by_shard(disk, tmp_path, monkeypatch, kind):
    """The tensors come once, as they do from the learner's ranks."""
    monkeypatch.setattr(policy_folder, "SHARD_BYTES", 100_000)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "tiny"}')
    tensors = {f"layer.{n}": torch.full((20_000,), float(n)) for n in range(3)}
    fault, heard = kind(disk), []

    def hear(text: str) -> None:
        heard.append(text)
        if text:
            threading.Timer(0.05, fault.end).start()

    def gathered():
        for n, named in enumerate(tensors.items()):
            if n == 1:
                fault.begin()
            yield named

    write_policy(disk / "policy", str(source), "float32", gathered(), Storage(60.0, hear))
    assert len(heard) == 2
    assert heard[1] == ""
    assert all(part in heard[0] for part in fault.remedy)
    read = dict(read_policy(disk / "policy"))
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert sorted(os.listdir(disk)) == ["policy"]


def test_a_policy_for_which_there_is_no_room_leaves_the_one_before(disk, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    small, large = torch.ones(1000), torch.ones(500_000)
    write_policy(disk / "policy", str(tmp_path), "float32", [("w", small)])
    with pytest.raises(StorageError, match="No space left"):
        write_policy(disk / "policy", str(tmp_path), "float32", [("w", large)], Storage(0.05))
    assert torch.equal(dict(read_policy(disk / "policy"))["w"], small)
    assert os.listdir(disk) == ["policy"]
