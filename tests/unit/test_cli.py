"""The command line as a user meets it: refusals are one paragraph, exit code 2, and leave nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from sppo_ray.cli import _refuse_unfit, app
from sppo_ray.config_io import load_config
from sppo_ray.errors import ConfigError
from sppo_ray.run_dir import claim
from tests.unit.gpu_configs import gpu_config

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "sppo_ray" / "assets"


@pytest.fixture
def refused(tmp_path):
    """Runs `sppo train` with overrides that must be refused; returns the message."""

    def run(*overrides: str, config: str = str(ROOT / "configs/tiny_cpu.yaml")) -> str:
        run_dir = tmp_path / "run"
        result = CliRunner().invoke(app, ["train", "--config", config, f"run.dir={run_dir}", *overrides])
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("refused: ")
        assert "Traceback" not in result.output
        assert not run_dir.exists()
        return result.stderr

    return run


def jsonl(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def copied(folder: str, to: Path, *without: str) -> Path:
    shutil.copytree(ASSETS / folder, to, ignore=shutil.ignore_patterns(*without))
    return to


def test_missing_config(refused):
    assert "no.yaml does not exist" in refused(config="no.yaml")


def test_missing_prompts(refused):
    assert "/no/such.jsonl" in refused("data.prompts=/no/such.jsonl")


def test_wrong_column_names_those_there_are(refused, tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"text": ["a"], "answer": ["b"]}), path)
    message = refused(f"data.prompts={path}")
    assert "'prompt'" in message
    assert "text" in message
    assert "answer" in message


def test_empty_data(refused, tmp_path):
    assert "usable prompts" in refused(f"data.prompts={jsonl(tmp_path / 'p.jsonl')}")


def test_fewer_prompts_than_iterations(refused, tmp_path):
    assert "3 iterations" in refused(f"data.prompts={jsonl(tmp_path / 'p.jsonl', {'prompt': 'a'}, {'prompt': 'b'})}")


def test_a_prompt_longer_than_the_model(refused, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt_id": "long", "prompt": "word " * 9000}]
    message = refused(f"data.prompts={jsonl(tmp_path / 'p.jsonl', *rows)}")
    assert "'long'" in message
    assert "data.overlong=keep_last" in message


def test_one_response(refused):
    assert "rollout.responses_per_prompt=1" in refused("rollout.responses_per_prompt=1")


def test_unknown_key(refused):
    assert "did you mean rollout.temperature" in refused("rollout.temprature=1")


def test_impossible_layout(refused):
    message = refused("cluster.gpus=8", "learner.zero_stage=3")
    assert "rollout.num_workers=1" in message
    assert "set rollout.num_workers=8" in message


@pytest.mark.parametrize(
    ("without", "part"),
    [
        (("tokenizer*",), "tokenizer"),
        (("model.safetensors",), "safetensors"),
        (("config.json",), "config.json"),
    ],
)
def test_policy_folder_without(refused, tmp_path, without, part):
    assert part in refused(f"policy.model={copied('policy', tmp_path / 'm', *without)}")


def test_policy_without_chat_template(refused, tmp_path):
    folder = copied("policy", tmp_path / "m")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert "chat template" in refused(f"policy.model={folder}")


def test_a_judge_that_is_not_a_pairrm(refused):
    assert "PairRM" in refused(f"judge.model={ASSETS / 'policy'}")


def test_a_foreign_run_directory(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    arguments = ["train", "--config", str(ROOT / "configs/tiny_cpu.yaml"), f"run.dir={tmp_path}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_takes_the_run_s_own_config_and_refuses_where_there_is_no_run(tmp_path):
    run_dir = tmp_path / "run"

    def answer(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["train", *arguments])
        return result.exit_code, " ".join(result.output.split())

    config = str(ROOT / "configs/tiny_cpu.yaml")
    for arguments, message in (
        (["--resume"], "name one with --config FILE, or a run by --resume run.dir=DIR"),
        ([f"run.dir={run_dir}"], "no config is given"),
        (["--resume", f"run.dir={run_dir}"], "there is no config.yaml in it"),
        (["--resume", "--config", config, f"run.dir={run_dir}"], "holds no run; leave --resume out"),
    ):
        code, said = answer(*arguments)
        assert (code, message in said) == (2, True), said
        assert not run_dir.exists()
    claim(load_config(Path(config), [f"run.dir={run_dir}", "data.limit=96"]), {})
    code, said = answer("--resume", f"run.dir={run_dir}", "learner.num_workers=2", "--dry-run")
    assert code == 0, said
    assert "limit: 96" in said
    code, said = answer("--resume", f"run.dir={run_dir}", "data.limit=48")
    assert (code, "data.limit was 96, is 48" in said) == (2, True), said
    (run_dir / "config.yaml").write_text("junk: [")
    code, said = answer("--resume", f"run.dir={run_dir}")
    assert (code, "put back a whole copy" in said) == (2, True), said


def test_eval_names_the_option_whose_policy_is_not_there():
    config = str(ROOT / "configs/tiny_cpu.yaml")
    result = CliRunner().invoke(app, ["eval", "--config", config, "--policy", "./nope"])
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert "--policy=./nope cannot serve as the policy: there is no such folder. Correct --policy" in said


def test_what_cannot_be_a_path_is_refused(tmp_path):
    for arguments in (["train", "--resume", "run.dir=~nosuchuser/x"], ["scale", "--run", "~nosuchuser/x", "rollout=2"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, result.output
        assert "cannot be used as a path" in result.stderr


def test_a_note_about_prompts_may_hold_what_looks_like_markup(tmp_path):
    """[/INST] ends a user's turn in plain text here: kept, counted and noted, and no error of the terminal's."""
    policy = copied("policy", tmp_path / "policy")
    (policy / "chat_template.jinja").write_text("{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]")
    prompts = jsonl(tmp_path / "prompts.jsonl", *({"prompt": f"say {n} [/INST] [bold] [INST]"} for n in range(9)))
    config = str(ROOT / "configs/tiny_cpu.yaml")
    given = [
        f"run.dir={tmp_path / 'run'}",
        f"policy.model={policy}",
        f"data.prompts={prompts}",
        "evaluation.prompts=null",
    ]
    result = CliRunner().invoke(app, ["train", "--dry-run", "--config", config, *given])
    assert result.exit_code == 0, result.output
    assert "9 prompts hold '[/INST]'" in " ".join(result.stderr.split())


def test_dry_run_shows_the_plan_and_starts_nothing(tmp_path):
    config, run_dir = str(ROOT / "configs/tiny_cpu.yaml"), tmp_path / "run"
    result = CliRunner().invoke(app, ["train", "--dry-run", "--config", config, f"run.dir={run_dir}", "data.limit=96"])
    assert result.exit_code == 0, result.output
    assert "96 prompts" in result.output
    assert "eta: 10.0" in result.output
    assert not run_dir.exists()


@pytest.mark.parametrize("name", ["mistral_7b", "llama3_8b", "gemma2_9b"])
def test_plan_of_the_8_gpu_configs(name):
    result = CliRunner().invoke(app, ["plan", "--config", str(ROOT / f"configs/{name}.yaml")])
    assert result.exit_code == 0, result.output
    assert "309" in result.output  # steps of iteration 1: ceil(19,766 / 64)


def test_plan_refuses_what_does_not_fit():
    config = str(ROOT / "configs/mistral_7b.yaml")
    result = CliRunner().invoke(app, ["plan", "--config", config, "cluster.gpu_memory_gb=24"])
    assert result.exit_code == 2
    assert "24" in result.stderr


def test_train_refuses_what_does_not_fit_before_it_reads_anything(refused):
    message = refused("cluster.gpu_memory_gb=24", config=str(ROOT / "configs/mistral_7b.yaml"))
    assert "every GPU, training" in message
    assert "cluster.gpu_memory_gb=24" in message


def test_a_model_of_unknown_shape_is_not_refused_for_its_memory():
    with pytest.raises(ConfigError, match="every GPU, training"):
        _refuse_unfit(gpu_config(1))
    _refuse_unfit(gpu_config(1, sections={"policy": {"model": "someone/unheard-of-7b"}}))
    _refuse_unfit(gpu_config(1, sections={"judge": {"model": "someone/unheard-of-judge"}}))


def test_version_and_help():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == "0.1.0"
    assert "Self-Play Preference Optimization" in CliRunner().invoke(app, ["--help"]).output
