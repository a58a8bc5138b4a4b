"""Parameter counts against the published totals and against real weight files; refusals."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest

import sppo_ray
from sppo_ray.errors import ConfigError
from sppo_ray.model_shapes import KNOWN, model_shape

ASSETS = Path(sppo_ray.__file__).parent / "assets"


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        # "total parameters" of the safetensors index or model card of each
        ("mistralai/Mistral-7B-Instruct-v0.2", 7_241_732_096),
        ("meta-llama/Meta-Llama-3-8B-Instruct", 8_030_261_248),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("google/gemma-2-27b-it", 27_227_128_320),
        ("microsoft/deberta-v3-large", 434_012_160),
        # 434,012,160 - (128,100 - 128,005) x 1024 embedding rows + head (2048 x 1024 + 1024) + (1024 + 1)
        ("llm-blender/PairRM", 436_014_081),
        ("llm-blender/PairRM-hf", 436_014_081),
    ],
)
def test_known_totals(model: str, parameters: int) -> None:
    assert KNOWN[model].parameters == parameters
    assert model_shape(model) is KNOWN[model]


@pytest.mark.parametrize("folder", ["policy", "judge"])
def test_counts_equal_the_shipped_weights(folder: str) -> None:
    with (ASSETS / folder / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    stored = sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    assert model_shape(str(ASSETS / folder)).parameters == stored


def test_kv_cache_of_mistral_is_128_kib_a_token() -> None:
    # key and value x 32 layers x 8 KV heads x 128 = 65,536 elements; 2 bytes each
    assert KNOWN["mistralai/Mistral-7B-Instruct-v0.2"].kv_elements_per_token == 65_536


def _write(folder: Path, config: object) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_folder_without_optional_fields_takes_the_family_defaults(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 16,
        "num_attention_heads": 2, "vocab_size": 10, "max_position_embeddings": 32,
    }  # fmt: skip
    shape = model_shape(_write(tmp_path, config))
    assert (shape.kv_heads, shape.head_dim, shape.tied) == (2, 4, False)
    # embeddings 2 x 10 x 8 = 160; a layer 4 x 64 + 3 x 8 x 16 + 16 = 656; last norm 8
    assert shape.parameters == 160 + 2 * 656 + 8


def test_qwen2_has_biases_on_queries_keys_and_values(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 16, "vocab_size": 10,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    # embedding 80; q, o 2 x 64; k, v 2 x 32; biases 8 + 4 + 4; MLP 384; norms 16 + 8
    assert model_shape(_write(tmp_path, config)).parameters == 80 + 128 + 64 + 16 + 384 + 24


def test_blender_layout_takes_its_backbone(tmp_path: Path) -> None:
    config = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": "microsoft/deberta-v3-large"}
    shape = model_shape(_write(tmp_path, config))
    assert shape.pair_head
    assert shape.name == str(tmp_path)
    assert shape.parameters == pytest.approx(KNOWN["llm-blender/PairRM"].parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"model_type": "llama", "hidden_size": 8}, "num_attention_heads"),
        ({"model_type": "llama", "hidden_size": 8, "num_attention_heads": 0}, "garbles"),
        ([], "holds list"),
    ],
)
def test_unusable_folder_is_refused(tmp_path: Path, config: object, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_shape(_write(tmp_path, config))
    assert named in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_a_ranker_whose_backbone_is_a_ranker_is_refused(tmp_path: Path) -> None:
    config = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": str(tmp_path)}
    with pytest.raises(ConfigError, match="it is a ranker itself"):
        model_shape(_write(tmp_path, config))


@pytest.mark.parametrize("field", ["num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size"])
@pytest.mark.parametrize("size", ["0", "-1", "Infinity", "1e400", "1" + 400 * "0"])
def test_sizes_beyond_reason_are_refused(tmp_path: Path, field: str, size: str) -> None:
    text = json.dumps(json.loads((ASSETS / "policy/config.json").read_text()) | {field: 12321}).replace("12321", size)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="lacks or garbles a field"):
        model_shape(str(tmp_path))


def test_folder_without_config_and_with_broken_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        model_shape(str(tmp_path))
    for broken in ("{", "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ConfigError, match="not JSON"):
            model_shape(str(tmp_path))


@pytest.mark.parametrize("name", ["someone/unheard-of-7b", "not a name at all", "a/b/c"])
def test_unknown_name_is_refused_with_the_remedy(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="hf download"):
        model_shape(name)


def test_missing_folder_is_not_taken_for_a_hub_name() -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        model_shape("/nowhere/policy")
