"""The power fails at a chosen point of the work; the run goes on from its directory alone, and nothing is lost, doubled or
different.

A process that is stopped (SIGSTOP) holds the run where its answer is needed. Then everything is killed.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sppo_ray.attempts import progress_of
from sppo_ray.config_io import load_config
from sppo_ray.metrics import read_metrics
from tests.actors.job_runs import LIMIT_S, PROMPTS, ROOT, SLOW, SMALL, manifest, shards, steps

sys.path.insert(0, str(ROOT / "scripts/bench"))
import chaos
import kills

ANY = random.Random(0)  # which of several is killed; of the power, all
pytestmark = pytest.mark.timeout(3 * LIMIT_S)


def test_it_fails_while_a_run_samples_judges_trains_and_saves(whole, tmp_path):
    with a_run("tiny_cpu", tmp_path / "run", "learner.checkpoint_every=1") as run:
        folder = run.folder
        hold(run, "rollout", when=lambda: shards(folder, 1) >= 1)
        power_fails(run)
        sampled = shards(folder, 1)
        hold(run, "judge", when=lambda: shards(folder, 1) > sampled)
        power_fails(run)
        assert shards(folder, 1) < PROMPTS
        hold(run, "learner", when=lambda: steps(folder) >= 1)
        power_fails(run)
        assert not (folder / "iter_1/trained.json").exists()
        # Everybody has started by then, but nothing was published yet.
        hold(run, "weights", when=lambda: run.log.read_text().count("sampling and judging") == 4)
        until(run, (folder / "iter_1/policy").exists)
        power_fails(run)  # the policy is on disk, but neither published nor on record as trained
        assert not (folder / "iter_1/trained.json").exists()
    assert_as_undisturbed(folder, whole[0], restarts=4)


def test_it_fails_between_publish_and_checkpoint(whole, tmp_path):
    """Groups sampled from a policy that is lost with the learner's memory are on disk. Its updates are done again, on the same
    batches; those groups are trained on too, once."""
    with a_run("tiny_cpu_async", tmp_path / "run", "weights.publish_every=1") as run:
        folder = run.folder
        hold(run, "learner", when=lambda: "publish" in events(folder))
        until(run, lambda: max(versions_sampled(folder), default=0) >= 1)
        power_fails(run)
        assert not (folder / "checkpoints").exists()
        assert not (folder / "iter_1/trained.json").exists()
    assert_as_undisturbed(folder, whole[0], restarts=1)


@contextmanager
def a_run(config: str, folder: Path, *options: str) -> Iterator[kills.Run]:
    """Waits for its end."""
    run = kills.Run(ROOT / f"configs/{config}.yaml", folder, [*SMALL, *SLOW, *options])
    try:
        yield run
        run.wait()
    finally:
        if not run.over:
            kills.strike(run, "power", ANY)


def hold(run: kills.Run, kind: str, when: Callable[[], object]) -> None:
    """Stops the process of that kind as soon as `when`; returns when the run has come to wait for it."""
    (process,) = until(run, lambda: run.victims(kind))
    until(run, when)
    process.suspend()
    before, now = None, progress_of(run.folder)
    while before != now:
        time.sleep(3)
        before, now = now, progress_of(run.folder)


def until(run: kills.Run, found: Callable[[], Any]) -> Any:
    """What is found in the end, of a run that goes on."""
    while not (there := found()):
        assert not run.over, run.log.read_text()
        time.sleep(0.02)
    return there


def power_fails(run: kills.Run) -> None:
    """Everything is killed, what is starting as well; then the user goes on."""
    assert kills.strike(run, "power", ANY)
    run.process.wait()
    run.start(resume=True)


def events(folder: Path) -> set[str]:
    return {line["event"] for line in read_metrics(folder / "metrics.jsonl") if "event" in line}


def versions_sampled(folder: Path) -> set[int]:
    """Of the groups that are on disk but in no table yet."""
    found = set()
    for shard in folder.glob("iter_*/ledger/shard-*.parquet"):
        with suppress(FileNotFoundError):  # sealed just now
            found |= set(pq.read_table(shard, columns=["policy_version"])["policy_version"].to_pylist())
    return found


def assert_as_undisturbed(folder: Path, undisturbed: Path, restarts: int) -> None:
    verdict = chaos.compare(load_config(folder / "config.yaml"), folder, undisturbed)
    assert verdict.ok, verdict
    record = manifest(folder)
    assert record["status"] == "done"
    assert record["restarts"]["run"] == restarts
