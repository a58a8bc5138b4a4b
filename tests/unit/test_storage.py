"""A disk that fails for a while: nothing that was acknowledged is lost, nothing is there twice or by half, and it is said."""

from __future__ import annotations

import errno
import logging
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from groups import config, judged
from hypothesis import given, settings
from hypothesis import strategies as st

from sppo_ray import storage
from sppo_ray.atomic import LineFile, make_folder, read_lines, whole_file
from sppo_ray.ledger import Ledger
from sppo_ray.metrics import MetricsLog, read_metrics
from sppo_ray.storage import Storage, StorageError
from sppo_ray.tables import SealedRow
from sppo_ray.types import CutBatch

CALLS = ("fsync", "replace", "open", "mkdir")  # of os: what the durable writes are made of


class FaultyOs:
    """Stands for `os` calls that change the disk: fails at the calls whose numbers are given."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: set[int]) -> None:
        self.calls, self.failing = 0, failing
        for name in CALLS:
            patch.setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls - 1 in self.failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        return call


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(storage, "LONGEST_WAIT_S", 0.01)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel itself cuts a write off there, half-way, with an OSError (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def batch(step: int) -> CutBatch:
    return CutBatch(step, 1, 0, 0, ((step, 0), (step + 1, 0)))


def names(table) -> list[str]:
    return [] if table is None else table["prompt_id"].to_pylist()


def test_a_write_is_tried_again_and_the_user_hears_of_it(tmp_path):
    heard: list[str] = []
    left = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ENOSPC, "No space left on device")]

    def write():
        if left:
            raise left.pop()
        return "written"

    patient = Storage(60.0, heard.append)
    assert patient.patiently("a table", tmp_path / "iter_1/t.parquet", write) == "written"
    begun, over = heard
    for part in (
        "a table",
        str(tmp_path / "iter_1/t.parquet"),
        "No space left",
        "GiB are free",
        "60 s",
        "free some space",
    ):
        assert part in begun
    assert (over, patient.trouble) == ("", "")


def test_a_write_that_hangs_is_said(tmp_path, monkeypatch):
    """As on a file server that is away and raises nothing; the log is on it, too."""
    monkeypatch.setattr(storage, "SLOW_S", 0.01)
    heard: list[str] = []
    said, back = threading.Event(), threading.Event()
    log = logging.Handler()
    monkeypatch.setattr(log, "emit", lambda record: back.wait(60))
    monkeypatch.setattr(storage.log, "handlers", [log])

    def hear(text):
        heard.append(text)
        said.set()

    patient = Storage(60.0, hear)
    hanging = threading.Thread(
        target=patient.patiently, args=("a table", tmp_path / "t.parquet", lambda: back.wait(60))
    )
    hanging.start()
    assert said.wait(60)
    assert "to write a table" in patient.trouble
    assert str(tmp_path / "t.parquet") in patient.trouble
    back.set()
    hanging.join()
    assert (len(heard), heard[1], patient.trouble) == (2, "", "")


def test_a_slice_is_sealed_when_its_groups_can_be_read_again(tmp_path, monkeypatch):
    cfg = config(tmp_path, run__storage_patience_s=60)
    ledger, faults = Ledger(cfg), [OSError(errno.EIO, "Input/output error")] * 2
    ledger.append(1, [judged("p0")])
    real = Ledger._shards

    def shards(self, iteration):
        if faults:
            raise faults.pop()
        return real(self, iteration)

    monkeypatch.setattr(Ledger, "_shards", shards)
    table = ledger.seal(1, [SealedRow("p0", 0, 1, 0)])
    assert (names(table), faults) == (["p0"], [])


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "writable"),
        (errno.EIO, "file server"),
        (errno.ESTALE, "file server"),
        (errno.ETIMEDOUT, "file server"),
    ],
)
def test_patience_ends_with_path_error_and_remedy(tmp_path, number, remedy):
    def write():
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageError, match=remedy) as raised:
        Storage(0.02).patiently("metrics", tmp_path / "metrics.jsonl", write)
    assert str(tmp_path / "metrics.jsonl") in str(raised.value)
    assert os.strerror(number) in str(raised.value)


def test_what_is_no_fault_of_the_storage_is_raised_at_once(tmp_path):
    heard: list[str] = []
    with pytest.raises(ValueError, match="our own"):
        Storage(60.0, heard.append).patiently("x", tmp_path, lambda: (_ for _ in ()).throw(ValueError("our own")))
    assert heard == []


@settings(max_examples=60)
@given(failing=st.sets(st.integers(0, 60)), plan=st.lists(st.sampled_from("gbm"), min_size=1, max_size=8))
def test_with_patience_every_write_is_there_once(tmp_path_factory, failing, plan):
    """g: a shard of groups, b: a batch, m: a line of metrics; calls of the numbers in `failing` fail."""
    root = tmp_path_factory.mktemp("run")
    cfg = config(root, run__storage_patience_s=60)
    with pytest.MonkeyPatch.context() as patch:
        FaultyOs(patch, failing)
        ledger = Ledger(cfg)
        metrics = MetricsLog(root / "metrics.jsonl", ledger.storage)
        for n, kind in enumerate(plan):
            if kind == "g":
                ledger.append(1, [judged(f"p{n}")])
            elif kind == "b":
                ledger.append_batch(batch(n))
                ledger.settle_batches()
            else:
                metrics.write({"step": n})
    again = Ledger(cfg)
    assert names(again.read(1)) == [f"p{n}" for n, kind in enumerate(plan) if kind == "g"]
    assert again.batches(1) == [batch(n) for n, kind in enumerate(plan) if kind == "b"]
    assert read_metrics(root / "metrics.jsonl") == [{"step": n} for n, kind in enumerate(plan) if kind == "m"]


@settings(max_examples=60)
@given(failing=st.sets(st.integers(0, 60), max_size=6), plan=st.lists(st.sampled_from("gb"), min_size=1, max_size=8))
def test_without_patience_the_next_process_has_what_was_acknowledged(tmp_path_factory, failing, plan):
    """Each failed write ends its process; the next one does it again, and in the end everything is there once."""
    root = tmp_path_factory.mktemp("run")
    cfg = config(root, run__storage_patience_s=0)
    acknowledged: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        FaultyOs(patch, failing)
        while len(acknowledged) < len(plan):
            ledger = Ledger(cfg)
            held, cut = names(ledger.read(1)), [b.step for b in ledger.batches(1)]
            for n in acknowledged:
                assert (f"p{n}" in held) if plan[n] == "g" else (n in cut)
            try:
                for n in range(len(acknowledged), len(plan)):
                    if plan[n] == "g" and f"p{n}" not in held:
                        ledger.append(1, [judged(f"p{n}")])
                    elif plan[n] == "b" and n not in cut:
                        ledger.append_batch(batch(n))
                        ledger.settle_batches()
                    acknowledged.append(n)
            except StorageError:
                continue
    assert names(Ledger(cfg).read(1)) == [f"p{n}" for n, kind in enumerate(plan) if kind == "g"]
    assert [b.step for b in Ledger(cfg).batches(1)] == [n for n, kind in enumerate(plan) if kind == "b"]


@settings(max_examples=40)
@given(limit=st.integers(0, 60), texts=st.lists(st.text(max_size=20), min_size=1, max_size=5))
def test_a_line_that_the_disk_took_half_of_is_written_once(tmp_path_factory, limit, texts):
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    file, written = LineFile(path), []
    for text in texts:
        try:
            with files_of_at_most(limit):
                file.append({"text": text})
        except OSError:
            assert [line["text"] for line in read_lines(path)] == written
            file.append({"text": text})
        written.append(text)
    assert [line["text"] for line in read_lines(path)] == written == texts


def test_a_file_that_the_disk_took_half_of_is_as_before(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("before")
    with pytest.raises(OSError, match="File too large"), files_of_at_most(1000), whole_file(path) as temporary:
        temporary.write_bytes(bytes(5000))
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_table_that_the_disk_took_half_of_is_not_there(tmp_path):
    ledger = Ledger(config(tmp_path, run__storage_patience_s=0))
    ledger.append(1, [judged(f"p{n}") for n in range(30)])
    with pytest.raises(StorageError, match=r"generated\.parquet.*File too large"), files_of_at_most(2000):
        ledger.write_table(1, "generated.parquet", ledger.read(1))
    assert os.listdir(tmp_path / "iter_1") == ["ledger"]


def test_a_new_folder_is_on_disk_or_not_there(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr("sppo_ray.atomic.sync", lambda path: synced.append(path.name))
    make_folder(tmp_path / "run/iter_1/ledger")
    assert synced == [tmp_path.name, "run", "iter_1"]  # each new name, in the folder that holds it

    def refuses(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sppo_ray.atomic.sync", refuses)
    with pytest.raises(OSError, match="Input/output"):
        make_folder(tmp_path / "run/iter_2")
    assert not (tmp_path / "run/iter_2").exists()


def test_lines_that_are_damaged_are_left_out(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    for step in range(4):
        MetricsLog(path).write({"step": step})
    data = bytearray(path.read_bytes())
    data[data.index(b'{"step": 2')] ^= 1
    path.write_bytes(data + b"\0\0\0")  # and what a power cut can leave at the end
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 3]
    assert "line 3" in caplog.text
    MetricsLog(path).write({"step": 2})
    assert [line["step"] for line in read_metrics(path)] == [0, 1, 3, 2]
