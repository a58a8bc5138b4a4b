"""A whole run whose disk is full for a while, as its user sees it in the terminal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.actors.job_runs import LIMIT_S, SLOW, manifest, shards, sppo, steps, train, wait_for
from tests.faults.test_storage_disk import Full, small_disk

WORKS = "the storage works again; the run goes on"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 200 MiB, of which a run of the tiny policy takes a part."""
    with small_disk(tmp_path / "disk", "200m") as folder:
        yield folder


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_run_pauses_while_its_disk_is_full_and_gives_the_same_tables(whole, disk):
    """Full while it samples and full while it trains, logs and metrics included."""
    run_dir, fault = disk / "run", Full(disk)
    process = sppo(*train(run_dir), *SLOW)
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reading.start()

    def fill_until_it_pauses() -> None:
        pauses, works = said(lines, "the run pauses"), said(lines, WORKS)
        fault.begin()
        wait_for(lambda: process.poll() is not None or said(lines, "the run pauses") > pauses)
        time.sleep(2)  # for whatever else writes
        assert process.poll() is None, "".join(lines)
        fault.end()
        # The driver looks once a second: a fault that came before it has seen the end of this one would be the same to it.
        wait_for(lambda: process.poll() is not None or said(lines, WORKS) > works)

    wait_for(lambda: process.poll() is not None or shards(run_dir, 1) >= 4)
    fill_until_it_pauses()
    wait_for(lambda: process.poll() is not None or steps(run_dir) >= 1)
    fill_until_it_pauses()
    assert process.wait(LIMIT_S) == 0, "".join(lines)
    reading.join(60)
    assert said(lines, "No space left on device") >= 2
    assert said(lines, "free some space there") >= 2
    assert said(lines, WORKS) >= 2
    assert manifest(run_dir)["restarts"] == manifest(whole[0])["restarts"]  # nobody died of it
    for table in ("iter_1/train.parquet", "iter_2/train.parquet"):
        assert pq.read_table(run_dir / table).equals(pq.read_table(whole[0] / table))


def said(lines: list[str], text: str) -> int:
    return "".join(lines).count(text)
