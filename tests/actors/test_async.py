"""Async self-play as a user runs it, on the shipped tiny models: real Ray, vLLM, PairRM and DeepSpeed."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from contextlib import suppress

import psutil
import pyarrow.parquet as pq
import pytest

from sppo_ray.metrics import read_metrics
from sppo_ray.tables import CONSUMED
from tests.actors.job_runs import (
    LIMIT_S,
    ROOT,
    explained_metrics,
    manifest,
    metric_names,
    metrics,
    sppo,
    train,
    unexplained,
    wait_for,
)

pytestmark = pytest.mark.timeout(2 * LIMIT_S)
STEP_FIGURES = ("loss", "delta_w", "delta_l", "grad_norm", "learning_rate", "margin", "mean_length_w")


def test_at_zero_staleness_it_equals_sync_to_the_last_bit(whole, tmp_path):
    """`tiny_cpu_async_zero` against `tiny_cpu`: the same rows, updates and weights."""
    run_dir = tmp_path / "zero"
    process = sppo(*train(run_dir, "tiny_cpu_async_zero"))
    output, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, output
    for t in (1, 2):
        for name in ("train", "generated", "reference", "evaluation"):
            ours, sync = (pq.read_table(folder / f"iter_{t}/{name}.parquet") for folder in (run_dir, whole[0]))
            assert ours.select(sync.column_names).equals(sync), (t, name)
        rows = pq.read_table(run_dir / f"iter_{t}/train.parquet").to_pylist()
        assert {(row["policy_version"], row["consumed_version"]) for row in rows} == {(t - 1, t - 1)}
        weights = [(folder / f"iter_{t}/policy/model.safetensors").read_bytes() for folder in (run_dir, whole[0])]
        assert weights[0] == weights[1]
    ours, sync = ([line for line in metrics(folder) if "step" in line] for folder in (run_dir, whole[0]))
    assert [[line[name] for name in STEP_FIGURES] for line in ours] == [
        [line[name] for name in STEP_FIGURES] for line in sync
    ]
    assert {(line["staleness_mean"], line["staleness_max"]) for line in ours} == {(0, 0)}


def learner_rank(driver: int) -> psutil.Process:
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if "ray::RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    (rank,) = found
    return rank


def events(run_dir, kind):
    """Lines so far, also while the run goes on."""
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if line.get("event") == kind]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """Two passes over the prompts, a publish per update; a rollout worker and a judge join while it runs."""
    run_dir = tmp_path_factory.mktemp("runs") / "streamed"
    slow = ("rollout.in_flight=1", "buffer.flush_s=0.2")  # time enough to stop the learner in the middle
    often = ("learner.epochs=2", "weights.publish_every=1")
    process = sppo(*train(run_dir, "tiny_cpu_async"), *often, *slow)
    try:
        wait_for(lambda: events(run_dir, "publish") or process.poll() is not None)
        assert process.poll() is None, process.communicate()[0]
        scaled = scale_while_it_waits(process, run_dir)
        output, _ = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    assert scaled.returncode == 0, scaled.stdout + scaled.stderr
    assert process.returncode == 0, output
    return run_dir, output


def scale_while_it_waits(process, run_dir):
    """The learner stands still until the new workers serve: without it the run cannot come to its end before."""
    scale = [sys.executable, "-m", "sppo_ray", "scale", "--run", str(run_dir), "rollout=+1", "judge=+1"]
    rank = learner_rank(process.pid)
    rank.suspend()
    try:
        scaled = subprocess.run(scale, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        wait_for(lambda: len(events(run_dir, "scale")) == 2 or scaled.returncode or process.poll() is not None)
    finally:
        with suppress(psutil.NoSuchProcess):
            rank.resume()
    return scaled


def test_every_prompt_is_trained_once_per_epoch_within_the_bound(streamed):
    run_dir, _ = streamed
    stale = []
    for t in (1, 2):
        rows = pq.read_table(run_dir / f"iter_{t}/train.parquet").to_pylist()
        assert len(rows) == 48
        assert len({(row["prompt_id"], row["epoch"]) for row in rows}) == 48
        stale += [row["consumed_version"] - row["policy_version"] for row in rows]
        assert {field.name for field in CONSUMED} <= rows[0].keys()
    assert set(stale) == {0, 1}  # within the bound, and at once: some groups outlived a publish
    assert manifest(run_dir)["groups_trained"] == 96


def test_every_version_is_served_by_every_worker_with_the_learner_s_checksum(streamed):
    run_dir, _ = streamed
    served = [line for line in metrics(run_dir) if line.get("event") == "publish"]
    versions = [line["version"] for line in served]
    assert versions == sorted(set(versions))
    assert versions[-1] == 12  # 2 slices x 2 epochs x 3 batches
    joins = [set(line["workers"]) for line in served]
    assert (joins[0], joins[-1]) == ({"rollout-0"}, {"rollout-0", "rollout-1"})
    assert all(before <= after for before, after in itertools.pairwise(joins))
    for line in served:
        newer = {worker["checksum"] for worker in line["workers"].values() if worker["version"] > line["version"]}
        assert {worker["checksum"] for worker in line["workers"].values()} - newer <= {line["checksum"]}
    compared = [line for line in served if "mismatch" in line]  # engine against learner, where all serve one version
    assert compared
    for line in compared:
        assert line["mismatch"]["max_abs_per_token"] < 1e-4
        assert not line["mismatch_alarm"]


def test_steps_report_their_staleness(streamed):
    steps = [line for line in metrics(streamed[0]) if "step" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:
        assert 0 <= line["staleness_mean"] <= line["staleness_max"] <= 1
        shares = [line[f"loss_staleness_{lag}"] for lag in (0, 1) if f"loss_staleness_{lag}" in line]
        assert min(shares) <= line["loss"] + 1e-9 <= max(shares) + 2e-9
    # The first update compares pi_0 with what pi_0 recorded at sampling: the log-ratio is the engines' difference.
    assert abs(steps[0]["delta_w"]) < 1e-3


def test_every_metric_is_explained_and_there_is_none_but_these(whole, streamed):
    assert not unexplained(streamed[0])
    written = metric_names(whole[0]) | metric_names(streamed[0])
    for (event, name), pattern in explained_metrics().items():
        if event == "failed":  # neither did: test_bad_data.py
            continue
        assert any(of == event and re.fullmatch(pattern, other) for of, other in written), name


def test_a_rollout_worker_and_a_judge_joined_while_it_ran(streamed):
    run_dir, output = streamed
    assert "judge-1 joins" in output
    assert "rollout-1 joins" in output
    scaled = [(line["role"], line["workers"]) for line in metrics(run_dir) if line.get("event") == "scale"]
    assert sorted(scaled) == [("judge", 2), ("rollout", 2)]
    assert "rollout-1 serves version" in (run_dir / "logs/rollout-1.log").read_text()
