"""Secrets stay in the environment: refused in configs, hidden in what is written and shown."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sppo_ray.cli import app
from sppo_ray.config_io import build_config, dump_config
from sppo_ray.errors import ConfigError
from sppo_ray.metrics import MetricsLog
from sppo_ray.run_dir import claim, update_manifest
from sppo_ray.secrets import hidden, hide, hide_in_logs, names_a_secret, secrets_of

PLAIN = {"data": {"prompts": "prompts.jsonl"}, "policy": {"model": "org/policy"}}
SECRET = "hf_planted0123456789"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
     "PGPASSWORD", "MY_SECRET", "wandb.api_key", "OPENAI_APIKEY", "AZURE_STORAGE_CONNECTION_STRING", "GITHUB_PAT", "SENTRY_DSN",
     "DB_PASS", "MYSQL_PWD", "SSH_PASSPHRASE", "HF_TOKEN_2", "OPENAI_API_KEY_1", "API_KEYS", "SECRET_KEY_BASE", "REDIS_AUTH", "JWT",
     "GOOGLE_APPLICATION_CREDENTIALS_JSON", "DOCKER_AUTH_CONFIG", "SLACK_WEBHOOK_URL"],
)  # fmt: skip
def test_these_hold_a_secret(name: str) -> None:
    assert names_a_secret(name)


@pytest.mark.parametrize(
    "name",
    ["RAY_AUTH_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "RAY_AUTH_MODE", "AWS_REGION", "HOME", "MONKEY",
     "PWD", "OLDPWD", "max_new_tokens", "COMPASS", "SSH_AUTH_SOCK"],
)  # fmt: skip
def test_these_do_not(name: str) -> None:
    assert not names_a_secret(name)


def test_a_variable_that_names_a_file_or_is_short_holds_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    file.touch()
    environ = {"APPLICATION_CREDENTIALS": str(file), "SORT_KEY": "length", "HF_TOKEN": SECRET}
    assert secrets_of(environ) == {"HF_TOKEN": SECRET}


@pytest.mark.parametrize("secret", ["e" * 2000, "before\0after"])
def test_a_secret_need_not_be_a_possible_path(secret: str) -> None:
    assert hide(f"401 for {secret}: denied", {"ID_TOKEN": secret}) == "401 for ***: denied"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"401 for {SECRET}: denied", "401 for ***: denied"),
        ("cannot open s3://me:pa%2Fss@bucket/p.parquet", "cannot open s3://***@bucket/p.parquet"),
        ("s3://me:p@ss@bucket/p", "s3://***@bucket/p"),
        ("https://tok@hub/x and http://a:b@c", "https://***@hub/x and http://***@c"),
        ("https://s/p?X-Amz-Signature=ab12&part=1", "https://s/p?X-Amz-Signature=***&part=1"),
        ("https://s/p?sv=1&sig=ab%3D", "https://s/p?sv=1&sig=***"),
        ("git@host:repo, a@b.c and https://host/x@v1?page=2", "git@host:repo, a@b.c and https://host/x@v1?page=2"),
    ],
)
def test_hide(text: str, shown: str) -> None:
    assert hide(text, {"HF_TOKEN": SECRET}) == shown


def test_a_secret_that_contains_another_is_hidden_whole() -> None:
    assert hide("<abcdefgh-ijkl>", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-ijkl"}) == "<***>"


def test_hidden_keeps_the_shape_of_the_data() -> None:
    data = {"a": [SECRET, 1, None], "b": {"c": f"x{SECRET}"}, "d": 0.5, "e": ("y",)}
    assert hidden(data, {"T_TOKEN": SECRET}) == {"a": ["***", 1, None], "b": {"c": "x***"}, "d": 0.5, "e": ["y"]}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.prompts", "https://user:pa55word@host/p.jsonl"),
        ("policy.model", "s3://AKIAEXAMPLE:pa55word@bucket/model"),
        ("judge.model", "https://pa55word@host/judge"),
        ("evaluation.prompts", "https://host/p.parquet?X-Amz-Signature=pa55word"),
        ("data.splits", ["https://u:pa55word@host", "a", "b"]),
    ],
)
def test_a_config_with_credentials_is_refused_and_they_are_not_shown(key: str, value: object, tmp_path: Path) -> None:
    section, name = key.split(".")
    given = {"run": {"dir": str(tmp_path / "run")}, **PLAIN}
    given[section] = {**given.get(section, {}), name: value}
    with pytest.raises(ConfigError) as refused:
        build_config(given)
    assert str(refused.value).startswith(f"{key} has credentials inside a URL")
    assert "environment" in str(refused.value)
    assert "pa55word" not in str(refused.value)


def test_a_config_with_the_value_of_a_secret_variable_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(ConfigError) as refused:
        build_config({"run": {"dir": str(tmp_path / f"run-{SECRET}")}, **PLAIN})
    assert str(refused.value).startswith("run.dir holds the value of the environment variable HF_TOKEN")
    assert SECRET not in str(refused.value)


def test_what_a_run_records_has_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error's text may quote whatever a library put into it."""
    config = build_config({"run": {"dir": str(tmp_path / "run")}, **PLAIN})
    monkeypatch.setenv("HF_TOKEN", SECRET)
    claim(config, {"prompts": {"from": "https://user:pa55word@host/p"}})
    MetricsLog(tmp_path / "run/metrics.jsonl").write({"event": "failure", "why": f"401 for {SECRET}"})
    update_manifest(tmp_path / "run", cause=f"401 for Bearer {SECRET}", counts=[3])
    text = (tmp_path / "run/manifest.json").read_text() + (tmp_path / "run/config.yaml").read_text()
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    assert SECRET not in metrics
    assert "401 for ***" in metrics
    assert SECRET not in text
    assert "pa55word" not in text
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert (manifest["cause"], manifest["counts"]) == ("401 for Bearer ***", [3])
    assert SECRET not in dump_config(config)


@pytest.mark.parametrize(
    "override",
    [
        "policy.hf_token=hf_typed0123456789",
        "cluster.gpus=https://u:pa55word@h",
        f"cluster.gpus={SECRET}",
        "wandb.api_key=hf_typed0123456789",
        "policy.model={token: hf_typed0123456789}",
        "policy.hf_token=[hf_typed0123456789",
    ],
)
def test_refusals_do_not_show_what_they_refuse(override: str) -> None:
    done = CliRunner().invoke(app, ["plan", "--config", "configs/tiny_cpu.yaml", override], env={"HF_TOKEN": SECRET})
    assert done.exit_code == 2
    assert "***" in done.output
    assert not any(secret in done.output for secret in (SECRET, "pa55word", "hf_typed0123456789"))


def test_a_key_with_a_secrets_name_is_refused_as_any_unknown_key() -> None:
    done = CliRunner().invoke(app, ["plan", "--config", "configs/tiny_cpu.yaml", "policy.api_key=hf_typed0123456789"])
    assert (done.exit_code, "policy.api_key=***: unknown key" in done.output) == (2, True)


def test_log_records_keep_what_an_earlier_factory_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM's does, whose format asks for it; and its engine's process is under way when ours comes."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    before = logging.getLogRecordFactory()

    def theirs(*facts: Any, **more: Any) -> logging.LogRecord:
        record = logging.LogRecord(*facts, **more)
        record.process_of_theirs = "engine"
        return record

    logging.setLogRecordFactory(theirs)
    try:
        hide_in_logs()
        ours = logging.getLogRecordFactory()
        hide_in_logs()
        assert logging.getLogRecordFactory() is ours
        record = logging.getLogger("x").makeRecord("x", logging.INFO, "f", 1, "with %s", (SECRET,), None)
    finally:
        logging.setLogRecordFactory(before)
    assert logging.Formatter("%(process_of_theirs)s: %(message)s").format(record) == "engine: with ***"


def test_an_override_that_is_none_does_not_show_what_follows_a_secrets_name() -> None:
    done = CliRunner().invoke(app, ["plan", "--config", "configs/tiny_cpu.yaml", "hf_token:hf_typed0123456789"])
    assert done.exit_code == 2
    assert "override 'hf_token...' is not of the form" in done.output
    assert "typed" not in done.output
