"""A run directory belongs to one config; its manifest counts over all attempts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from groups import config
from typer.testing import CliRunner

from actors.tally import Tally
from sppo_ray import storage
from sppo_ray.cli import app
from sppo_ray.errors import ConfigError
from sppo_ray.run_dir import check_run_dir, claim, claimed, read_manifest, update_manifest
from sppo_ray.storage import Storage, StorageError
from sppo_ray.types import Look


def test_a_claimed_directory_takes_the_same_config_again(tmp_path):
    root = tmp_path / "run"
    check_run_dir(config(root))
    assert not root.exists()
    claim(config(root), {"prompts": {"kept": 3}})
    check_run_dir(config(root))
    started = read_manifest(root)["started"]
    claim(config(root), {"prompts": {"kept": 3}})
    manifest = read_manifest(root)
    assert manifest["started"] == started
    assert len(manifest["resumed"]) == 1
    assert manifest["fidelity"] == "paper"
    assert manifest["overrides_of_preset"]["learner.batch_size"] == {"preset": 64, "used": 4}
    assert manifest["versions"]["ray"]


def test_a_run_begun_before_there_was_a_key_goes_on_with_its_default(tmp_path):
    claim(config(tmp_path), {})
    path = tmp_path / "config.yaml"
    begun = yaml.safe_load(path.read_text())
    del begun["evaluation"]["column"], begun["judge"]["allow_pickle"]
    path.write_text(yaml.safe_dump(begun))
    check_run_dir(config(tmp_path))
    with pytest.raises(ConfigError, match=r"evaluation\.column was 'prompt', is 'text'"):
        check_run_dir(config(tmp_path, evaluation__column="text"))


def test_another_config_is_refused_by_key(tmp_path):
    claim(config(tmp_path), {})
    with pytest.raises(ConfigError, match=r"objective\.eta was 1000\.0, is 10\.0"):
        check_run_dir(config(tmp_path, objective__eta=10))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "run: [unclosed"),
        ("config.yaml", "just text"),
        ("config.yaml", "x: &a {b: *a}"),
        ("config.yaml", "x: !!bool maybe"),
        ("manifest.json", "{"),
        ("manifest.json", "[]"),
        ("manifest.json", "[" * 100_000),
        ("manifest.json", '{"sources": null}'),
        ("manifest.json", '{"sources": [1]}'),
    ],
)
def test_a_damaged_record_is_refused_by_name(tmp_path, name, content):
    claim(config(tmp_path), {})
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name} (is damaged|holds)"):
        check_run_dir(config(tmp_path))


def test_a_refusal_says_what_may_change(tmp_path):
    claim(config(tmp_path), {})
    with pytest.raises(
        ConfigError, match=r"(?s)What may change .*\n  rollout\.num_workers.*cluster\.\*.* but weights\.publish_every"
    ):
        check_run_dir(config(tmp_path, objective__eta=10))


def test_what_changes_speed_only_may_change(tmp_path):
    claim(config(tmp_path), {})
    check_run_dir(config(tmp_path, rollout__num_workers=3, cluster__threads=2, learner__num_workers=2))


def test_sources_may_move_but_not_change(tmp_path):
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).write_text(text)
    claim(config(tmp_path / "run", data__prompts=str(tmp_path / "a")), {})
    check_run_dir(config(tmp_path / "run", data__prompts=str(tmp_path / "b")))
    for name, wrong in (("c", "its content is not what it was"), ("d", "not there")):
        with pytest.raises(ConfigError, match=rf"data\.prompts='{tmp_path / name}': {wrong}"):
            check_run_dir(config(tmp_path / "run", data__prompts=str(tmp_path / name)))
    update_manifest(tmp_path / "run", sources={"another.key": "1"})  # of another version
    with pytest.raises(ConfigError, match=r"another\.key=None: not there"):
        check_run_dir(config(tmp_path / "run", data__prompts=str(tmp_path / "a")))


def full_for(writes, monkeypatch) -> None:
    """A disk that refuses the next so many files."""
    refusals = iter([OSError(errno.ENOSPC, "No space left on device")] * writes)

    def replace(source, target, real=os.replace):
        if error := next(refusals, None):
            raise error
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)


def test_a_full_disk_is_waited_for(tmp_path, monkeypatch, caplog):
    full_for(3, monkeypatch)
    with claimed(config(tmp_path, run__storage_patience_s=60), {}):
        assert "the run pauses" in caplog.text
        assert read_manifest(tmp_path)["status"] == "running"
    full_for(3, monkeypatch)
    update_manifest(tmp_path, Storage(60.0), status="done")
    assert read_manifest(tmp_path)["status"] == "done"


def test_a_disk_that_stays_full_is_said(tmp_path, monkeypatch):
    full_for(1, monkeypatch)
    with pytest.raises(StorageError, match=r"config\.yaml.*No space left.*free some space"):
        claim(config(tmp_path, run__storage_patience_s=0), {})
    claim(config(tmp_path), {})
    full_for(1, monkeypatch)
    with pytest.raises(StorageError, match=r"manifest\.json.*No space left.*free some space"):
        update_manifest(tmp_path, Storage(0.0), status="done")


def test_the_same_command_begins_a_run_that_was_stopped_before_its_config_was_written(tmp_path, monkeypatch):
    cfg = config(tmp_path, run__storage_patience_s=0)
    full_for(1, monkeypatch)
    with pytest.raises(StorageError, match="No space left"), claimed(cfg, {}):
        pass
    (tmp_path / ".config.yaml.7.0.tmp").touch()  # of a process that was killed
    assert not (tmp_path / "config.yaml").exists()
    check_run_dir(cfg)
    with claimed(cfg, {}):
        assert read_manifest(tmp_path)["status"] == "running"


def test_a_run_directory_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ConfigError, match=r"cannot be read .Permission denied.*another directory"):
        check_run_dir(config(tmp_path))
    claim(config(tmp_path), {})
    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read .Permission denied"):
        check_run_dir(config(tmp_path))


def test_a_run_directory_that_may_not_be_searched_is_refused(tmp_path, monkeypatch):
    asked = Path.stat

    def denied(path, **options):
        if path.parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return asked(path, **options)

    named = config(tmp_path)
    monkeypatch.setattr(Path, "stat", denied)
    with pytest.raises(ConfigError, match=r"config.yaml' cannot be used as a path .Permission denied"):
        check_run_dir(named)
    result = CliRunner().invoke(app, ["train", "--resume", f"run.dir={tmp_path}"])
    assert (result.exit_code, "(Permission denied)" in result.stderr) == (2, True), result.output


def test_what_ended_a_run_is_not_hidden_by_its_full_disk(tmp_path, monkeypatch):
    claim(config(tmp_path), {})
    full_for(1, monkeypatch)
    with pytest.raises(OSError, match="No space left"):  # which the driver passes over
        update_manifest(tmp_path, status="failed")


def test_one_process_at_a_time(tmp_path):
    with claimed(config(tmp_path / "run"), {}):
        lines = (
            "from groups import config",
            "from sppo_ray.run_dir import claimed",
            f"with claimed(config({str(tmp_path / 'run')!r}), {{}}): pass",
        )
        command = [sys.executable, "-c", "\n".join(lines)]
        other = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        assert "is in use by another process" in other.stderr
    with claimed(config(tmp_path / "run"), {}):
        assert len(read_manifest(tmp_path / "run")["resumed"]) == 1


def test_a_foreign_directory_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="not empty"):
        check_run_dir(config(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        check_run_dir(config(tmp_path / "thesis.tex"))


def test_manifest_update_keeps_the_rest(tmp_path):
    claim(config(tmp_path), {})
    update_manifest(tmp_path, status="done", groups_trained=5)
    manifest = read_manifest(tmp_path)
    assert (manifest["status"], manifest["groups_trained"], manifest["seed"]) == ("done", 5, 7)


@pytest.mark.parametrize(("written", "held", "expected"), [(9, 48, 50), (60, 48, 62), (None, 0, 2)])
def test_what_is_on_disk_was_sampled(tmp_path, written, held, expected):
    """A driver that was killed has not always written its counts."""
    claim(config(tmp_path), {})
    update_manifest(tmp_path, **{} if written is None else {"groups_sampled": written})
    claim(config(tmp_path), {})
    now = SimpleNamespace(rollout=SimpleNamespace(restarts=1, lost_groups=0), judge=SimpleNamespace(restarts=0))
    Tally(tmp_path, held).keep(now, SimpleNamespace(groups=2))
    assert read_manifest(tmp_path)["groups_sampled"] == expected
    assert read_manifest(tmp_path)["restarts"] == {"rollout": 1, "judge": 0, "learner": 0, "run": 1}


def test_counts_go_on_over_all_attempts(tmp_path):
    progress = SimpleNamespace(groups=5)
    for attempt in range(1, 4):
        claim(config(tmp_path), {})
        tally = Tally(tmp_path, held=0)
        tally.seen = Look({}, "", learner_restarts=1, updates_repeated=2)
        rollout = SimpleNamespace(restarts=1, lost_groups=4)
        tally.keep(SimpleNamespace(rollout=rollout, judge=SimpleNamespace(restarts=3)), progress)
        found = read_manifest(tmp_path)
        assert found["restarts"] == {"rollout": attempt, "judge": 3 * attempt, "learner": attempt, "run": attempt - 1}
        assert (found["groups_sampled"], found["updates_repeated"]) == (9 * attempt, 2 * attempt)


@pytest.mark.parametrize("fault", ["unreadable", "gone"])
def test_a_manifest_that_a_file_server_does_not_show_is_neither_an_end_nor_begun_anew(tmp_path, monkeypatch, fault):
    claim(config(tmp_path), {})
    tally, now = (
        Tally(tmp_path, held=0),
        SimpleNamespace(rollout=SimpleNamespace(restarts=1, lost_groups=0), judge=SimpleNamespace(restarts=0)),
    )
    path = tmp_path / "manifest.json"
    before = path.read_text()

    def away(*_, **__):
        raise OSError(errno.EIO if fault == "unreadable" else errno.ENOENT, "away")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", away)
        if fault == "gone":
            patch.setattr(Path, "exists", lambda self: False)
        tally.keep(now, SimpleNamespace(groups=2))
    assert path.read_text() == before
    tally.keep(now, SimpleNamespace(groups=2))
    assert read_manifest(tmp_path)["restarts"]["rollout"] == 1


def test_the_end_of_a_run_waits_until_the_manifest_is_there(tmp_path, monkeypatch):
    claim(config(tmp_path), {})
    path, kept = tmp_path / "manifest.json", tmp_path / "away.json"
    path.rename(kept)
    said = []

    def back(text):
        said.append(text)
        if kept.exists():
            kept.rename(path)

    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.001)
    update_manifest(tmp_path, Storage(60.0, back), status="done")
    assert read_manifest(tmp_path)["status"] == "done"
    assert read_manifest(tmp_path)["seed"] == 7
    assert "cannot write the manifest" in said[0]
