"""The shape of a model, from which the plan computes parameters and memory. Reads config.json; no network, no weights.

Parameter counts are exact for the families below (tested against the published totals). Other families are refused
rather than guessed: a wrong count would make the plan promise memory that is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sppo_ray.errors import ConfigError

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma2", "deberta-v2"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "deberta-v2")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes are counts of elements, not bytes."""

    name: str
    family: Family
    layers: int
    hidden: int
    intermediate: int  # width of the MLP
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool  # the output projection is the embedding
    context: int  # tokens the model was made for
    bias: bool = False  # llama family: biases in the four attention projections
    position_buckets: int = 0  # deberta-v2: rows of relative-position embeddings are twice this
    pair_head: bool = False  # deberta-v2: PairRM's head on top

    @property
    def sizes(self) -> tuple[int, ...]:
        """All that must be positive."""
        attention = self.heads, self.kv_heads, self.head_dim
        return (self.layers, self.hidden, self.intermediate, *attention, self.vocab, self.context)

    @property
    def parameters(self) -> int:
        return _deberta_parameters(self) if self.family == "deberta-v2" else _decoder_parameters(self)

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of the KV cache per token: a key and a value per layer and KV head."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _decoder_parameters(s: ModelShape) -> int:
    """Gated decoder: embedding V*H (twice if untied); per layer q and o H*A, k and v H*B (A, B: heads, KV heads times
    head size), gate, up and down 3*H*I, norms; a last norm."""
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = 2 * s.hidden * queries + 2 * s.hidden * keys
    if s.family == "qwen2":
        attention += queries + 2 * keys  # biases on q, k, v
    elif s.family == "qwen3":
        attention += 2 * s.head_dim  # norms on q and k
    elif s.bias:
        attention += queries + 2 * keys + s.hidden
    norms = (4 if s.family == "gemma2" else 2) * s.hidden
    embeddings = s.vocab * s.hidden * (1 if s.tied else 2)
    return embeddings + s.layers * (attention + 3 * s.hidden * s.intermediate + norms) + s.hidden


def _deberta_parameters(s: ModelShape) -> int:
    """DeBERTa-v3 (shared attention keys, no absolute positions): embedding V*H + norm; per layer four H*H projections,
    an MLP of two matrices, all with biases, two norms; relative positions 2*buckets*H + norm. PairRM adds a head:
    2H -> H -> 1."""
    norm = 2 * s.hidden
    attention = 4 * (s.hidden * s.hidden + s.hidden)
    mlp = 2 * s.hidden * s.intermediate + s.intermediate + s.hidden
    backbone = s.vocab * s.hidden + norm + s.layers * (attention + mlp + 2 * norm)
    backbone += 2 * s.position_buckets * s.hidden + norm
    return backbone + ((2 * s.hidden * s.hidden + s.hidden) + (s.hidden + 1) if s.pair_head else 0)


def _decoder(
    name: str, family: Family, layers: int, hidden: int, intermediate: int, heads: tuple[int, int, int], vocab: int,
    context: int, tied: bool = False,
) -> ModelShape:  # fmt: skip
    """`heads`: attention heads, KV heads, head size."""
    return ModelShape(name, family, layers, hidden, intermediate, *heads, vocab=vocab, tied=tied, context=context)


def _deberta_large(name: str, vocab: int, pair_head: bool) -> ModelShape:
    return ModelShape(
        name, "deberta-v2", 24, 1024, 4096, 16, 16, 64, vocab=vocab, tied=True, context=512,
        position_buckets=256, pair_head=pair_head,
    )  # fmt: skip


# From the config.json of each repository, so that `plan` works before anything is downloaded. PairRM's embedding was
# cut from DeBERTa's 128,100 rows to the tokenizer's 128,001 and the four prefix tokens.
KNOWN: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _decoder("mistralai/Mistral-7B-Instruct-v0.2", "mistral", 32, 4096, 14336, (32, 8, 128), 32000, 32768),
        _decoder("meta-llama/Meta-Llama-3-8B-Instruct", "llama", 32, 4096, 14336, (32, 8, 128), 128256, 8192),
        _decoder("google/gemma-2-9b-it", "gemma2", 42, 3584, 14336, (16, 8, 256), 256000, 8192, tied=True),
        _decoder("google/gemma-2-27b-it", "gemma2", 46, 4608, 36864, (32, 16, 128), 256000, 8192, tied=True),
        _deberta_large("microsoft/deberta-v3-large", 128100, pair_head=False),
        _deberta_large("llm-blender/PairRM", 128005, pair_head=True),
        _deberta_large("llm-blender/PairRM-hf", 128005, pair_head=True),
    )
}


def model_shape(model: str, ranker: str | None = None) -> ModelShape:
    """The shape of a local folder, a published model of the table, or a hub model whose config.json is in the local hub
    cache; raises ConfigError for anything else. ranker: whose backbone it is."""
    if Path(model).is_dir():
        return _read_folder(Path(model), ranker)
    if model in KNOWN:
        return KNOWN[model]
    if Path(model).is_absolute() or model.startswith((".", "~")):
        raise ConfigError(f"model {model!r} is not a folder: give an existing model folder or a hub name.")
    cached = _cached_config(model)
    if cached is None:
        raise ConfigError(
            f"model {model!r} is neither a local folder, nor in the table of known models ({', '.join(KNOWN)}), nor in "
            f"the local hub cache, so its shape is unknown: fetch it once with `hf download {model} config.json`, or "
            "give the path of a downloaded folder."
        )
    return _read_config(cached, model, ranker)


def _cached_config(model: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:  # not of the form owner/name
        return None
    return Path(found) if isinstance(found, str) else None


def _read_folder(folder: Path, ranker: str | None) -> ModelShape:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"model folder {folder} has no config.json: give a folder saved by transformers.")
    return _read_config(path, str(folder), ranker)


def _read_config(path: Path, name: str, ranker: str | None) -> ModelShape:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): copy it again from the model's repository.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, not a model's configuration: copy it again.")
    if raw.get("ranker_type") == "pairranker" and raw.get("model_name"):
        # llm-blender's own layout: the shape is that of the backbone named here, but for < 0.1 % of embedding rows.
        if ranker:
            raise ConfigError(
                f"{path}: the ranker {ranker} names this as its backbone, and it is a ranker itself: copy both again."
            )
        return replace(model_shape(str(raw["model_name"]), ranker=name), name=name, pair_head=True)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(
            f"{path}: model_type={family!r} has no known parameter count here (known: {', '.join(FAMILIES)}): "
            "use a model of a known family, or add its formula to sppo_ray/model_shapes.py."
        )
    try:
        shape = _shape_of(raw, name)
        if not all(0 < size < 2**31 for size in shape.sizes):
            raise ValueError("a size that is not positive, or beyond reason")
        return shape
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{path} lacks or garbles a field of a {family} model ({error!r}): copy it again.") from None


def _shape_of(raw: Mapping[str, Any], name: str) -> ModelShape:
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    return ModelShape(
        name=name,
        family=raw["model_type"],
        layers=int(raw["num_hidden_layers"]),
        hidden=hidden,
        intermediate=int(raw["intermediate_size"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        vocab=int(raw["vocab_size"]),
        # transformers leaves the key out where it has the family's default, which is true for Gemma only
        tied=bool(raw.get("tie_word_embeddings", raw["model_type"] == "gemma2")),
        context=int(raw["max_position_embeddings"]),
        bias=bool(raw.get("attention_bias", False)),
        position_buckets=int(raw.get("position_buckets") or 0),
        pair_head="cand1_prefix_id" in raw,
    )
