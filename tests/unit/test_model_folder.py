"""What is refused of a policy's folder, and that the message names the folder, what is missing and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizer_factory import chatml

from sppo_ray.errors import ConfigError
from sppo_ray.model_folder import NotAPolicy, inspect_policy, load_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "vocab_size": 480,
}


def build_policy(folder: Path, **config: Any) -> Path:
    """A folder that passes the checks; its weights are one small tensor, since the checks never load them."""
    chatml().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    save_file({"model.embed_tokens.weight": np.zeros((480, 2), np.float32)}, folder / "model.safetensors")
    return folder


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return damage


def with_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | fields)) and None


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


TEMPLATE = ("chat_template.jinja", "tokenizer_config.json")
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (without("config.json"), r"has no config\.json\. Give the folder"),
    "config not json": (
        lambda folder: (folder / "config.json").write_text("{") and None,
        r"config\.json cannot be read",
    ),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]") and None, "does not hold an object"),
    "no tokenizer": (without("tokenizer.json"), r"no tokenizer \(tokenizer\.json or tokenizer\.model or vocab\.json"),
    "no chat template": (without(*TEMPLATE), r"no chat template.*chat_template\.jinja"),
    "no weights": (without("model.safetensors"), r"no weights"),
    "pickle only": (pickle_only, r"weights are pickles \(pytorch_model\.bin\).*save_pretrained"),
    "git-lfs pointer": (lfs_pointer, r"model\.safetensors is not a whole safetensors file"),
    "cut short": (cut_short, r"model\.safetensors is not a whole safetensors file"),
    "shard missing": (shard_missing, r"1 of 2 shards are missing \(model-00002-of-00002\.safetensors\)"),
    "classifier": (with_config(architectures=["LlamaForSequenceClassification"]), "not a causal language model"),
    "encoder-decoder": (with_config(architectures=["T5ForConditionalGeneration"]), "not a causal language model"),
    "no architecture": (with_config(architectures=None), "none named"),
    "scaled logits": (with_config(logits_scaling=8.0), r"scales its logits \(logits_scaling=8\.0\).*another model"),
    "own code": (with_config(model_type="mystery", auto_map={"AutoConfig": "x.Y"}), r"policy\.trust_remote_code=true"),
}


def test_a_sound_folder_passes(tmp_path: Path) -> None:
    policy = inspect_policy(str(build_policy(tmp_path)))
    assert (policy.path, policy.architecture) == (tmp_path.resolve(), "LlamaForCausalLM")
    assert (policy.context_length, policy.vocab_size) == (512, 480)  # the sliding window does not count
    assert policy.weight_files == ("model.safetensors",)
    assert policy.has_chat_template
    assert load_tokenizer(policy).chat_template


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_refused_in_one_paragraph(tmp_path: Path, case: str) -> None:
    damage, message = BROKEN[case]
    damage(build_policy(tmp_path))
    with pytest.raises(NotAPolicy, match=message) as caught:
        inspect_policy(str(tmp_path))
    assert isinstance(caught.value, ConfigError)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_foreign_code_passes_once_trusted(tmp_path: Path) -> None:
    build_policy(tmp_path, model_type="mystery", auto_map={"AutoConfig": "x.Y"})
    assert inspect_policy(str(tmp_path), trust_remote_code=True).architecture == "LlamaForCausalLM"


def test_a_known_architecture_may_carry_code_that_is_not_run(tmp_path: Path) -> None:
    build_policy(tmp_path, auto_map={"AutoConfig": "x.Y"})
    assert inspect_policy(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 99}}, 99),
        ({}, None),
        ({"n_ctx": -1}, None),
    ],
)
def test_where_the_context_length_stands(tmp_path: Path, fields: dict[str, Any], length: int | None) -> None:
    build_policy(tmp_path)
    config = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"} | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect_policy(str(tmp_path)).context_length == length


def test_places_that_are_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAPolicy, match=r"there is no such folder\. Correct policy\.model"):
        inspect_policy(str(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotAPolicy, match="it is a file"):
        inspect_policy(str(tmp_path / "file"))


def test_a_tokenizer_that_does_not_load_is_refused(tmp_path: Path) -> None:
    policy = inspect_policy(str(build_policy(tmp_path)))
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(NotAPolicy, match="tokenizer does not load"):
        load_tokenizer(policy)


# ---------------------------------------------------------------- the hub, in place of which stands a fake


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Callable[..., Any]) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


def test_a_hub_model_needs_no_weights_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    build_policy(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    remote = [SimpleNamespace(filename=name) for name in ("model.safetensors", "original/consolidated.pth")]
    fake_hub(monkeypatch, lambda name, dry_run=False, **_: remote if dry_run else str(tmp_path))
    policy = inspect_policy("org/model")
    assert policy.model == "org/model"
    assert policy.path == tmp_path
    assert policy.weight_files == ("model.safetensors",)


def test_a_cached_hub_model_without_weights_is_refused_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import DryRunError

    build_policy(tmp_path)

    def offline(name: str, dry_run: bool = False, **_: Any) -> str:
        if dry_run:
            raise DryRunError("offline")
        return str(tmp_path)

    fake_hub(monkeypatch, offline)
    assert inspect_policy("org/model").weight_files == ("model.safetensors",)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(NotAPolicy, match="no weights"):
        inspect_policy("org/model")


def test_a_hub_name_offline_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(NotAPolicy, match=r"org/model .*was not reached.*hf download org/model"):
        inspect_policy("org/model")
    with pytest.raises(NotAPolicy, match="no such model on the hub"):
        inspect_policy("org/mo..del")
