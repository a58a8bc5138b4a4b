"""Loading configs: presets underneath, overrides on top, and refusals that name key, value and remedy."""

from __future__ import annotations

import pytest
import yaml

from sppo_ray.config_io import build_config, dump_config, load_config, preset_overrides
from sppo_ray.errors import ConfigError

BASE = "run: {dir: runs/x}\ndata: {prompts: p.jsonl}\npolicy: {model: some/model}\n"


@pytest.fixture
def write(tmp_path):
    def _write(text=BASE, name="c.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return _write


def test_presets_differ_where_paper_and_code_do(write):
    paper = load_config(write())
    code = load_config(write(), ["fidelity=reference_code"])
    assert (paper.rollout.temperature, paper.rollout.top_p, paper.learner.schedule_epochs) == (1.0, 1.0, 18)
    assert (code.rollout.temperature, code.rollout.top_p, code.learner.schedule_epochs) == (0.7, 0.9, None)
    assert (paper.judge.win_rates, code.judge.win_rates) == ("paper", "reference_code")
    assert (paper.objective.eta, paper.learner.learning_rate, paper.learner.batch_size) == (1000, 5e-7, 64)


def test_file_beats_preset_and_override_beats_file(write):
    path = write(BASE + "rollout: {temperature: 0.5, num_workers: 3}\n")
    config = load_config(path, ["rollout.num_workers=2", "learner.learning_rate=1e-4", "data.limit=64"])
    assert (config.rollout.temperature, config.rollout.num_workers) == (0.5, 2)
    assert (config.learner.learning_rate, config.data.limit) == (1e-4, 64)
    assert preset_overrides(config) == {
        "rollout.temperature": {"preset": 1.0, "used": 0.5},
        "learner.learning_rate": {"preset": 5e-7, "used": 1e-4},
    }


def test_null_and_lists_as_overrides(write):
    config = load_config(write(), ["learner.schedule_epochs=null", "data.splits=[a, b, c]"])
    assert config.learner.schedule_epochs is None
    assert config.data.splits == ("a", "b", "c")


def test_paths_are_absolute_and_found_beside_the_config(write, tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    config = load_config(write())
    assert config.data.prompts == str(tmp_path / "p.jsonl")
    assert config.run.dir.startswith("/")
    assert config.policy.model == "some/model"  # no such folder: a hub name


def test_dump_is_read_back_equal(write, tmp_path):
    config = load_config(write(), ["data.splits=[a, b, c]"])
    assert load_config(write(dump_config(config), "again.yaml")) == config
    assert yaml.safe_load(dump_config(config))["learner"]["learning_rate"] == 5e-7


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["rollout.num_wokers=2"], ["rollout.num_wokers=2", "did you mean rollout.num_workers"]),
        (["rolout.num_workers=2"], ["rolout", "did you mean rollout"]),
        (["rollout.responses_per_prompt=1"], ["rollout.responses_per_prompt=1", "greater than or equal to 2"]),
        (["objective.eta=-1"], ["objective.eta=-1"]),
        (["learner.learning_rate=fast"], ["learner.learning_rate='fast'"]),
        (["objective.loss=ppo"], ["objective.loss='ppo'", "sppo_single"]),
        (["schedule.mode=asink"], ["schedule.mode='asink'"]),
        (["data.splits=[a]"], ["data.splits", "schedule.iterations is 3"]),
        (["selection.rule=all", "objective.loss=sppo_single"], ["selection.rule=all", "objective.loss=sppo"]),
        (["learner.max_prompt_length=1024"], ["learner.max_prompt_length=1024", "learner.max_length"]),
        (["learner.epochs=20"], ["learner.schedule_epochs=18", "learner.epochs=20"]),
        (["learner.num_workers=65"], ["learner.num_workers=65", "learner.batch_size=64"]),
        (["policy.dtype=float16"], ["float16", "cluster.gpus=0"]),
        (["fidelity=exact"], ["fidelity='exact'", "reference_code"]),
        (["rollout"], ["'rollout'", "key.path=value"]),
        (["rollout.temperature.x=1"], ["'rollout.temperature.x=1'", "two parts, section and name"]),
        (["run.dir=null"], ["run.dir=None"]),
        (["data.limit=[1"], ["data.limit=[1", "YAML"]),
    ],
)
def test_refused_overrides(write, overrides, parts):
    with pytest.raises(ConfigError) as refusal:
        load_config(write(), overrides)
    for part in parts:
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "is not YAML"),
        ("- 1\n", "holds list"),
        ("", "holds NoneType"),
        ("run: 3\n", "section run holds 3"),
        ("run: {dir: x}\ndata: {prompts: p}\n", "policy is required"),
        ("run: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        (BASE + "extra: {}\n", "unknown key"),
    ],
)
def test_refused_files(write, text, part):
    with pytest.raises(ConfigError, match=part):
        load_config(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.yaml does not exist"):
        load_config(tmp_path / "no.yaml")


def test_every_problem_is_reported_at_once():
    given = {"run": {"dir": "x"}, "data": {"prompts": "p"}, "policy": {"model": "m"}}
    with pytest.raises(ConfigError) as refusal:
        build_config(given | {"rollout": {"top_p": 2, "num_workers": 0}})
    assert "rollout.top_p=2" in str(refusal.value)
    assert "rollout.num_workers=0" in str(refusal.value)
