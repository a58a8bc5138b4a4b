"""What can be known of a policy from its files, without loading weights: enough to refuse a wrong one at once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sppo_ray.errors import ConfigError
from sppo_ray.given import user_path
from sppo_ray.tokenizer_errors import tokenizer_errors

# Any one of these sets is a tokenizer.
TOKENIZER_FILES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of Cohere, Granite, Falcon-H1, MiniCPM.
_LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "dim_model_base")
_CAUSAL = ("ForCausalLM", "LMHeadModel")
# What a config calls its context, over the families of architectures.
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
_METADATA = ["*.json", "*.jinja", "*.model", "merges.txt", "*.py"]


class NotAPolicy(ConfigError):
    """The folder or hub name cannot serve as the policy."""


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """A policy that passed the checks."""

    model: str  # as configured
    path: Path  # folder with config and tokenizer (of a hub name: the cached snapshot, perhaps without its weights)
    architecture: str  # e.g. MistralForCausalLM
    context_length: int | None  # tokens; the sliding window does not count; None where the config does not say
    vocab_size: int | None  # rows of the embedding
    has_chat_template: bool  # always true once inspected; written to the manifest
    weight_files: tuple[str, ...]  # safetensors


def inspect_policy(model: str, trust_remote_code: bool = False) -> PolicyInfo:
    """Check a local folder or a hub name. Downloads no weights. Raises NotAPolicy (a ConfigError) with the remedy."""
    folder, files = _resolve(model)
    config = _read_json(folder, "config.json", model)
    _refuse_missing_tokenizer(folder, model)
    architecture = _causal_architecture(config, model)
    _refuse_scaled_logits(config, model)
    _refuse_foreign_code(config, model, trust_remote_code)
    if not has_chat_template(folder, model):
        _refuse(
            model,
            "its tokenizer has no chat template, so prompts cannot be put to it as a user's turn",
            "Use an instruction-tuned model, or save a chat_template.jinja beside tokenizer_config.json",
        )
    weights = _weight_files(folder, files, model)
    _refuse_foreign_weights(folder, weights, config, model)
    return PolicyInfo(model, folder, architecture, _context_length(config), _size(config, "vocab_size"), True, weights)


def load_tokenizer(policy: PolicyInfo, trust_remote_code: bool = False) -> Any:
    """The policy's tokenizer (transformers). Raises NotAPolicy if its files do not load."""
    from transformers import AutoTokenizer

    def refusal(why: str) -> NotAPolicy:
        remedy = "Copy the tokenizer's files again from their origin"
        return _refusal(policy.model, f"its tokenizer does not load ({why})", remedy)

    with tokenizer_errors(refusal):
        return AutoTokenizer.from_pretrained(policy.path, trust_remote_code=trust_remote_code, local_files_only=True)


# ---------------------------------------------------------------- where it is


def _resolve(model: str) -> tuple[Path, frozenset[str]]:
    """(folder, names of all files at its top), the names of a hub model including those not downloaded."""
    folder = user_path(model)
    if folder.is_dir():
        return folder.resolve(), _names(folder, model)
    if folder.exists():
        _refuse(model, "it is a file, not a folder", "Give the folder that holds config.json, tokenizer and weights")
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        remedy = "Correct policy.model: a folder that exists, or a hub name such as mistralai/Mistral-7B-Instruct-v0.2"
        _refuse(model, "there is no such folder", remedy)
    return _resolve_hub(model)


def _names(folder: Path, model: str) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in folder.iterdir())
    except OSError as error:
        _refuse(model, f"the folder cannot be read ({error.strerror})", "Check its permissions")


def _resolve_hub(name: str) -> tuple[Path, frozenset[str]]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HFValidationError,
        HTTPError,  # base of every transport error, whichever client the hub uses
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, allow_patterns=_METADATA))
    except GatedRepoError:
        _refuse(name, "the hub gates it", "Accept its licence on the hub and log in with `hf auth login`")
    except (RepositoryNotFoundError, HFValidationError):
        remedy = "Correct policy.model; for a private model log in with `hf auth login`"
        _refuse(name, "there is no such folder here and no such model on the hub", remedy)
    except (LocalEntryNotFoundError, HTTPError) as error:
        reason = str(error).splitlines()[0]
        _refuse(
            name,
            f"there is no such folder here, and the hub was not reached and has no copy in the local cache ({reason})",
            f"Go online, fetch it once with `hf download {name}`, or give a local folder",
        )
    local = {entry.name for entry in folder.iterdir()}
    try:
        remote = {file.filename for file in snapshot_download(name, dry_run=True)}
    except (DryRunError, HTTPError):  # offline: what is in the cache is all there is
        remote = set()
    return folder, frozenset(local | {file for file in remote if "/" not in file})


# ---------------------------------------------------------------- what is in it


def _read_json(folder: Path, name: str, model: str) -> dict[str, Any]:
    try:
        if (folder / name).exists() and not (folder / name).is_file():
            raise ValueError("it is no file")
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        _refuse(model, f"it has no {name}", "Give the folder into which the model was saved with save_pretrained")
    except (OSError, ValueError, RecursionError) as error:
        _refuse(model, f"its {name} cannot be read ({_line(error)})", "Copy the file again from its origin")
    if not isinstance(content, dict):
        _refuse(model, f"its {name} does not hold an object", "Copy the file again from its origin")
    return content


def _refuse_missing_tokenizer(folder: Path, model: str) -> None:
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        wanted = " or ".join("+".join(names) for names in TOKENIZER_FILES)
        _refuse(model, f"it has no tokenizer ({wanted})", "Copy the tokenizer's files beside config.json")


def has_chat_template(folder: Path, model: str = "") -> bool:
    """Whether the tokenizer's files hold a chat template, in any of the places where transformers looks for it."""
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    if not (folder / "tokenizer_config.json").is_file():
        return False
    return bool(_read_json(folder, "tokenizer_config.json", model or str(folder)).get("chat_template"))


def _causal_architecture(config: dict[str, Any], model: str) -> str:
    listed = config.get("architectures")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    causal = next((name for name in names if name.endswith(_CAUSAL)), None)
    if causal is None or config.get("is_encoder_decoder"):
        _refuse(
            model,
            f"it is not a causal language model (architectures: {', '.join(names) or 'none named'})",
            "Use a decoder-only text model whose config.json names a ...ForCausalLM architecture",
        )
    return causal


def _refuse_scaled_logits(config: dict[str, Any], model: str) -> None:
    """The learner projects hidden states by itself (logprobs.py), of what comes between head and softmax it knows Gemma-2's cap."""
    if key := next((key for key in _LOGIT_SCALES if config.get(key) not in (None, 1, 1.0)), None):
        _refuse(
            model,
            f"it scales its logits ({key}={config[key]}), which the learner does not, so it would train on other probabilities",
            "Use another model, or teach sppo_ray/logprobs.py the scale",
        )


def _refuse_foreign_code(config: dict[str, Any], model: str, trusted: bool) -> None:
    """A model whose class transformers lacks runs code from its own folder. Refused unless the user has asked for it."""
    if trusted or "auto_map" not in config:
        return
    from transformers import CONFIG_MAPPING

    if str(config.get("model_type")) not in CONFIG_MAPPING:
        _refuse(
            model,
            f"its model type {config.get('model_type')!r} is unknown to transformers and needs code from the model "
            "itself",
            "Read that code and set policy.trust_remote_code=true, or use another model",
        )


def _weight_files(folder: Path, files: frozenset[str], model: str) -> tuple[str, ...]:
    """Names of the safetensors. Those that lie here are opened, which finds cut files and git-lfs pointers."""
    weights = sorted(name for name in files if name.endswith(".safetensors"))
    if not weights:
        if pickles := sorted(name for name in files if name.endswith(PICKLES)):
            _refuse(
                model,
                f"its weights are pickles ({', '.join(pickles[:3])}), which can run code when they are loaded",
                "Use a revision with safetensors, or load and save it once with save_pretrained where you trust it",
            )
        _refuse(model, "it has no weights (*.safetensors)", "Copy or download the weights")
    if INDEX in files:
        index = _read_json(folder, INDEX, model).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
            _refuse(model, f"its {INDEX} does not say which file holds what", "Copy the file again from its origin")
        shards = sorted(set(index.values()))
        if not shards or not all(name.endswith(".safetensors") for name in shards):
            _refuse(model, f"its {INDEX} names no safetensors, or other files", "Copy the file again from its origin")
        if missing := [name for name in shards if name not in files]:
            _refuse(model, f"{len(missing)} of {len(shards)} shards are missing ({missing[0]})", "Finish the download")
    elif WHOLE not in files:
        found = f"it has {weights[0]}, but neither {WHOLE} nor {INDEX}, by which weights are found"
        _refuse(model, found, "Finish the download, or save the model again with save_pretrained")
    _open_all((folder / name for name in weights), model)
    return tuple(weights)


def _open_all(paths: Iterable[Path], model: str) -> None:
    from safetensors import SafetensorError, safe_open

    for path in paths:
        if not path.exists():  # a hub file that is not downloaded yet
            continue
        try:
            if not path.is_file():
                raise OSError("it is no file")
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            found = f"{path.name} is not a whole safetensors file ({error})"
            _refuse(model, found, "Fetch it again; a cut download and a git-lfs pointer look like this")


def _refuse_foreign_weights(folder: Path, weights: Iterable[str], config: dict[str, Any], model: str) -> None:
    """Embedding and layers are those that config.json names, else the engine dies when it loads them. Of weights that are not all
    here (a hub model's) only what is here is looked at."""
    from safetensors import safe_open

    rows, width, layers = (_size(config, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers"))
    paths, found = [folder / name for name in weights], set[int]()
    for path in filter(Path.exists, paths):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118
                if layer := _LAYER.match(key):
                    found.add(int(layer[1]))
                if key.endswith("embed_tokens.weight"):
                    _refuse_embedding(file.get_slice(key).get_shape(), rows, width, model)
    absent = sorted(set(range(layers or 0)) - found)
    if found and absent and all(map(Path.exists, paths)):
        _refuse_foreign(
            model, f"config.json says num_hidden_layers={layers} but layer {absent[0]} is not in its weights"
        )


def _refuse_embedding(shape: list[int], rows: int | None, width: int | None, model: str) -> None:
    if len(shape) != 2:
        _refuse_foreign(model, f"its embedding is no matrix but has the shape {shape}")
    if rows is not None and shape[0] != rows:
        _refuse_foreign(model, f"its embedding has {shape[0]} rows but config.json says vocab_size={rows}")
    if width is not None and shape[1] != width:
        _refuse_foreign(model, f"its embedding has {shape[1]} columns but config.json says hidden_size={width}")


def _refuse_foreign(model: str, found: str) -> NoReturn:
    _refuse(model, found, "config.json and weights are of different models: copy both from one")


def _context_length(config: dict[str, Any]) -> int | None:
    return next((size for key in _CONTEXT_KEYS if (size := _size(config, key)) is not None), None)


def _size(config: dict[str, Any], key: str) -> int | None:
    """A positive whole number of the config, or of its text part where a model has several."""
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refuse(model: str, found: str, remedy: str) -> NoReturn:
    raise _refusal(model, found, remedy)


def _refusal(model: str, found: str, remedy: str) -> NotAPolicy:
    return NotAPolicy(f"policy.model={model} cannot serve as the policy: {found}. {remedy}.")
