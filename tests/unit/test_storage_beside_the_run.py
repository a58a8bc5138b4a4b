"""While the disk refuses: the buffer answers, hands nothing out that is not on disk, and says what is waited for; driver and
learner go on."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from functools import partial
from types import SimpleNamespace

import pytest
from groups import config, judged

from actors import publish, train
from sppo_ray import storage
from sppo_ray.atomic import read_lines
from sppo_ray.buffer_service import BufferService
from sppo_ray.ledger import Ledger
from sppo_ray.metrics import read_metrics
from sppo_ray.storage import StorageError
from sppo_ray.weight_chunks import Checksum


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(storage, "LONGEST_WAIT_S", 0.01)


def full_disk(monkeypatch):
    """Refuses every write until its `full` is set to False."""
    disk = SimpleNamespace(full=True)

    def fsync(descriptor, real=os.fsync):
        if disk.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return disk


async def test_the_buffer_answers_while_the_disk_refuses(tmp_path, monkeypatch):
    """And says what is wrong; groups and lines are acknowledged when the fault is over."""
    service = BufferService(config(tmp_path, run__storage_patience_s=60, buffer__flush_s=0.01), None)
    disk = full_disk(monkeypatch)
    waiting = [asyncio.create_task(service.add([judged("p0")])), asyncio.create_task(service.record_step({"step": 0}))]
    while not (trouble := (await service.look()).trouble):
        await asyncio.sleep(0.01)
    assert "No space left" in trouble
    assert await service.held(1) == frozenset()
    assert (await service.look()).step == {}
    assert not any(task.done() for task in waiting)
    disk.full = False
    await asyncio.gather(*waiting)
    assert ((await service.look()).trouble, await service.held(1)) == ("", {"p0"})
    assert (Ledger(service._config).read(1)["prompt_id"].to_pylist(), read_metrics(tmp_path / "metrics.jsonl")) == (
        ["p0"],
        [{"step": 0}],
    )


async def test_the_run_ends_when_patience_does(tmp_path, monkeypatch):
    service = BufferService(config(tmp_path, run__storage_patience_s=0.02), None)
    waits_for_ever = asyncio.create_task(service.train(1))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(StorageError, match=r"metrics\.jsonl.*Input/output error"):
        await service.record({"event": "x"})
    with pytest.raises(Exception, match=r"metrics\.jsonl.*Input/output error"):
        await waits_for_ever


async def test_a_learner_that_starts_again_is_counted_before_it_is_ready(tmp_path):
    service = BufferService(config(tmp_path), [["p0"]])
    for starts in range(3):
        await service.resume_point()
        assert (await service.look()).learner_restarts == starts


async def test_troubles_of_other_processes_are_said_too(tmp_path):
    service = BufferService(config(tmp_path), None)
    await service.report_trouble("learner-0", "the run pauses: cannot write a policy")
    assert (await service.look()).trouble == "learner-0: the run pauses: cannot write a policy"
    await service.report_trouble("learner-0", "")
    assert (await service.look()).trouble == ""


SLICE = ["p0", "p1", "p2", "p3"]


async def with_a_batch_to_cut(tmp_path):
    """Async: its service, with groups for the first update."""
    overrides = {"schedule__mode": "async", "schedule__iterations": 1, "weights__publish_every": 1}
    cfg = config(tmp_path, run__storage_patience_s=60, buffer__flush_s=0.01, learner__batch_size=2, **overrides)
    service = BufferService(cfg, [SLICE])
    await service.evaluated(0)
    await service.add([judged(SLICE[ticket.index]) for ticket in await service.admit(2)])
    return cfg, service


async def test_a_batch_is_handed_out_when_it_is_on_disk(tmp_path, monkeypatch):
    cfg, service = await with_a_batch_to_cut(tmp_path)
    disk = full_disk(monkeypatch)
    asked = asyncio.create_task(service.next_task(0))
    while not (await service.look()).trouble:
        await asyncio.sleep(0.01)
    assert not asked.done()
    async with asyncio.timeout(60):  # within an attempt the line is there; a refused one is taken back
        while read_lines(tmp_path / "iter_1/batches.jsonl"):
            await asyncio.sleep(0.001)
    assert not asked.done()
    disk.full = False
    task = await asked
    (cut,) = Ledger(cfg).batches(1)
    assert [example.prompt_id for example in task.examples] == [SLICE[index] for index, _ in cut.groups]


async def test_the_buffer_answers_while_a_file_server_hangs_with_a_batch(tmp_path, monkeypatch):
    """It raises nothing, it only takes for ever: in a thread, so that the buffer is not taken for hung."""
    monkeypatch.setattr(storage, "SLOW_S", 0.01)
    _, service = await with_a_batch_to_cut(tmp_path)
    back = threading.Event()
    monkeypatch.setattr(os, "fsync", lambda descriptor, real=os.fsync: back.wait(60) and real(descriptor))
    asked = asyncio.create_task(service.next_task(0))
    try:
        async with asyncio.timeout(30):
            while "batches.jsonl takes more than" not in (await service.look()).trouble:
                await asyncio.sleep(0.01)
        assert not asked.done()
    finally:
        back.set()
    assert len((await asked).examples) == 2
    assert (await service.look()).trouble == ""


def test_the_driver_counts_the_record_when_it_can_be_read_again(tmp_path, monkeypatch):
    cfg = config(tmp_path, run__storage_patience_s=60)
    Ledger(cfg).append(1, [judged("p0")])
    faults, real = [OSError(errno.EIO, "Input/output error")] * 2, Ledger._shards

    def shards(self, iteration):
        if faults:
            raise faults.pop()
        return real(self, iteration)

    monkeypatch.setattr(Ledger, "_shards", shards)
    assert (train._patiently(train.groups_on_disk, cfg), faults) == (1, [])


def test_an_old_version_that_cannot_be_removed_does_not_end_a_publish(tmp_path, monkeypatch):
    """As a file server keeps a folder in which somebody has a file open. It goes with a later one."""
    folders = [tmp_path / f"weights/v{version}" for version in range(publish.KEPT + 1)]
    for age, folder in enumerate(folders):
        folder.mkdir(parents=True)
        os.utime(folder, (age, age))
    hub = SimpleNamespace(commit_folder=SimpleNamespace(remote=lambda *facts: None))
    monkeypatch.setattr(publish, "ray", SimpleNamespace(get=lambda ref: None))
    commit = partial(publish._commit_folder, config(tmp_path), hub, publish.KEPT, Checksum(), folders[-1])

    def busy(path, **_):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        assert commit() == Checksum().hexdigest()
    assert folders[0].exists()
    commit()
    assert not folders[0].exists()
