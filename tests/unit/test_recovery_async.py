"""Damaged files of an async run: made again as the schedule made them."""

from __future__ import annotations

from pathlib import Path

from damage import flip
from groups import HandingOut, config, judged

from sppo_ray.async_buffer import AsyncBuffer
from sppo_ray.recovery import recover
from sppo_ray.types import Publication, TrainTask

NAMES = [f"p{i}" for i in range(6)]


def sealed_async(root: Path) -> AsyncBuffer:
    """Three updates on two groups each, a publish after each of them; sealed, not saved."""
    overrides = {"schedule__mode": "async", "schedule__max_staleness": 0, "schedule__iterations": 1}
    cfg = config(root, **overrides, weights__publish_every=1, learner__batch_size=2)
    buffer = HandingOut(cfg, [NAMES])
    buffer.evaluated(0)
    for step in range(3):
        buffer.add([judged(f"p{ticket.index}", 1, version=step) for ticket in buffer.admit(2)])
        assert isinstance(buffer.next_task(step), TrainTask)
        if step < 2:
            buffer.published(Publication(step + 1, step + 1, 1, False, "c", 0.0))
            buffer.serve(step + 1)
    buffer.seal(1, NAMES)
    return buffer


def test_a_damaged_train_table_is_made_again(tmp_path):
    cfg = sealed_async(tmp_path).config
    path = tmp_path / "iter_1/train.parquet"
    before = path.read_bytes()
    flip(path)
    assert "made again from generated.parquet" in recover(cfg)[0]
    assert path.read_bytes() == before


def test_where_only_the_schedule_can_make_it_the_slice_is_sealed_again(tmp_path):
    cfg = sealed_async(tmp_path).config
    path = tmp_path / "iter_1/train.parquet"
    before = path.read_bytes()
    flip(path)
    batches = tmp_path / "iter_1/batches.jsonl"
    kept = batches.read_bytes()
    batches.write_bytes(b"")  # as in slice order, where batches are not written down
    recover(cfg)
    batches.write_bytes(kept)
    again = HandingOut(cfg, [NAMES])
    assert again.collected(1)
    again.seal(1, NAMES)
    assert path.read_bytes() == before


def test_a_sealed_slice_whose_batches_are_damaged_is_sealed_again(tmp_path):
    cfg = sealed_async(tmp_path).config
    train, path = (tmp_path / "iter_1" / name for name in ("train.parquet", "batches.jsonl"))
    before, lines = train.read_bytes(), path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"[[2, 1]", b"[[1, 1]") + lines[2])  # still a batch, of other rows
    assert path.read_bytes() != b"".join(lines)
    assert "batches.jsonl" in recover(cfg)[0]
    again = HandingOut(cfg, [NAMES])
    again.evaluated(0)
    assert again.resume_point().up_to == 1
    assert not again.collected(1)
    for step in (1, 2):
        again.published(Publication(step, step, 1, False, "c", 0.0))
        again.serve(step)
        again.add([judged(f"p{ticket.index}", 1, version=step) for ticket in again.admit(2)])
        assert isinstance(again.next_task(step), TrainTask)
    again.seal(1, NAMES)
    assert (train.read_bytes(), path.read_bytes()) == (before, b"".join(lines))
    assert recover(cfg) == []


def test_damaged_groups_are_sampled_again(tmp_path):
    cfg = sealed_async(tmp_path).config
    flip(tmp_path / "iter_1/generated.parquet")
    assert "made again" in recover(cfg)[0]
    again = HandingOut(cfg, [NAMES])
    assert [ticket.number for ticket in again.admit(10)] == [0, 1]  # from the first update on
    assert again.resume_point().up_to == 0
