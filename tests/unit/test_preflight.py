"""The checks before a run: in order, complete, without leaving a trace, and quick to refuse."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tokenizer_factory import chatml

import sppo_ray
from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.preflight import preflight

ASSETS = Path(sppo_ray.__file__).parent / "assets"


def config_of(**values: Any) -> Config:
    """The embedded tiny run, with dotted values on top."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "schedule": {"iterations": 2},
        "data": {"prompts": str(ASSETS / "prompts_train.jsonl"), "limit": 64},
        "policy": {"model": str(ASSETS / "policy"), "dtype": "float32"},
        "judge": {"model": str(ASSETS / "judge")},
        "rollout": {"max_new_tokens": 64},
        "learner": {"batch_size": 16},
        "evaluation": {"prompts": str(ASSETS / "prompts_heldout.jsonl"), "limit": 8},
    }
    for key, value in values.items():
        section, name = key.split("__")
        sections[section][name] = value
    return Config.model_validate(sections)


def small_policy(folder: Path, **config: Any) -> str:
    chatml().save_pretrained(folder)
    fields = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 480} | config
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({"w": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
    return str(folder)


def test_the_embedded_run_passes_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checked = preflight(config_of(run__dir=str(tmp_path / "run")))
    assert [len(part) for part in checked.prompts.slices] == [32, 32]
    assert len(checked.prompts.heldout) == 8
    assert checked.warnings == ()
    assert not list(tmp_path.iterdir())


def test_a_limit_beyond_the_prompts_is_said(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{n} apples"}}\n' for n in range(64)))
    prompts = {"data__prompts": str(tmp_path / "p.jsonl"), "run__dir": str(tmp_path / "run")}
    assert preflight(config_of(**prompts, data__limit=64)).warnings == ()
    (said,) = preflight(config_of(**prompts, data__limit=65)).warnings
    assert "data.limit=65" in said
    assert "gives 64 usable prompts" in said


def test_a_pickled_judge_is_taken_where_the_config_allows_it(tmp_path: Path) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(ASSETS / "judge", judge)
    weights = load_file(judge / "model.safetensors")
    (judge / "model.safetensors").unlink()
    torch.save(weights, judge / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickle.*judge\.allow_pickle=true"):
        preflight(config_of(judge__model=str(judge)))
    assert preflight(config_of(judge__model=str(judge), judge__allow_pickle=True)).judge.pickled


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__prompts": "nowhere.jsonl"}, "no file of prompts"),
        ({"data__column": "instruction"}, r"no column 'instruction'; it has 'prompt"),
        ({"data__limit": 1}, "but 2 iterations need at least one each"),
        ({"policy__model": "./nowhere"}, r"policy\.model=\./nowhere cannot serve"),
        ({"judge__model": "./nowhere"}, "nowhere cannot serve as the PairRM judge"),
        ({"judge__model": str(ASSETS / "policy")}, "cannot serve as the PairRM judge"),
        ({"policy__model": str(ASSETS / "judge")}, "not a causal language model"),
        ({"rollout__max_model_len": 100_000}, r"max_model_len=100000 exceeds the \d+ tokens"),
        ({"rollout__max_model_len": 70}, r"Prompt '.*' has \d+ tokens, more than the 6"),
        ({"rollout__max_new_tokens": 100_000}, "leaves no room for a prompt"),
        ({"evaluation__prompts": str(ASSETS / "prompts_train.jsonl"), "data__limit": None}, "nothing to evaluate on"),
    ],
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(config_of(**values))


def test_a_context_nobody_states_is_asked_for(tmp_path: Path) -> None:
    policy = small_policy(tmp_path)
    with pytest.raises(ConfigError, match=r"set rollout\.max_model_len"):
        preflight(config_of(policy__model=policy))
    assert preflight(config_of(policy__model=policy, rollout__max_model_len=512)).prompts.total > 0


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    policy = small_policy(tmp_path, vocab_size=100, max_position_embeddings=512)
    with pytest.raises(ConfigError, match=r"vocabulary ends at 99: tokenizer and weights are of different models"):
        preflight(config_of(policy__model=policy))


def test_odd_settings_are_warned_of() -> None:
    batch, ranks = preflight(config_of(learner__batch_size=64, learner__num_workers=40)).warnings
    assert "32 prompts but learner.batch_size=64" in batch
    assert "learner.num_workers=40" in ranks
    (overlong,) = preflight(config_of(data__overlong="keep_last", rollout__max_model_len=76)).warnings
    assert "longer than the context allows (data.overlong=keep_last)" in overlong


def test_refusing_needs_neither_torch_nor_transformers() -> None:
    """A wrong path must be reported at once, not after seconds of imports."""
    program = (
        "import sys; from sppo_ray.config import Config; from sppo_ray.errors import ConfigError\n"
        "from sppo_ray.preflight import preflight\n"
        f"c = Config.model_validate(dict(run=dict(dir='x'), data=dict(prompts={str(ASSETS / 'prompts_train.jsonl')!r}),"
        " policy=dict(model='./nowhere')))\n"
        "try:\n    preflight(c)\nexcept ConfigError:\n    pass\nelse:\n    raise SystemExit('accepted')\n"
        "heavy = {'torch', 'transformers', 'ray', 'vllm', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "raise SystemExit(f'imported {heavy}' if heavy else 0)\n"
    )
    root = Path(sppo_ray.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
