"""A rank of the learner is stopped (it hangs), another time killed: the weights are those of a run without faults."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file

from actors.access import stay_on_loopback
from actors.learner import LearnerActor
from actors.learner_process import LearnerProcess
from actors.process import environment
from actors.weights import WeightsHub
from sppo_ray.layout import Layout, RoleLayout
from tests.actors import conftest, learner_factory
from tests.actors.learner_factory import config_for, run_ranks, write_tiny_policy

TIMEOUT_S = 90  # a rank that starts on a busy machine, imports and all, must not come near it
ROLE = RoleLayout(1, 0, 0.1)
LAYOUT = Layout(kind="cpu", rollout=ROLE, judge=ROLE, learner=RoleLayout(2, 0, 0.1), nodes=1)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """The actor tests' Ray if it is up, else our own."""
    if ray.is_initialized():
        yield
        return
    stay_on_loopback()
    env = {"PYTHONPATH": str(conftest.ROOT), **environment(gpus=False, threads=1)}
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
    yield
    ray.shutdown()


@pytest.mark.timeout(900)
async def test_a_rank_that_hangs_is_named_and_one_that_dies_is_replaced(ray_here: None, tmp_path: Path) -> None:
    policy, run_dir = tmp_path / "policy", tmp_path / "run"
    write_tiny_policy(policy)
    run_ranks("learner_script_probe.py", policy, tmp_path / "undisturbed", 2)
    config = config_for(run_dir, policy, num_workers=2, checkpoint_every=1, max_restarts=2, timeout_s=TIMEOUT_S)
    checkpoints = run_dir / "checkpoints" / "learner"
    ray.cloudpickle.register_pickle_by_value(learner_factory)  # the workers cannot import it
    scripted = ray.remote(learner_factory.ScriptedBuffer).options(num_cpus=0)
    buffer = scripted.remote(str(policy), hold_at=(1, 3), checkpoints=str(checkpoints))
    hub = ray.remote(WeightsHub).options(num_cpus=0).remote(config)
    learner = LearnerProcess(
        ray.remote(LearnerActor).options(num_cpus=0).remote(config, LAYOUT, buffer, hub),
        buffer,
        config.learner.timeout_s,
    )

    await buffer.holds.remote()
    stopped = rank_process(run_dir, 1)
    os.kill(stopped.pid, signal.SIGSTOP)
    while stopped.status() != psutil.STATUS_STOPPED:
        await asyncio.sleep(0.01)
    await buffer.release.remote()  # rank 0 goes on, and waits for rank 1 in the publish
    await buffer.holds.remote()  # at step 3, after a restart at step 1
    assert psutil.wait_procs([stopped], timeout=60)[1] == []
    said = (run_dir / "logs" / "learner.log").read_text()
    assert re.search(
        r"learner-1 did not reach step [12] \(it was last seen at step [01], [a-z ]+\) "  # its last word may be of before
        rf"within {TIMEOUT_S} s; learner-0 waited\. Where it hung: .*learner-1\.stacks\.txt",
        said,
    ), said
    assert "learner_loop (actors/learner.py" in (run_dir / "logs" / "learner-1.stacks.txt").read_text()

    os.kill(rank_process(run_dir, 1).pid, signal.SIGKILL)
    last = await learner.train(2)
    await learner.join(60)
    asked, steps, _ = await buffer.seen.remote()
    # A publish first at 1 and 3, a reference at 0 and 2; at 1 and 3 once more, after the restarts.
    assert asked == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    weights = load_file(Path(last.policy_dir) / "model.safetensors")
    undisturbed = load_file(tmp_path / "undisturbed" / "script version 4.safetensors")
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def rank_process(run_dir: Path, rank: int) -> psutil.Process:
    """The process that writes the rank's log."""
    log = run_dir / "logs" / f"learner-{rank}.log"
    found = []
    for process in psutil.process_iter():
        try:
            if os.path.realpath(f"/proc/{process.pid}/fd/1") == str(log) and "RayTrainWorker" in process.cmdline()[0]:
                found.append(process)
        except (OSError, psutil.Error, IndexError):
            continue  # it ended meanwhile, or is not ours
    (one,) = found
    return one
