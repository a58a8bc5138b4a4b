"""The buffer hangs, in a real run: named, its stacks kept, all actors started again. The tables are the same."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pyarrow.parquet as pq
import pytest

from tests.actors.job_runs import LIMIT_S, ROOT, SLOW, shards, titled, train, wait_for

# A run gives it five minutes to answer; here twenty seconds, once all actors serve.
IMPATIENT = """
from actors import bookkeepers, train
from sppo_ray.cli import main

async def answered(*args, patient=bookkeepers.answered, **named):
    bookkeepers.ANSWER_LIMIT_S = 20.0
    try:
        return await patient(*args, **named)
    finally:
        bookkeepers.ANSWER_LIMIT_S = 300.0

train.answered = answered
main()
"""


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_buffer_that_hangs_is_named_and_the_run_goes_on(whole, tmp_path):
    run_dir = tmp_path / "run"
    run = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT, *train(run_dir), *SLOW],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for(lambda: shards(run_dir, 1) >= 2 or run.poll() is not None)
    (buffer,) = titled("ray::BufferActor", psutil.Process(run.pid).children(recursive=True))
    buffer.suspend()
    output, _ = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 0, output
    assert "buffer: hangs: no answer in 20 s. Its stacks are in" in " ".join(output.split())
    assert "starting all actors again" in output
    assert f"buffer, process {buffer.pid} on node" in (run_dir / "logs/buffer.stacks.txt").read_text()
    assert not buffer.is_running()
    for iteration in (1, 2):
        mine, undisturbed = (pq.read_table(f / f"iter_{iteration}/train.parquet") for f in (run_dir, whole[0]))
        assert mine.equals(undisturbed)
