"""The mirror: what is in it is enough to go on elsewhere, at every moment; a store that fails harms nothing but the mirror."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from groups import config, judged
from typer.testing import CliRunner
from unsteady_store import Unsteady, clock_from_the_first_upload

from actors.train import _followers
from sppo_ray import mirror
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.checkpoints import fits, new_checkpoint, newest
from sppo_ray.cli import app
from sppo_ray.config_io import load_config
from sppo_ray.mirror import Mirror, check_mirror
from sppo_ray.recovery import recover
from sppo_ray.run_dir import check_run_dir, claim, update_manifest
from sppo_ray.types import TrainedIteration, TrainTask

NAMES = [f"p{i}" for i in range(10)]


@pytest.fixture(autouse=True)
def _stores(monkeypatch):
    fsspec.register_implementation("unsteady", Unsteady, clobber=True)
    for kind in (Unsteady, MemoryFileSystem):
        kind.store.clear()
    monkeypatch.setattr(Unsteady, "uploads", 0)
    monkeypatch.setattr(Unsteady, "failing", frozenset())
    monkeypatch.setattr(Unsteady, "gate", threading.Event())
    Unsteady.gate.set()
    monkeypatch.setattr(mirror, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(mirror, "EVERY_S", 0.01)


def run(root: Path, url: str | None) -> TrainingBuffer:
    """One iteration trained, the next one in the middle of collecting; with what is not to be mirrored beside it."""
    cfg = config(root, run__mirror=url)
    claim(cfg, {})
    buffer = TrainingBuffer(cfg)
    buffer.add([judged(name) for name in NAMES])
    buffer.seal(1, NAMES)
    buffer.record_reference(1, [(-1.0, -2.0)] * 10)
    for name in ("iter_1/policy/model.safetensors", "logs/rollout-0.log", "weights/v1/model.safetensors"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"tensors")
    buffer.saved(TrainedIteration(1, 1, 3, "sum", str(root / "iter_1/policy")))
    checkpoint(root, 4)
    buffer.add([judged(name, 2, version=1) for name in NAMES[:6]])
    (root / "iter_2/ledger/.shard-000009.parquet.1.tmp").write_bytes(b"half")
    return buffer


def checkpoint(root: Path, step: int) -> None:
    with new_checkpoint(root / "checkpoints/learner", step, {"first_step": 3}, keep=9) as folder:
        (folder / "state-00000.safetensors").write_bytes(b"state")


def made(root: Path, url: str) -> tuple[Mirror, list[str], list[str]]:
    said: list[str] = []
    warned: list[str] = []
    return Mirror(config(root, run__mirror=url), said.append, warned.append), said, warned


def names_in(url: str) -> list[str]:
    store, place = fsspec.core.url_to_fs(url)
    return sorted(name.removeprefix(f"{place}/") for name in store.find(place))


def goes_on(root: Path, url: str | None) -> None:
    """From a copy of the mirror: the first iteration is done, the second one holds its six groups."""
    cfg = config(root, run__mirror=url)
    check_run_dir(cfg)
    assert recover(cfg) == []
    buffer = TrainingBuffer(cfg)
    assert buffer.resume_point().step == 3
    assert buffer.held(2) == set(NAMES[:6])
    buffer.add([judged(name, 2, version=1) for name in NAMES])
    buffer.seal(2, NAMES)
    buffer.record_reference(2, [(-1.0, -2.0)] * 10)
    start = buffer.resume_point()
    found = newest(root / "checkpoints/learner", lambda checkpoint: fits(checkpoint, start))
    assert found is not None
    assert found.step == 4
    buffer.release(2)
    assert isinstance(buffer.next_task(3), TrainTask)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_a_run_goes_on_from_a_copy_of_the_mirror(tmp_path, protocol):
    url = "memory://bucket/run" if protocol == "memory" else f"file://{tmp_path}/backup/run"
    run(tmp_path / "run", url)
    made(tmp_path / "run", url)[0].copy()
    store, place = fsspec.core.url_to_fs(url)
    store.get(place, str(tmp_path / "elsewhere"), recursive=True)
    assert not {"logs", "weights"} & set(os.listdir(tmp_path / "elsewhere"))
    assert not [name for name in names_in(url) if name.endswith((".tmp", ".part"))]
    shutil.rmtree(tmp_path / "run")
    goes_on(tmp_path / "elsewhere", url)
    check_mirror(config(tmp_path / "elsewhere", run__mirror=url))  # the same run, at another place


def test_metrics_are_there_before_the_checkpoint_that_they_lead_to(tmp_path):
    """A learner that goes on from it does not make their lines again."""
    run(tmp_path / "run", "memory://m")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 4}\n')  # newer than all else, as in a run
    order = [name for name, _, _ in made(tmp_path / "run", "memory://m")[0]._changed()]
    assert order.index("metrics.jsonl") < order.index("checkpoints/learner/step-4/state-00000.safetensors")
    assert order.index("checkpoints/learner/step-4/state-00000.safetensors") < order.index(
        "checkpoints/learner/step-4/COMPLETE"
    )


def test_a_run_keeps_its_mirror_up_beside_its_schedule(tmp_path):
    """What it follows; what it copies at its end is seen in tests/actors/test_job.py."""
    copier, _, _ = made(tmp_path / "run", "memory://m")
    nobody = SimpleNamespace()
    for mirrored, expected in ((copier, ["_follow", "Mirror.follow"]), (None, ["_follow"])):
        beside = _followers(nobody, config(tmp_path / "run"), nobody, nobody, mirrored)
        assert [each.__qualname__ for each in beside] == expected
        for each in beside:
            each.close()


def test_only_what_changed_is_copied_again(tmp_path):
    run(tmp_path / "run", "unsteady://m")
    made(tmp_path / "run", "unsteady://m")[0].copy()
    first, Unsteady.uploads = Unsteady.uploads, 0
    assert first == len(names_in("unsteady://m"))
    again, _, _ = made(tmp_path / "run", "unsteady://m")  # of a run that goes on
    again.copy()
    assert Unsteady.uploads == 0
    (tmp_path / "run/manifest.json").write_text(json.dumps({"started": "then", "status": "done"}))
    again.copy()
    assert Unsteady.uploads == 1
    Unsteady.store.pop("/m/config.yaml")  # somebody removed it
    made(tmp_path / "run", "unsteady://m")[0].copy()
    assert Unsteady.uploads == 2
    assert "config.yaml" in names_in("unsteady://m")


def test_nothing_is_deleted_but_old_checkpoints(tmp_path):
    root = tmp_path / "run"
    buffer = run(root, "memory://m")
    copier, _, _ = made(root, "memory://m")
    copier.copy()
    shutil.rmtree(root / "checkpoints/learner/step-4")
    checkpoint(root, 8)
    buffer.add([judged(name, 2, version=1) for name in NAMES])
    buffer.seal(2, NAMES)  # which removes its shards
    copier.copy()
    there = names_in("memory://m")
    assert [name for name in there if name.startswith("checkpoints")] == [
        "checkpoints/learner/step-8/COMPLETE",
        "checkpoints/learner/step-8/state-00000.safetensors",
    ]
    assert any(name.startswith("iter_2/ledger/") for name in there)


@pytest.mark.parametrize("failing", range(11))
def test_whenever_the_machine_is_lost_the_mirror_is_a_run(tmp_path, failing):
    """The store fails at one upload and the machine is never seen again: what is in the mirror goes on."""
    url = "unsteady://m"
    Unsteady.failing = frozenset([failing])
    run(tmp_path / "run", url)
    with pytest.raises(TimeoutError):
        made(tmp_path / "run", url)[0].copy()
    Unsteady.store = {name: file for name, file in Unsteady.store.items() if file.getvalue() != b"half"}
    store, place = fsspec.core.url_to_fs(url)
    (tmp_path / "back").mkdir()
    if store.exists(place):
        store.get(f"{place}/", str(tmp_path / "back"), recursive=True)
    markers = list((tmp_path / "back").rglob("COMPLETE"))
    assert markers or failing < 10  # the last upload is another's
    for marker in markers:  # it vouches for what is beside it
        assert (marker.parent / "state-00000.safetensors").read_bytes() == b"state"
    cfg = config(tmp_path / "back", run__mirror=url)
    assert recover(cfg) == []
    buffer = TrainingBuffer(cfg)
    if (tmp_path / "back/iter_1/trained.json").exists():
        return goes_on_as_far(buffer)
    buffer.add([judged(name) for name in NAMES])
    buffer.seal(1, NAMES)


def goes_on_as_far(buffer: TrainingBuffer) -> None:
    assert buffer.resume_point().step == 3
    assert buffer.held(2) in (set(), set(NAMES[:6]))


async def test_a_store_that_fails_for_a_while_is_said_once(tmp_path):
    root = tmp_path / "run"
    run(root, "unsteady://m")
    Unsteady.failing = frozenset(range(3, 8))
    copier, said, warned = made(root, "unsteady://m")
    following = asyncio.create_task(copier.follow())
    while not said:
        await asyncio.sleep(0.01)
    following.cancel()
    assert len(warned) == len(said) == 1
    assert "the store does not answer" in warned[0]
    assert "up to date" in said[0]
    (root / "metrics.jsonl").write_text('{"step": 1}\n')
    await copier.finish()
    assert fsspec.filesystem("unsteady").cat_file("/m/metrics.jsonl") == b'{"step": 1}\n'
    fsspec.filesystem("unsteady").get("/m", str(tmp_path / "elsewhere"), recursive=True)
    goes_on(tmp_path / "elsewhere", "unsteady://m")


async def test_a_store_that_fails_to_the_end_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "SILENCE_S", 0.5)
    run(tmp_path / "run", "unsteady://m")
    Unsteady.failing = frozenset(range(1000))
    copier, said, warned = made(tmp_path / "run", "unsteady://m")
    await copier.finish()
    assert said == []
    assert "not complete" in warned[-1]
    assert "by hand" in warned[-1]
    with copier._lock:  # a cancelled pass may still be at one file, which is not the next test's
        pass


def test_a_store_that_hangs_holds_nobody_up(tmp_path, monkeypatch):
    """Neither the end of a run nor the end of its event loop; and what it left hanging copies nothing more."""
    monkeypatch.setattr(mirror, "SILENCE_S", 0.05)
    run(tmp_path / "run", "unsteady://m")
    copier, said, warned = made(tmp_path / "run", "unsteady://m")
    Unsteady.gate.clear()
    rescue = threading.Timer(120, Unsteady.gate.set)  # or this test could not fail, only hang
    rescue.start()

    async def follow_until_it_hangs() -> None:
        following = asyncio.create_task(copier.follow())
        while not Unsteady.uploads:
            await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(asyncio.wait_for(follow_until_it_hangs(), 60))
    asyncio.run(copier.finish())
    assert not Unsteady.gate.is_set()
    rescue.cancel()
    assert said == []
    assert "not complete" in warned[-1]
    assert "took nothing" in warned[-1]
    Unsteady.gate.set()
    with copier._lock:
        assert Unsteady.uploads == 1


async def test_a_store_that_hangs_for_a_while_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "SILENCE_S", 0.05)
    run(tmp_path / "run", "unsteady://m")
    copier, said, warned = made(tmp_path / "run", "unsteady://m")
    Unsteady.gate.clear()
    following = asyncio.create_task(copier.follow())
    async with asyncio.timeout(60):
        while not warned:
            await asyncio.sleep(0.01)
        assert said == []
        Unsteady.gate.set()
        while not said:
            await asyncio.sleep(0.01)
    following.cancel()
    (warning,) = warned
    assert re.search(r"took nothing for 0\.05\d* s; the run goes on", warning)
    assert "up to date" in said[0]
    assert "manifest.json" in names_in("unsteady://m")


def test_the_end_of_a_run_waits_for_a_large_file_that_is_under_way(tmp_path, monkeypatch):
    """What was begun beside the run has its time, and the last pass waits for it."""
    clock_from_the_first_upload(monkeypatch)
    monkeypatch.setattr(mirror, "SILENCE_S", 1)
    monkeypatch.setattr(mirror, "SLOWEST", 1)
    run(tmp_path / "run", "unsteady://m")
    copier, said, warned = made(tmp_path / "run", "unsteady://m")
    Unsteady.gate.clear()

    async def follow_and_finish() -> None:
        following = asyncio.create_task(copier.follow())
        while not Unsteady.uploads:
            await asyncio.sleep(0.01)
        following.cancel()
        threading.Timer(2, Unsteady.gate.set).start()
        await copier.finish()

    asyncio.run(follow_and_finish())
    assert (said, warned) == ([], [])
    assert "manifest.json" in names_in("unsteady://m")


async def test_a_store_that_says_nothing_has_the_time_that_a_file_takes(tmp_path, monkeypatch):
    clock_from_the_first_upload(monkeypatch)
    monkeypatch.setattr(mirror, "SILENCE_S", 1)
    monkeypatch.setattr(mirror, "SLOWEST", 1)  # byte a second: any file may take a minute
    run(tmp_path / "run", "unsteady://m")
    copier, said, warned = made(tmp_path / "run", "unsteady://m")
    Unsteady.gate.clear()
    opened = threading.Timer(4, Unsteady.gate.set)
    opened.start()
    await copier.finish()
    opened.join()
    assert (said, warned) == ([], [])
    assert "manifest.json" in names_in("unsteady://m")


def test_the_mirror_of_a_finished_run_is_completed(tmp_path):
    config_file, backup = Path(__file__).parents[2] / "configs/tiny_cpu.yaml", tmp_path / "backup"
    given = [f"run.dir={tmp_path / 'run'}", f"run.mirror=file://{backup}"]
    claim(load_config(config_file, given), {})
    update_manifest(tmp_path / "run", status="done")
    result = CliRunner().invoke(app, ["train", "--config", str(config_file), *given])
    assert result.exit_code == 0, result.output
    assert json.loads((backup / "manifest.json").read_text())["status"] == "done"
