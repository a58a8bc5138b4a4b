"""What a PairRM folder is, read from its config, tokenizer files and safetensors headers alone. No torch here.

Two layouts hold the same tensors under the same names (`pretrained_model.*`, `head_layer.*`):

- `blender`, as `llm-blender/PairRM`: config.json is Blender's RankerConfig (llm_blender/pair_ranker/config.py). It
  names a backbone in `model_name`; the DeBERTa config and the tokenizer come from there, and the four prefix tokens are
  added to that tokenizer on loading (llm_blender/pair_ranker/collator.py). The backbone's weights are not needed.
- `hf`, as `llm-blender/PairRM-hf`: config.json is the DeBERTa-v2 config of class `DebertaV2PairRM`
  (llm_blender/pair_ranker/pairrm.py) with the prefix ids in it, and the tokenizer lies beside it.

A folder with both sets of keys serves both loaders; it is read as `hf`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from sppo_ray.errors import ConfigError
from sppo_ray.given import shown, user_path

# Prefix token -> the config key that holds its id. The order is the one in which llm-blender adds them to a tokenizer.
PREFIX_TOKENS = {
    "<|source|>": "source_prefix_id",
    "<|candidate1|>": "cand1_prefix_id",
    "<|candidate2|>": "cand2_prefix_id",
    "<|candidate|>": "cand_prefix_id",
}
# PairRM-hf's config has no limits: these are tokenize_pair's defaults in llm_blender/blender/blender_utils.py.
SOURCE_MAX_TOKENS, CANDIDATE_MAX_TOKENS = 1224, 412
MIN_TOKENS = 4  # [CLS] prefix token [SEP]
EMBEDDING = "pretrained_model.embeddings.word_embeddings.weight"
HEAD = ("head_layer.1.weight", "head_layer.1.bias", "head_layer.4.weight", "head_layer.4.bias")
LAYERS, WIDTH = "pretrained_model.encoder.layer.", ".intermediate.dense.weight"
TOKENIZER_FILES = ("tokenizer.json", "spm.model")
PICKLE = "pytorch_model.bin"


class NotAPairRM(ConfigError):
    """The folder is not a PairRM this project can load; the message names the folder, what was found and the remedy."""


@dataclass(frozen=True, slots=True)
class PairRMInfo:
    """A PairRM folder. Lengths are in tokens, [CLS], prefix and [SEP] included."""

    kind: Literal["blender", "hf"]
    folder: Path
    config: Mapping[str, Any]
    backbone: str | None  # hub name or folder of the backbone; None when the folder holds everything
    source_max_tokens: int
    candidate_max_tokens: int
    weights: tuple[Path, ...]
    pickled: bool  # then the two fields below are unknown until the weights are loaded
    hidden_size: int | None
    vocab_rows: int | None  # rows of the embedding


def inspect_pairrm(path_or_name: str | Path, *, allow_pickle: bool = False, download: bool = False) -> PairRMInfo:
    """Reads a local folder, or the cached snapshot of a hub name, which `download` fetches first. Raises NotAPairRM."""
    folder = resolve_folder(path_or_name, download=download, pickle=allow_pickle)
    config = _read_config(folder)
    kind, backbone = _layout(folder, config)
    source = _number(folder, config, "source_maxlength") or SOURCE_MAX_TOKENS
    candidate = _number(folder, config, "candidate_maxlength") or CANDIDATE_MAX_TOKENS
    if kind == "hf":
        check_tokenizer_files(folder)
        _check_prefix_tokens(folder, config)
    check_limits(folder, config, source, candidate)
    weights = _find_weights(folder, allow_pickle)
    pickled = weights[0].name == PICKLE
    hidden, rows = (None, None) if pickled else _check_weights(folder, config, weights)
    return PairRMInfo(kind, folder, config, backbone, source, candidate, weights, pickled, hidden, rows)


def is_hub_name(path_or_name: str | Path) -> bool:
    """Whether this is a hub name such as `llm-blender/PairRM` and no folder of that name exists here."""
    text = str(path_or_name)
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text)) and not Path(text).exists()


def resolve_folder(path_or_name: str | Path, *, download: bool, backbone: bool = False, pickle: bool = False) -> Path:
    """The local folder of a path or hub name. `backbone`: without weights; `pickle`: pytorch_model.bin as well."""
    folder = user_path(path_or_name)
    if folder.is_dir():
        return folder.resolve()
    if not is_hub_name(path_or_name):
        refuse(folder, "there is no such folder", "Give a folder that exists, or a hub name (llm-blender/PairRM)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "spm.model"] + ([] if backbone else ["*.safetensors"]) + ([PICKLE] if pickle else [])
    try:  # HTTPError is the base of every transport error, whichever client the hub uses
        return Path(snapshot_download(str(path_or_name), allow_patterns=patterns, local_files_only=not download))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        refuse(
            path_or_name,
            "there is no such folder, and no copy of that name in the hub cache" + (f" ({error})" if download else ""),
            f"Fetch it once with `hf download {path_or_name}`, or give a local folder",
        )


def base_folder(info: PairRMInfo) -> Path:
    """Where the backbone's config and the tokenizer lie; fetched if they are on the hub."""
    return resolve_folder(info.backbone, download=True, backbone=True) if info.backbone else info.folder


def check_tokenizer_files(folder: Path) -> None:
    """Raises NotAPairRM unless the folder holds a tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        found = f"it has no tokenizer ({' or '.join(TOKENIZER_FILES)})"
        refuse(folder, found, "Copy the tokenizer's files beside config.json")


def check_limits(folder: Path, config: Mapping[str, Any], source_tokens: int, candidate_tokens: int) -> None:
    """Raises NotAPairRM if the limits are too small, or too long for a backbone with absolute positions."""
    if min(source_tokens, candidate_tokens) < MIN_TOKENS:
        found = f"limits of {source_tokens} and {candidate_tokens} tokens leave no room for text"
        refuse(folder, found, f"Use {MIN_TOKENS} or more")
    longest = source_tokens + 2 * candidate_tokens
    positions = _number(folder, config, "max_position_embeddings") or 512
    if "hidden_size" in config and config.get("position_biased_input", True) and longest > positions:
        refuse(
            folder,
            f"it has {positions} absolute positions, but a source of {source_tokens} and two candidates of "
            f"{candidate_tokens} tokens need {longest}",
            "Lower source_max_tokens and candidate_max_tokens",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        refuse(folder, "it has no config.json", "Point to the folder that holds config.json and model.safetensors")
    return _read_json(folder, "config.json")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(folder, f"its {name} is not JSON ({error})", "Copy the file again")
    if not isinstance(content, dict):
        refuse(folder, f"its {name} is not an object", "Copy the file again")
    return content


def _number(folder: Path, config: Mapping[str, Any], key: str) -> int | None:
    """A whole number of config.json; None where it has none."""
    value = config.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        refuse(folder, f"its config.json says {key}={shown(value)}, not a whole number", "Copy config.json again")
    return value


def _layout(folder: Path, config: Mapping[str, Any]) -> tuple[Literal["blender", "hf"], str | None]:
    """(kind, backbone) from config.json."""
    remedy = "Use llm-blender/PairRM, llm-blender/PairRM-hf or a checkpoint saved from llm-blender's DebertaV2PairRM"
    ranker, architectures = config.get("ranker_type"), config.get("architectures")
    architectures = architectures if isinstance(architectures, list) else []
    model_type = str(config.get("model_type"))
    if ranker is not None and ranker != "pairranker":
        refuse(folder, f"its ranker_type is {shown(ranker)}, not 'pairranker'", remedy)
    if ranker is None and "DebertaV2PairRM" not in architectures:
        found = ", ".join(map(str, architectures)) or repr(model_type)
        refuse(folder, f"its architecture is {found}, not DebertaV2PairRM", remedy)
    if "hidden_size" in config:
        if model_type != "deberta-v2":
            refuse(folder, f"its model_type is {model_type!r}, not 'deberta-v2'", remedy)
        return "hf", None
    if not model_type.startswith("deberta") or not config.get("model_name"):
        found = f"its backbone is {config.get('model_name')!r} of type {model_type!r}, not a named DeBERTa-v2 or v3"
        refuse(folder, found, remedy)
    return "blender", str(config["model_name"])


def _check_prefix_tokens(folder: Path, config: Mapping[str, Any]) -> None:
    tokens = _added_tokens(folder)
    wrong = [
        f"{token} (tokenizer {tokens.get(token)}, config {config.get(key)})"
        for token, key in PREFIX_TOKENS.items()
        if tokens.get(token) is None or tokens[token] != config.get(key)
    ]
    if wrong:
        refuse(
            folder,
            f"prefix tokens are missing or have two different ids: {'; '.join(wrong)}",
            "Add the four prefix tokens to the tokenizer of the model and write their ids into config.json",
        )


def _added_tokens(folder: Path) -> dict[str, int]:
    """Added token -> id, from whichever of the tokenizer's files holds it (tokenizer.json has the last word)."""
    found: dict[str, int] = {}
    try:
        if (folder / "added_tokens.json").is_file():
            found.update(_read_json(folder, "added_tokens.json"))
        if (folder / "tokenizer_config.json").is_file():
            decoder = _read_json(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
            found.update({entry["content"]: int(index) for index, entry in decoder.items()})
        if (folder / "tokenizer.json").is_file():
            entries = _read_json(folder, "tokenizer.json").get("added_tokens", [])
            found.update({entry["content"]: entry["id"] for entry in entries})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        refuse(folder, f"its tokenizer's files list added tokens in no known form ({error!r})", "Copy them again")
    return found


def _find_weights(folder: Path, allow_pickle: bool) -> tuple[Path, ...]:
    single, shards = folder / "model.safetensors", tuple(sorted(folder.glob("model-*-of-*.safetensors")))
    if single.is_file() or shards:
        return (single,) if single.is_file() else shards
    pickle = folder / PICKLE
    if not pickle.is_file():
        refuse(folder, f"it has no weights (model.safetensors, nor {PICKLE})", "Download or copy model.safetensors")
    if not allow_pickle:
        refuse(
            folder,
            f"its weights are a pickle ({PICKLE}), which can run code when loaded",
            "Convert it to model.safetensors, or set judge.allow_pickle=true if you trust its origin",
        )
    return (pickle,)


def _check_weights(folder: Path, config: Mapping[str, Any], weights: tuple[Path, ...]) -> tuple[int, int]:
    """(hidden size, embedding rows), from the safetensors headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in weights:
        try:
            with safe_open(path, framework="np") as file:
                shapes.update({key: file.get_slice(key).get_shape() for key in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            found = f"{path.name} is not a safetensors file ({error})"
            refuse(folder, found, "Fetch it again; a git-lfs pointer looks like this")
    missing = [key for key in (*HEAD, EMBEDDING) if key not in shapes]
    if missing:
        remedy = "Use the full PairRM checkpoint: a bare DeBERTa has no comparison head"
        refuse(folder, f"its weights lack {', '.join(missing)} ({len(shapes)} tensors found)", remedy)
    if any(len(shapes[key]) != 2 for key in (HEAD[0], HEAD[2], EMBEDDING)):
        refuse(folder, "its head or embedding is no matrix", "Copy the weights again")
    hidden, rows = shapes[HEAD[2]][1], shapes[EMBEDDING][0]
    if shapes[HEAD[0]] != [hidden, 2 * hidden] or config.get("hidden_size", hidden) != hidden:
        found = f"the head is {shapes[HEAD[0]]}, {shapes[HEAD[2]]} for hidden_size {config.get('hidden_size', hidden)}"
        refuse(folder, found, "config.json and weights are of different models: copy both from one checkpoint")
    _check_layers(folder, config, shapes)
    largest = max(_number(folder, config, key) or 0 for key in PREFIX_TOKENS.values())
    if largest >= rows:
        found = f"the embedding has {rows} rows, but a prefix token has id {largest}"
        refuse(folder, found, "Tokenizer and weights are of different models: copy both from one checkpoint")
    return hidden, rows


def _check_layers(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> None:
    """Their number and width. Layout `blender` tells neither: they are in the backbone's config, and are checked on loading."""
    widths = [shape[0] for key, shape in shapes.items() if key.startswith(LAYERS) and key.endswith(WIDTH) and shape]
    for key, found in (("num_hidden_layers", len(widths)), *(("intermediate_size", width) for width in widths)):
        said = _number(folder, config, key)
        if said is not None and said != found:
            refuse(
                folder,
                f"its config.json says {key}={said}, its weights have {found}",
                "config.json and weights are of different models: copy both from one checkpoint",
            )


def refuse(folder: str | Path, found: str, remedy: str) -> NoReturn:
    """Raises NotAPairRM: three parts of one paragraph."""
    raise refusal(folder, found, remedy)


def refusal(folder: str | Path, found: str, remedy: str) -> NotAPairRM:
    return NotAPairRM(f"{folder} cannot serve as the PairRM judge: {found}. {remedy}.")
