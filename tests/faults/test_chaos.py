"""Every kind of process of a run is killed, and what the run made is compared with an undisturbed one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.actors.job_runs import LIMIT_S, PROMPTS, ROOT, SLOW, SMALL, manifest, wait_for

KINDS = ("rollout", "judge", "buffer", "weights", "learner", "controller", "driver", "power")
CHAOS_LIMIT_S = 3 * LIMIT_S  # after most kills all actors start again


@pytest.mark.timeout(LIMIT_S + CHAOS_LIMIT_S + 60)
def test_every_kind_is_killed_and_the_tables_and_weights_are_the_same(whole, tmp_path):
    """On two nodes, with vLLM's engine in a process of its own, as on GPUs."""
    options = ["--nodes=2", "learner.checkpoint_every=1", "rollout.engine=async"]
    kinds = (*KINDS, "engine", "node")
    found = after_chaos(tmp_path, "tiny_cpu", kinds, undisturbed=whole[0], seed=3, options=options)
    assert_all_is_counted(found, groups=2 * PROMPTS)


@pytest.mark.timeout(2 * LIMIT_S)
def test_a_worker_that_dies_while_it_starts_is_started_again_and_so_are_all_with_the_hub(tmp_path):
    sys.path.insert(0, str(ROOT / "scripts/bench"))
    import kills

    run = kills.Run(ROOT / "configs/tiny_cpu.yaml", tmp_path / "run", [*SMALL, "schedule.iterations=1", "data.limit=8"])
    try:
        wait_for(lambda: run.victims("judge"))
        (starting,) = run.victims("judge")
        assert not run.victims("judge", started=True)
        starting.kill()
        wait_for(lambda: set(run.victims("judge")) - {starting} and run.victims("rollout"))
        run.victims("weights")[0].kill()
        run.wait()
    finally:
        with suppress(psutil.NoSuchProcess):
            run.process.kill()
    assert manifest(tmp_path / "run")["status"] == "done"
    assert "starting all actors again" in run.log.read_text()


@pytest.mark.timeout(LIMIT_S + CHAOS_LIMIT_S + 60)
def test_async_every_kind_is_killed_and_the_bound_holds(whole, tmp_path):
    """A publish and a checkpoint after every update, two ranks, two epochs, groups up to two versions old; in the Ray that a run
    starts."""
    options = [
        "learner.epochs=2",
        "learner.checkpoint_every=1", "weights.publish_every=1", "schedule.max_staleness=2", "learner.num_workers=2",
    ]  # fmt: skip
    found = after_chaos(tmp_path, "tiny_cpu_async", KINDS, undisturbed=whole[0], seed=4, options=options)
    assert_all_is_counted(found, groups=2 * 2 * PROMPTS)


def after_chaos(
    out: Path, config: str, kinds: Sequence[str], undisturbed: Path, seed: int, options: list[str]
) -> list[dict[str, Any]]:
    """Manifests of the runs that were disturbed. chaos.py compares them with the undisturbed one: exit code 1 if they differ."""
    command = [
        sys.executable, "scripts/bench/chaos.py", f"--kills={len(kinds)}", f"--seed={seed}", f"--out={out}",
        f"--config=configs/{config}.yaml", f"--undisturbed={undisturbed}", "--pause", "0.5", "2", *SMALL, *SLOW, *options,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHAOS_LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in kinds:
        assert f"killed {kind}" in done.stderr
    return [manifest(folder) for folder in out.glob("disturbed-*") if folder.is_dir()]


def assert_all_is_counted(found: list[dict[str, Any]], groups: int) -> None:
    assert sum(run["restarts"]["run"] for run in found) >= 2  # by driver and power at least
    assert all(run["groups_generated"] == run["groups_judged"] == run["groups_trained"] == groups for run in found)
    assert all(run["groups_sampled"] == run["groups_generated"] + run["groups_regenerated"] for run in found)
