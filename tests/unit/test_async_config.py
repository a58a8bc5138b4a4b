"""What async refuses before anything starts: key, value and remedy are named, the exit code is 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sppo_ray.cli import app
from sppo_ray.config_io import load_config
from sppo_ray.errors import ConfigError
from sppo_ray.layout import compute_layout

ROOT = Path(__file__).parents[2]
ASYNC, SYNC = ROOT / "configs/tiny_cpu_async.yaml", ROOT / "configs/tiny_cpu.yaml"
REFUSED = [
    (ASYNC, ["schedule.max_staleness=-1"], ["schedule.max_staleness=-1"]),
    (ASYNC, ["weights.publish_every=0"], ["weights.publish_every", "0"]),
    (
        ASYNC,
        ["schedule.batch_order=slice"],
        ["weights.publish_every=4 breaks the staleness bound", "publish_every=slice"],
    ),
    (ASYNC, ["cluster.layout=colocated"], ["cluster.layout=colocated", "schedule.mode=sync"]),
    (
        ASYNC,
        ["learner.checkpoint_every=6"],
        ["learner.checkpoint_every=6", "weights.publish_every=4", "checkpoint_every=8"],
    ),
    (ASYNC, ["weights.channel=nccl"], ["weights.channel=nccl", "cluster.gpus=0"]),
    (ASYNC, ["weights.channel=nccl", "cluster.gpus=8"], ["weights.at_once=0.34", "weights.at_once=1"]),
    (ASYNC, ["rollout.seeds=reference"], ["rollout.seeds=reference", "learner.epochs=3", "rollout.seeds=derived"]),
    (SYNC, ["weights.publish_every=4"], ["weights.publish_every=4", "schedule.mode=async"]),
    (SYNC, ["objective.snapshot_every=4"], ["objective.snapshot_every=4", "schedule.mode=async"]),
    (SYNC, ["weights.channel=nccl"], ["weights.channel=nccl", "schedule.mode=sync"]),
]


@pytest.mark.parametrize(("path", "overrides", "named"), REFUSED, ids=[", ".join(o) for _, o, _ in REFUSED])
def test_refused(path, overrides, named):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    for text in named:
        assert text in str(error.value)


def test_a_layout_that_leaves_no_learner(tmp_path):
    config = load_config(ASYNC, ["cluster.gpus=2", "rollout.num_workers=2"])
    with pytest.raises(ConfigError, match=r"leaves 0 of cluster\.gpus=2 for learner\.num_workers=1"):
        compute_layout(config)


def test_prompts_that_would_be_cut_have_no_recorded_log_probabilities(tmp_path):
    """The longest prompt of the tiny world has 22 tokens."""
    arguments = ["train", "--config", str(ASYNC), f"run.dir={tmp_path / 'run'}", "--dry-run"]
    refused = CliRunner().invoke(app, [*arguments, "learner.max_prompt_length=20"])
    assert refused.exit_code == 2
    said = " ".join(refused.output.split())
    assert "objective.reference=behavior" in said
    assert "exceed learner.max_prompt_length=20" in said
    assert not (tmp_path / "run").exists()
    allowed = CliRunner().invoke(app, [*arguments, "learner.max_prompt_length=20", "objective.reference=snapshot"])
    assert allowed.exit_code == 0, allowed.output


def test_null_means_what_suits_the_schedule():
    sync, streamed = load_config(SYNC), load_config(SYNC, ["schedule.mode=async"])
    assert (sync.publish_every, sync.reference) == ("slice", "snapshot")
    assert (streamed.publish_every, streamed.reference) == (8, "behavior")
