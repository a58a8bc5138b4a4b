"""`sppo scale`: counts are absolute or relative, what cannot be is refused, and the file is what the driver reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpu_configs import gpu_config
from groups import config
from typer.testing import CliRunner

from sppo_ray.cli import app
from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.run_dir import claim, update_manifest
from sppo_ray.scaling import FILE, Desired, apply, desired, refuse_impossible


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The directory of a running async job with two rollout workers and one judge."""
    claim(config(tmp_path, schedule__mode="async", rollout__num_workers=2), {})
    return tmp_path


def scale(root: Path, *changes: str) -> str:
    """Output of an accepted `sppo scale`."""
    result = CliRunner().invoke(app, ["scale", "--run", str(root), *changes])
    assert result.exit_code == 0, result.output
    return result.output


def refused(root: Path, *changes: str) -> str:
    """The message of a refused one, which leaves the file as it was."""
    before = (root / FILE).read_text() if (root / FILE).exists() else None
    result = CliRunner().invoke(app, ["scale", "--run", str(root), *changes])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("refused: ")
    assert ((root / FILE).read_text() if (root / FILE).exists() else None) == before
    return result.stderr


def counts(root: Path) -> tuple[int, int]:
    asked = json.loads((root / FILE).read_text())
    return asked["rollout"], asked["judge"]


@pytest.mark.parametrize(
    "change", ["rollout=104092", "judge=+4096", "rollout=99999999999999999999", f"rollout={'9' * 5000}"]
)
def test_a_typo_is_no_request(run: Path, change: str) -> None:
    assert len(refused(run, change)) < 500


def test_a_file_that_asks_for_too_many_is_refused_by_who_reads_it(run: Path) -> None:
    (run / FILE).write_text('{"rollout": 5000, "judge": 1}')
    with pytest.raises(ConfigError, match="rollout: Input should be less than or equal to 4096"):
        desired(run, config(run))


def test_relative_changes_count_from_what_is_desired_now(run: Path) -> None:
    output = " ".join(scale(run, "rollout=+2").split())
    assert counts(run) == (4, 1)  # from the config's
    assert "asked for 4 rollout and 1 judge workers (before: 2 and 1)" in output
    assert "within seconds" in output
    scale(run, "judge=3", "rollout=-1")
    assert counts(run) == (3, 3)  # from the file's
    scale(run, "rollout=5", "judge=-2")
    assert counts(run) == (5, 1)


def test_changes_of_one_role_apply_in_order() -> None:
    now = apply(Desired(rollout=1, judge=3), ["rollout=+2", "judge=-1", "rollout=4", "rollout=+1"])
    assert (now.rollout, now.judge) == (5, 2)


def test_asking_again_is_a_new_request(run: Path) -> None:
    scale(run, "rollout=3")
    first = desired(run, config(run))
    scale(run, "rollout=3")
    again = desired(run, config(run))
    assert (first.rollout, first.judge) == (again.rollout, again.judge) == (3, 1)
    assert first != again


@pytest.mark.parametrize("change", ["rollout", "rollout=", "rollout=two", "rollout=1.5", "rollout=+-1", "=3"])
def test_what_is_not_a_count(run: Path, change: str) -> None:
    assert f"{change!r} is not of the form role=N" in refused(run, change)


def test_the_learner_is_not_scaled(run: Path) -> None:
    assert "learner workers cannot be added or removed; these can: rollout, judge" in refused(run, "learner=2")


@pytest.mark.parametrize(("change", "left"), [("rollout=0", 0), ("rollout=-2", 0), ("rollout=-5", -3)])
def test_the_last_worker_stays(run: Path, change: str, left: int) -> None:
    assert f"{change!r} leaves {left} rollout workers" in refused(run, change)


def test_not_a_run_directory(tmp_path: Path) -> None:
    assert "is not a run directory" in refused(tmp_path / "nothing", "rollout=2")
    assert not (tmp_path / "nothing").exists()


def test_a_run_that_has_ended(run: Path) -> None:
    update_manifest(run, status="done")
    assert "is not running (its manifest says done)" in refused(run, "rollout=2")


def test_a_synchronous_run(tmp_path: Path) -> None:
    claim(config(tmp_path), {})
    assert "schedule.mode=sync" in refused(tmp_path, "rollout=2")
    update_manifest(tmp_path, status="done")
    assert "is not running" in refused(tmp_path, "rollout=2")  # not: stop it


def on_gpus(rollouts: int, judges: int) -> Config:
    return gpu_config(8, (rollouts, 4, judges), {"schedule": {"mode": "async"}}, layout="disaggregated")


def test_the_gpus_bound_the_counts() -> None:
    refuse_impossible(on_gpus(2, 1), Desired(rollout=3, judge=1))  # 3 + 4 + 1 = 8
    refuse_impossible(on_gpus(3, 1), Desired(rollout=2, judge=2))
    with pytest.raises(ConfigError, match=r"rollout=4, judge=1 and 4 learner ranks need 9 GPUs.*gpus=8"):
        refuse_impossible(on_gpus(3, 1), Desired(rollout=4, judge=1))  # though a run started so would share GPUs
    with pytest.raises(ConfigError, match=r"judge=2 .*need 9 GPUs"):
        refuse_impossible(on_gpus(3, 1), Desired(rollout=3, judge=2))


def test_judges_that_share_the_rollouts_gpus() -> None:
    started = on_gpus(4, 1)  # 4 + 4 are all GPUs
    refuse_impossible(started, Desired(rollout=4, judge=4))
    with pytest.raises(ConfigError, match="judge=5 but rollout=4"):
        refuse_impossible(started, Desired(rollout=4, judge=5))
    with pytest.raises(ConfigError, match="rollout=5 and 4 learner ranks need 9 GPUs"):
        refuse_impossible(started, Desired(rollout=5, judge=1))


def test_without_gpus_there_is_no_bound_but_the_configs(run: Path) -> None:
    scale(run, "rollout=50", "judge=4096")
    assert counts(run) == (50, 4096)


def test_more_than_the_gpus_on_the_command_line(tmp_path: Path) -> None:
    given = on_gpus(3, 1)
    claim(given.model_copy(update={"run": given.run.model_copy(update={"dir": str(tmp_path)})}), {})
    assert "need 9 GPUs" in refused(tmp_path, "rollout=+1")
    scale(tmp_path, "rollout=-1", "judge=+1")
    assert counts(tmp_path) == (2, 2)


@pytest.mark.parametrize("text", ['{"rollout": 2', '{"rollout": 0, "judge": 1}', '{"rollout": 2}', "[]", '"x"'])
def test_a_file_written_by_hand_that_makes_no_sense(run: Path, text: str) -> None:
    (run / FILE).write_text(text)
    with pytest.raises(ConfigError, match=FILE):
        desired(run, config(run))
