"""Flipped bits, truncated and missing files of the record: found before the run goes on, made again where that can be."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
from damage import cut, flip
from groups import config, judged

from sppo_ray import recovery
from sppo_ray.atomic import checksums_of
from sppo_ray.buffer import TrainingBuffer
from sppo_ray.buffer_service import BufferService
from sppo_ray.ledger import Ledger
from sppo_ray.metrics import read_metrics
from sppo_ray.recovery import recover
from sppo_ray.storage import StorageError
from sppo_ray.types import ReferenceTask, TrainedIteration, TrainTask

NAMES = [f"p{i}" for i in range(10)]
LOGPS = [(-float(i), -2.0 * i) for i in range(10)]


def sealed(cfg, iteration: int = 1) -> TrainingBuffer:
    buffer = TrainingBuffer(cfg)
    buffer.add([judged(name, iteration) for name in NAMES])
    buffer.seal(iteration, NAMES)
    buffer.record_reference(iteration, LOGPS)
    return buffer


def trained(cfg, iteration: int = 1) -> TrainingBuffer:
    buffer = sealed(cfg, iteration)
    policy = Path(cfg.run.dir) / f"iter_{iteration}/policy"
    policy.mkdir()
    (policy / "config.json").write_text("{}")
    (policy / "model.safetensors").write_bytes(bytes(range(256)))
    buffer.saved(TrainedIteration(iteration, iteration, 3 * iteration, "sum", str(policy)))
    return buffer


DAMAGES = pytest.mark.parametrize("damage", [flip, cut, Path.unlink])


def test_what_is_whole_stays(tmp_path):
    cfg = config(tmp_path)
    trained(cfg)
    before = checksums_of(tmp_path / "iter_1")
    assert recover(cfg) == []
    assert checksums_of(tmp_path / "iter_1") == before
    assert recover(config(tmp_path / "new")) == []


def test_a_run_without_checksums_on_record_goes_on(tmp_path):
    cfg = config(tmp_path)
    sealed(cfg)
    path = tmp_path / "iter_1/sealed.json"
    record = json.loads(path.read_text())
    del record["tables"], record["xxh3"]
    path.write_text(json.dumps(record))
    assert recover(cfg) == []
    again = TrainingBuffer(cfg)
    again.release(1)
    assert isinstance(again.next_task(0), TrainTask)


@DAMAGES
def test_damaged_groups_of_an_untrained_slice_are_made_again(tmp_path, damage):
    cfg = config(tmp_path)
    before = sealed(cfg).ledger.generated(1)
    damage(tmp_path / "iter_1/generated.parquet")
    (said,) = recover(cfg)
    assert "generated.parquet" in said
    assert "made again" in said
    again = TrainingBuffer(cfg)
    assert again.held(1) == set()
    again.add([judged(name) for name in NAMES])
    again.seal(1, NAMES)
    again.release(1)
    assert isinstance(again.next_task(0), ReferenceTask)  # it was of tables that are gone
    assert again.ledger.generated(1).equals(before)
    assert recover(cfg) == []


def cut_by_one(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, cut_by_one, emptied])
def test_a_damaged_shard_of_an_unsealed_slice_is_named_and_its_groups_made_again(tmp_path, damage):
    cfg = config(tmp_path)
    for part in (NAMES[:5], NAMES[5:]):
        TrainingBuffer(cfg).add([judged(name) for name in part])
    first, _ = sorted((tmp_path / "iter_1/ledger").glob("shard-*.parquet"))
    damage(first)
    assert Ledger(cfg).groups(1) in (5, 10)  # counting does not fail where nobody has looked yet
    (said,) = recover(cfg)
    assert first.name in said
    assert "made again" in said
    assert first.with_suffix(".corrupt").exists()
    assert recover(cfg) == []
    assert Ledger(cfg).groups(1) == 5
    assert TrainingBuffer(cfg).held(1) == frozenset(NAMES[5:])


@DAMAGES
@pytest.mark.parametrize("prepare", [sealed, trained])
def test_a_damaged_train_table_is_made_again(tmp_path, damage, prepare):
    cfg = config(tmp_path)
    prepare(cfg)
    path = tmp_path / "iter_1/train.parquet"
    before = path.read_bytes()
    damage(path)
    (said,) = recover(cfg)
    assert "train.parquet is made again from generated.parquet" in said
    assert path.read_bytes() == before
    assert Ledger(cfg).reference(1) == LOGPS
    assert recover(cfg) == []


@DAMAGES
def test_a_damaged_reference_is_computed_again(tmp_path, damage):
    cfg = config(tmp_path)
    sealed(cfg)
    damage(tmp_path / "iter_1/reference.parquet")
    assert "computed again" in recover(cfg)[0]
    again = TrainingBuffer(cfg)
    again.release(1)
    assert isinstance(again.next_task(0), ReferenceTask)
    again.record_reference(1, LOGPS)
    assert recover(cfg) == []


def test_a_reference_whose_checksum_was_not_written_yet_is_computed_again(tmp_path):
    cfg = config(tmp_path)
    sealed(cfg)
    path = tmp_path / "iter_1/sealed.json"
    record = json.loads(path.read_text())
    del record["tables"]["reference.parquet"], record["xxh3"]
    Ledger(cfg).write_record(path, record)
    assert Ledger(cfg).reference(1) is None


@DAMAGES
@pytest.mark.parametrize("iterations", [1, 2])
def test_the_policy_to_go_on_from_or_to_end_with_must_be_whole(tmp_path, damage, iterations):
    cfg = config(tmp_path, schedule__iterations=iterations)
    trained(cfg)
    damage(tmp_path / "iter_1/policy/model.safetensors")
    with pytest.raises(StorageError, match=r"model\.safetensors.*delete.*trained\.json"):
        recover(cfg)
    (tmp_path / "iter_1/trained.json").unlink()  # as the message says
    assert recover(cfg) == []
    again = TrainingBuffer(cfg)
    again.release(1)
    assert isinstance(again.next_task(0), TrainTask)


def test_a_policy_that_nothing_needs_is_only_named(tmp_path):
    cfg = config(tmp_path)
    trained(cfg)
    trained(cfg, iteration=2)
    flip(tmp_path / "iter_1/policy/model.safetensors")
    (said,) = recover(cfg)
    assert "model.safetensors" in said


def test_trained_groups_that_are_damaged_are_only_named(tmp_path):
    cfg = config(tmp_path)
    trained(cfg)
    flip(tmp_path / "iter_1/generated.parquet")
    (said,) = recover(cfg)
    assert "generated.parquet" in said
    assert TrainingBuffer(cfg).last_trained().iteration == 1


@pytest.mark.parametrize("name", ["sealed.json", "trained.json"])
def test_a_damaged_marker_is_named(tmp_path, name):
    cfg = config(tmp_path)
    trained(cfg)
    cut(tmp_path / "iter_1" / name)
    with pytest.raises(StorageError, match=f"{name} is damaged"):
        recover(cfg)


@pytest.mark.parametrize(("name", "key"), [("sealed.json", "steps"), ("trained.json", "version")])
def test_another_digit_in_a_marker_is_found(tmp_path, name, key):
    """It is valid JSON still, and would be believed."""
    cfg = config(tmp_path)
    trained(cfg)
    path = tmp_path / "iter_1" / name
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {key: record[key] + 1}))
    with pytest.raises(StorageError, match=rf"{name} is damaged \(its checksum"):
        recover(cfg)
    path.write_text(json.dumps({k: v for k, v in record.items() if k != "xxh3"}))  # of before there were checksums
    assert recover(cfg) == []
    path.write_text("[]")
    with pytest.raises(StorageError, match=rf"{name} is damaged \(it holds list\)"):
        recover(cfg)


def test_a_disk_that_does_not_let_itself_be_read_is_said(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    sealed(cfg)

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(recovery, "checksum_of", fails)
    with pytest.raises(StorageError, match=r"cannot be looked through.*Input/output error.*same command again"):
        recover(cfg)


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    cfg = config(tmp_path)
    sealed(cfg)
    for path in ("ledger/shard-000000-x.parquet", ".train.parquet.123.tmp", ".policy.123.tmp/part-0.safetensors"):
        (tmp_path / "iter_1" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "iter_1" / path).touch()
    for name in (".manifest.json.123.tmp", "iter_0/.evaluation.parquet.123.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert recover(cfg) == []
    left = sorted(path.name for path in (tmp_path / "iter_1").iterdir())
    assert left == ["generated.parquet", "reference.parquet", "sealed.json", "train.parquet"]
    assert not list(tmp_path.rglob("*.tmp"))


async def test_a_policy_that_is_no_more_leaves_no_evaluation_behind(tmp_path):
    """As after the user deleted trained.json, since the policy was damaged."""
    cfg = config(tmp_path)
    trained(cfg)
    evaluation, metrics = tmp_path / "iter_1/evaluation.parquet", tmp_path / "metrics.jsonl"
    evaluation.write_bytes(b"of the policy that was")
    service = BufferService(cfg, None)
    lines = [{"event": "evaluation", "iteration": t, "x": 1.0} for t in (0, 1)]
    for line in lines:
        await service.record(line)
    assert recover(cfg) == []
    BufferService(cfg, None)
    assert evaluation.exists()
    assert read_metrics(metrics) == lines
    (tmp_path / "iter_1/trained.json").unlink()
    assert recover(cfg) == []
    BufferService(cfg, None)
    assert not evaluation.exists()
    assert read_metrics(metrics) == lines[:1]


async def test_a_slice_is_counted_in_the_metrics_while_it_is_sealed(tmp_path):
    cfg = config(tmp_path)
    service = BufferService(cfg, None)
    await service.add([judged(name) for name in NAMES])
    summary = await service.seal(1, NAMES)
    await service.seal(1, NAMES)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {"event": "slice"} | dataclasses.asdict(summary)
    flip(tmp_path / "iter_1/generated.parquet")
    recover(cfg)
    BufferService(cfg, None)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
