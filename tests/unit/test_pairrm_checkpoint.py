"""What is and is not a PairRM folder: each refusal names the folder, what was found and the remedy."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sppo_ray.errors import ConfigError
from sppo_ray.pairrm import NotAPairRM, inspect_pairrm, is_hub_name, load_pairrm
from tests.unit import pairrm_factory as factory

EMBEDDING = "pretrained_model.embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return factory.build_pairrm(tmp_path_factory.mktemp("judge") / "original")


@pytest.fixture
def folder(original, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(original, tmp_path / "judge")


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_prefix_tokens(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "candidate" not in token["content"]]
    path.write_text(json.dumps(tokenizer))


def test_inspect_reads_both_layouts(original, tmp_path):
    info = inspect_pairrm(original)
    assert (info.kind, info.backbone, info.pickled, info.hidden_size) == ("hf", None, False, 32)
    assert (info.source_max_tokens, info.candidate_max_tokens) == (factory.SOURCE_MAX, factory.CANDIDATE_MAX)
    hub = inspect_pairrm(factory.build_blender_pairrm(tmp_path / "judge"))
    assert (hub.kind, hub.backbone) == ("blender", str(tmp_path / "judge-backbone"))
    assert hub.vocab_rows == info.vocab_rows


def test_hub_hf_layout_without_blender_keys(folder):
    """llm-blender/PairRM-hf: no ranker_type, limits or sep_token_id, and position_ids from an old transformers."""
    factory.edit_config(
        folder, ranker_type=..., model_name=..., source_maxlength=..., candidate_maxlength=..., sep_token_id=...
    )
    edit_weights(folder, lambda state: state.update({"pretrained_model.embeddings.position_ids": torch.arange(9)}))
    info = inspect_pairrm(folder)
    assert (info.source_max_tokens, info.candidate_max_tokens) == (1224, 412)
    assert load_pairrm(folder).logits("q", ["a", "b"]).shape == (2, 2)


def test_sharded_weights(folder, original):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(state)
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        save_file({key: state[key] for key in part}, folder / f"model-{number:05d}-of-00002.safetensors")
    assert (load_pairrm(folder).logits("q", ["a", "b"]) == load_pairrm(original).logits("q", ["a", "b"])).all()


def test_pickle_is_read_only_when_asked(folder, original):
    to_pickle(folder)
    assert inspect_pairrm(folder, allow_pickle=True).pickled
    ours = load_pairrm(folder, allow_pickle=True).logits("q", ["a", "b"])
    assert (ours == load_pairrm(original).logits("q", ["a", "b"])).all()


REFUSALS = {
    "config.json": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not an object"),
    "tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer"),
    "prefix tokens": (drop_prefix_tokens, r"prefix tokens .*<\|candidate1\|> \(tokenizer None"),
    "prefix ids": (lambda f: factory.edit_config(f, source_prefix_id=3), r"two different ids: <\|source\|>"),
    "ranker type": (lambda f: factory.edit_config(f, ranker_type="summareranker"), "ranker_type is 'summareranker'"),
    "architecture": (
        lambda f: factory.edit_config(f, ranker_type=..., architectures=["LlamaForCausalLM"]),
        "architecture is LlamaForCausalLM",
    ),
    "model type": (lambda f: factory.edit_config(f, model_type="llama"), "model_type is 'llama'"),
    "backbone": (lambda f: factory.edit_config(f, hidden_size=...), "its backbone is None"),
    "limits": (lambda f: factory.edit_config(f, candidate_maxlength=2), "no room for text"),
    "positions": (
        lambda f: factory.edit_config(f, position_biased_input=True, source_maxlength=500),
        "512 absolute positions",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "pickle": (to_pickle, "pickle.*judge.allow_pickle=true"),
    "lfs pointer": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs"),
        "not a safetensors file",
    ),
    "head": (lambda f: edit_weights(f, lambda s: s.pop("head_layer.4.weight")), r"lack head_layer\.4\.weight"),
    "head size": (lambda f: factory.edit_config(f, hidden_size=64), "for hidden_size 64"),
    "layers": (lambda f: factory.edit_config(f, num_hidden_layers=7), "num_hidden_layers=7, its weights have 2"),
    "width": (lambda f: factory.edit_config(f, intermediate_size=17), "intermediate_size=17, its weights have"),
    "embedding": (lambda f: edit_weights(f, lambda s: s.update({EMBEDDING: s[EMBEDDING][:9]})), "embedding has 9 rows"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(folder, name):
    spoil, message = REFUSALS[name]
    spoil(folder)
    with pytest.raises(NotAPairRM, match=message) as refusal:
        inspect_pairrm(folder)
    assert str(refusal.value).startswith(f"{folder} cannot serve as the PairRM judge: ")
    assert "\n" not in str(refusal.value)
    assert isinstance(refusal.value, ConfigError)


def test_a_hub_behind_a_proxy_that_fails_is_refused(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import HTTPError

    def fails(*_, **__):
        raise HTTPError("proxy: 407")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(NotAPairRM, match=r"proxy: 407.*hf download no-such-owner/no-such-judge"):
        inspect_pairrm("no-such-owner/no-such-judge", download=True)


def test_missing_folder_and_unknown_hub_name(tmp_path):
    with pytest.raises(NotAPairRM, match=r"absent cannot serve .*no such folder"):
        inspect_pairrm(tmp_path / "absent")
    assert is_hub_name("llm-blender/PairRM")
    assert not is_hub_name(tmp_path)
    assert not is_hub_name("./judge/folder")
    with pytest.raises(NotAPairRM, match=r"hub cache.*hf download no-such-owner/no-such-judge"):
        inspect_pairrm("no-such-owner/no-such-judge")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("pretrained_model.encoder.layer.1.output.dense.bias"),
        lambda state: state.update({"extra": torch.zeros(1)}),
    ],
)
def test_load_is_strict(folder, change):
    edit_weights(folder, change)
    with pytest.raises(NotAPairRM, match="do not fit the network"):
        load_pairrm(folder)


def test_load_refuses_another_tokenizer(folder):
    """A tokenizer that does not close with [SEP] would shift every segment."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["post_processor"] = None
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(NotAPairRM, match="Use the tokenizer of the checkpoint"):
        load_pairrm(folder)


def test_inspection_needs_no_torch(original):
    code = (
        "import sys; from sppo_ray.pairrm import inspect_pairrm;"
        f"inspect_pairrm({str(original)!r}); assert not {{'torch', 'transformers'}} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
