"""Every bad config, data set and model folder of tests/bad, by the door a user comes in: refused with its message, exit
code 2, and nothing written or started."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sppo_ray.cli import app
from tests.bad import cases

BAD = Path(__file__).parents[1] / "bad"
CONFIGS = sorted((BAD / "configs").glob("*.yaml"))
GOOD = BAD / "good.yaml"


def refused(tmp_path: Path, config: Path, expected: tuple[str, ...], *overrides: str) -> None:
    assert expected
    before = sorted(path for path in tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["train", "--config", str(config), *overrides])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("refused: ")
    assert "Traceback" not in result.output
    for part in expected:
        assert part in result.stderr
    assert sorted(path for path in tmp_path.rglob("*")) == before  # no run directory, nothing beside the input


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever comes as far as starting Ray finds no module to start it with."""
    monkeypatch.setitem(sys.modules, "actors.train", None)  # an ImportError


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    first = path.read_bytes().splitlines()
    expected = tuple(line.decode()[len("# expect: ") :] for line in first if line.startswith(b"# expect: "))
    about_the_folder = path.stem in (
        "empty_run_dir",
        "run_dir_is_a_bucket",
        "run_dir_below_a_file",
        "key_twice",
        "huge_number",
    )
    monkeypatch.chdir(BAD.parents[1])
    refused(tmp_path, path, expected, *([] if about_the_folder else [f"run.dir={tmp_path / 'run'}"]))
    assert not (BAD.parents[1] / "runs" / "bad").exists()


@pytest.mark.parametrize("name", cases.JSONL)
def test_jsonl(tmp_path: Path, name: str) -> None:
    source = BAD / "data" / f"{name}.jsonl"
    refused(tmp_path, GOOD, cases.JSONL[name], f"run.dir={tmp_path / 'run'}", f"data.prompts={source}")


@pytest.mark.parametrize("name", cases.PARQUET)
def test_parquet(tmp_path: Path, name: str) -> None:
    make, expected = cases.PARQUET[name]
    make(path := tmp_path / f"{name}.parquet")
    refused(tmp_path, GOOD, expected, f"run.dir={tmp_path / 'run'}", f"data.prompts={path}")


@pytest.mark.parametrize(
    ("role", "name"), [("policy", name) for name in cases.POLICY] + [("judge", name) for name in cases.JUDGE]
)
def test_model_folders(tmp_path: Path, role: str, name: str) -> None:
    spoil, expected = {"policy": cases.POLICY, "judge": cases.JUDGE}[role][name]
    spoil(folder := Path(shutil.copytree(cases.ASSETS / role, tmp_path / role)))
    refused(tmp_path, GOOD, (str(folder), *expected), f"run.dir={tmp_path / 'run'}", f"{role}.model={folder}")


def test_the_config_that_all_of_them_spoil_is_good(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", "--dry-run", "--config", str(GOOD), f"run.dir={tmp_path / 'run'}"])
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()


def test_the_corpus_is_whole() -> None:
    """Each file is a case, each case is a file."""
    assert {path.stem for path in (BAD / "data").iterdir()} == cases.JSONL.keys() | {"good"}
    assert len(CONFIGS) + len(cases.JSONL) + len(cases.PARQUET) + len(cases.POLICY) + len(cases.JUDGE) >= 60
