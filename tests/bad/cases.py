"""The corpus beyond the config files: data sets, and model folders made from the embedded ones. Name -> (maker, messages)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
ASSETS = HERE.parents[1] / "sppo_ray" / "assets"

# ---------------------------------------------------------------- data: tests/bad/data/<name>.jsonl

JSONL: dict[str, tuple[str, ...]] = {
    "lone_surrogate": ("line 2: 'prompt' holds half a surrogate pair",),
    "lone_surrogate_in_id": ("line 2: the id in 'prompt_id' is not valid Unicode",),
    "raw_surrogate_bytes": ("line 2 is not UTF-8", "save the file as UTF-8"),
    "nan_prompt": ("line 2: 'prompt' holds float (nan), not text", "set data.column"),
    "huge_int_prompt": ("line 2: 'prompt' holds int (99999",),
    "int_beyond_python": ("line 2 is not valid JSON", "4300 digits"),
    "chat_instead_of_text": ("line 1: 'prompt' holds list ([{'content': 'hi', 'role': 'user'}]), not text",),
    "nested_deep": ("line 2: 'prompt' holds list ([[[",),
    "nested_too_deep": ("line 2 is not valid JSON", "recursion"),
    "true_as_id": ("line 2: the id in 'prompt_id' is a bool: use text or whole numbers",),
    "control_byte_in_json": ("line 2 is not valid JSON", "Invalid control character"),
    "one_json_array": ("line 1 holds a JSON list, not an object",),
    "pretty_printed": ("line 1 is not valid JSON", "write one JSON object per line"),
    "column_in_other_case": ("line 1 has no column 'prompt'; it has 'Prompt': set data.column",),
    "white_space_only": ("gives no usable prompts, but 2 iterations need at least one each",),
    "same_text_twice": ("gives 1 usable prompts, but 2 iterations need",),
    "same_id_as_number_and_text": ("line 1 and line 2 have the same id '7' but different texts",),
    "utf16": ("line 1 is not UTF-8",),
    "gzip_by_another_name": ("line 1 is not UTF-8",),
}


def table(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def twice(path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]), path)


def cut_short(path: Path) -> None:
    table(prompt=["a", "b"])(path)
    path.write_bytes(path.read_bytes()[:-6])


def surrogate_bytes(path: Path) -> None:
    raw = b"fine\xed\xa0\xbd"
    offsets = pa.py_buffer(np.array([0, 4, len(raw)], np.int32))
    pq.write_table(
        pa.table({"prompt": pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(raw)])}), path
    )


PARQUET: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "cut_short": (cut_short, ("cannot be read as parquet", "if it was cut short, copy it again")),
    "jsonl_by_another_name": (lambda path: path.write_text('{"prompt": "a"}') and None, ("cannot be read as parquet",)),
    "nothing": (lambda path: path.write_bytes(b"") and None, ("cannot be read as parquet",)),
    "no_rows": (table(prompt=pa.array([], pa.string())), ("gives no usable prompts",)),
    "no_column": (table(text=["a"], answer=["b"]), ("no column 'prompt'; it has 'text', 'answer'",)),
    "column_twice": (twice, ("has 2 columns 'prompt': keep one",)),
    "bytes": (table(prompt=[b"a", b"b"]), ("'prompt' holds binary, not text: set data.column",)),
    "dates": (table(prompt=pa.array([1, 2], pa.timestamp("ns"))), ("'prompt' holds timestamp[ns], not text",)),
    "chats": (table(prompt=[[{"role": "user"}]]), ("'prompt' holds list<", "not text")),
    "null": (table(prompt=["a", None]), ("row 1: 'prompt' holds NoneType",)),
    "ids_are_fractions": (
        table(prompt=["a"], prompt_id=[0.5]),
        ("'prompt_id' holds double, not text or whole numbers",),
    ),
    "surrogate_bytes": (surrogate_bytes, ("'prompt', row 1 is not UTF-8", "repair the row")),
}

# ---------------------------------------------------------------- model folders: a copy of the embedded one, spoilt


def edit(name: str, **fields: Any) -> Callable[[Path], None]:
    """Set fields of a JSON file; `...` removes one."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | fields
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return spoil


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def remove(*names: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return spoil


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def rename_to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_leads_outside(folder: Path) -> None:
    weight_map = {"w": "../../elsewhere/model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def fewer_rows(key: str, rows: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file(state | {key: state[key][:rows].copy()}, folder / "model.safetensors")

    return spoil


def scalar_embedding(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.embed_tokens.weight": np.array(1, np.float32)}, folder / "model.safetensors")


def fewer_layers(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("model.layers.0.")}, folder / "model.safetensors")


def pipe(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


def shard_without_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


def small_vocabulary(folder: Path) -> None:
    edit("config.json", vocab_size=50)(folder)
    fewer_rows("model.embed_tokens.weight", 50)(folder)


def tokenizer_of_the_judge(folder: Path) -> None:
    shutil.copy(ASSETS / "judge" / "tokenizer.json", folder)


def tokenizer_of_the_policy(folder: Path) -> None:
    shutil.copy(ASSETS / "policy" / "tokenizer.json", folder)


def weights_of_the_policy(folder: Path) -> None:
    shutil.copy(ASSETS / "policy" / "model.safetensors", folder)


def headless(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("head_layer")}, folder / "model.safetensors")


def folder_as_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


TOKENIZER = "tokenizer_config.json"
# What the tokenizers library panics of, which is no Exception in Python: when it reads its file, or at work.
PANICS: dict[str, tuple[dict[str, Any], str]] = {
    "merges": ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a a"]}}, "its tokenizer does not load"),
    "charsmap": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "its tokenizer does not load"),
    "replace": (
        {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}}, "cannot encode the prompts (index out of",
    ),
    "length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "cannot encode the prompts (chunk size must be non-zero)"),
}  # fmt: skip
Case = tuple[Callable[[Path], None], tuple[str, ...]]
POLICY: dict[str, Case] = {
    "no_config": (remove("config.json"), ("it has no config.json",)),
    "config_is_a_folder": (folder_as_config, ("its config.json cannot be read",)),
    "config_cut": (write("config.json", '{"model_type": "lla'), ("its config.json cannot be read", "Copy the file again")),
    "config_bottomless": (write("config.json", "[" * 100_000), ("its config.json cannot be read", "recursion")),
    "config_is_text": (write("config.json", '"llama"'), ("its config.json does not hold an object",)),
    "architecture_is_a_number": (edit("config.json", architectures=5), ("not a causal language model", "none named")),
    "encoder": (edit("config.json", architectures=["BertModel"]), ("not a causal language model (architectures: BertModel)",)),
    "own_code": (
        edit("config.json", model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling.Mystery"}),
        ("model type 'mystery' is unknown to transformers", "policy.trust_remote_code=true"),
    ),
    "own_tokenizer_code": (
        edit(TOKENIZER, auto_map={"AutoTokenizer": ["tokenization.Mystery", None]}, tokenizer_class="Mystery"),
        ("its tokenizer does not load", "trust_remote_code"),
    ),
    "no_tokenizer": (remove("tokenizer.json"), ("it has no tokenizer", "Copy the tokenizer's files")),
    "tokenizer_cut": (write("tokenizer.json", '{"model": '), ("its tokenizer does not load",)),
    "tokenizer_of_no_known_kind": (
        write("tokenizer.json", '{"version": "1.0", "model": {"type": "Oracle"}}'),
        ("its tokenizer does not load", "Copy the tokenizer's files again"),
    ),
    "tokenizer_without_unknown_token": (
        edit("tokenizer.json", model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}),
        ("cannot encode the prompts (WordLevel error: Missing [UNK] token", "repair its files"),
    ),
    **{f"tokenizer_panics_{name}": (edit("tokenizer.json", **field), (found,)) for name, (field, found) in PANICS.items()},
    "tokenizer_of_another_model": (tokenizer_of_the_judge, ("tokenizer and weights are of different models",)),
    "vocabulary_too_small": (small_vocabulary, ("vocabulary ends at 49: tokenizer and weights are of different models",)),
    "embedding_of_another_model": (
        fewer_rows("model.embed_tokens.weight", 100),
        ("its embedding has 100 rows but config.json says vocab_size=",),
    ),
    "no_chat_template": (edit(TOKENIZER, chat_template=...), ("its tokenizer has no chat template", "chat_template.jinja")),
    "template_divides_by_zero": (edit(TOKENIZER, chat_template="{{ 1 / 0 }}"), ("does not render a single user turn (division",)),
    "template_for_system_only": (
        edit(TOKENIZER, chat_template="{{ raise_exception('give a system turn first') }}"),
        ("does not render a single user turn (give a system turn first)", "repair chat_template"),
    ),
    "template_opens_files": (
        edit(TOKENIZER, chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        ("does not render a single user turn", "unsafe"),
    ),
    "template_without_the_text": (edit(TOKENIZER, chat_template="Hello!"), ("writes a turn's text 0 times instead of once",)),
    "no_weights": (remove("model.safetensors"), ("it has no weights (*.safetensors)",)),
    "weights_cut": (truncate, ("model.safetensors is not a whole safetensors file", "Fetch it again")),
    "git_lfs_pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
        ("is not a whole safetensors file", "git-lfs pointer"),
    ),
    "pickle_only": (rename_to_pickle, ("its weights are pickles (pytorch_model.bin), which can run code",)),
    "index_leads_outside": (index_leads_outside, ("1 of 1 shards are missing (../../elsewhere/model.safetensors)",)),
    "index_of_nothing": (write("model.safetensors.index.json", '{"weight_map": {}}'), ("names no safetensors, or other files",)),
    "index_of_other_files": (
        write("model.safetensors.index.json", '{"weight_map": {"w": "config.json"}}'),
        ("names no safetensors, or other files",),
    ),
    "shard_without_index": (shard_without_index, ("it has model-00001-of-00002.safetensors, but neither",)),
    "embedding_is_a_number": (scalar_embedding, ("its embedding is no matrix but has the shape []",)),
    "embedding_too_narrow": (edit("config.json", hidden_size=4096), ("columns but config.json says hidden_size=4096",)),
    "more_layers_than_weights": (edit("config.json", num_hidden_layers=999), ("says num_hidden_layers=999 but layer",)),
    "a_layer_is_missing": (fewer_layers, ("but layer 0 is not in its weights",)),
    "config_is_a_pipe": (pipe("config.json"), ("its config.json cannot be read (it is no file)",)),
    "weights_are_a_pipe": (pipe("model.safetensors"), ("model.safetensors is not a whole safetensors file (it is no file)",)),
    "terminal_commands_in_a_name": (
        edit("config.json", architectures=["\x1b[2J\x1b]0;pwn\x07Bert"]),
        ("not a causal language model (architectures: \\x1b[2J\\x1b]0;pwn\\x07Bert)",),
    ),
    "index_of_numbers": (
        write("model.safetensors.index.json", '{"weight_map": {"w": 3}}'),
        ("does not say which file holds what",),
    ),
}  # fmt: skip
JUDGE: dict[str, Case] = {
    "no_config": (remove("config.json"), ("cannot serve as the PairRM judge: it has no config.json",)),
    "config_bottomless": (write("config.json", "[" * 100_000), ("its config.json is not JSON", "recursion")),
    "policy_as_judge": (edit("config.json", ranker_type=..., architectures=["LlamaForCausalLM"]), ("its architecture is",)),
    "reward_model": (edit("config.json", ranker_type="scalar"), ("its ranker_type is 'scalar', not 'pairranker'",)),
    "limits_as_text": (edit("config.json", source_maxlength="long"), ("config.json says source_maxlength='long', not a whole",)),
    "limits_too_small": (edit("config.json", candidate_maxlength=2), ("leave no room for text",)),
    "no_tokenizer": (remove("tokenizer.json"), ("it has no tokenizer (tokenizer.json or spm.model)",)),
    "tokenizer_of_the_policy": (tokenizer_of_the_policy, ("prefix tokens are missing", "<|candidate1|>")),
    "tokenizer_tokens_garbled": (
        write("added_tokens.json", '["<|source|>"]'),
        ("its added_tokens.json is not an object",),
    ),
    "tokenizer_of_no_known_kind": (
        edit("tokenizer.json", model={"type": "Oracle"}),
        ("its tokenizer does not load", "Copy the tokenizer's files again"),
    ),
    "tokenizer_without_separator": (edit("tokenizer.json", post_processor=None), ("not [CLS] prefix text [SEP]",)),
    **{
        f"tokenizer_panics_{name}": (edit("tokenizer.json", **field), ("its tokenizer does not load", "again from their origin"))
        for name, (field, _) in PANICS.items()
    },
    "tokenizer_of_words_alone": (
        edit("tokenizer.json", model={"type": "WordLevel", "vocab": {}, "unk_token": "?"}),
        ("its tokenizer",),
    ),
    "no_head": (headless, ("its weights lack head_layer.1.weight", "no comparison head")),
    "weights_cut": (truncate, ("model.safetensors is not a safetensors file",)),
    "weights_of_the_policy": (weights_of_the_policy, ("its weights lack head_layer.1.weight",)),
    "pickle_only": (rename_to_pickle, ("its weights are a pickle (pytorch_model.bin)",)),
}  # fmt: skip
