"""Whatever bytes a config, a file of prompts or a model's folder holds: a value, or a ConfigError in plain words.

The examples are the same at every run. To look further: SPPO_FUZZ=20000 python -m pytest tests/unit/test_fuzz.py
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import sppo_ray
from sppo_ray.config import Config
from sppo_ray.config_io import build_config, dump_config, flatten, load_config
from sppo_ray.errors import ConfigError
from sppo_ray.model_folder import has_chat_template, inspect_policy
from sppo_ray.pairrm import inspect_pairrm
from sppo_ray.prompts import load_texts

ASSETS = Path(sppo_ray.__file__).parent / "assets"
ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("SPPO_FUZZ", "100"))
bounded = settings(
    max_examples=EXAMPLES,
    derandomize="SPPO_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` gives, or the message with which it refuses; any other exception fails the test."""
    try:
        return work()
    except ConfigError as refusal:
        message = str(refusal)
        assert message.strip()
        assert "Traceback" not in message
        assert len(message) < 20_000
        message.encode()  # it can be printed
        return message


# ---------------------------------------------------------------- configs

CHARACTERS = st.characters() | st.characters(categories=["Cs"]) | st.sampled_from("\0\x1b\u202e\ufeff~/.")
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**62, max_value=2**70)
    | st.floats()
    | st.dates()
    | st.binary(max_size=8)
    | st.text(CHARACTERS, max_size=20)
    | st.sampled_from(["auto", "slice", "sync", "paper", "~nobody/x", "../..", "x" * 5000, ""])
)
KEYS = st.text(CHARACTERS, max_size=8) | st.sampled_from(list(Config.model_fields)) | SCALARS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)
PATHS = sorted(flatten(Config.model_validate(
    {"run": {"dir": "x"}, "data": {"prompts": "p"}, "policy": {"model": "m"}}
).model_dump()))  # fmt: skip
SHIPPED = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))]
SNIPPETS = [b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.system [id]", b"!!bool x", b"!!timestamp x", b"2024-13-45",
            b"0x_", b"!!binary '*'", b"? [a]\n: b\n", b"[" * 3000, b"{a: " * 500, b"\t", b"\0", b"\xff", b"\xef\xbb\xbf",
            b"\r\n", b".nan", b"-.inf", b"1:2:3", b"!!set {a}", b"!!omap [a]", b"'\\ud800'", b'"\\ud800"', b"%YAML 9.9\n",
            b"---\n", b"...\n", b"1" * 5000, b"0x" + b"f" * 5000, b"rollout: {}\n", b"1: 2\n", b"null: 3\n"]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, originals: list[bytes], snippets: list[bytes] | None = None) -> bytes:
    """A valid file in which a few spans are cut out, doubled, overwritten or have something put in."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 12)))
        kinds = [st.just(b""), st.binary(min_size=1, max_size=12), st.just(bytes(content[start:end]) * 2)]
        content[start:end] = draw(st.one_of(*kinds, *([st.sampled_from(snippets)] if snippets else [])))
    return bytes(content)


def loaded(folder: Path, content: bytes, overrides: list[str] | None = None) -> None:
    """Load; what is accepted is written and read back equal."""
    path = folder / "fuzz.yaml"
    path.write_bytes(content)
    config = outcome(lambda: load_config(path, overrides or []))
    if isinstance(config, Config):
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config


@bounded
@given(content=st.binary(max_size=200) | mutated(SHIPPED, SNIPPETS))
def test_config_files(tmp_path: Path, content: bytes) -> None:
    loaded(tmp_path, content)


@bounded
@given(data=st.dictionaries(KEYS, VALUES, max_size=4) | st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=6))
def test_config_values(tmp_path: Path, data: dict[Any, Any]) -> None:
    """Any data that YAML can spell, in any place."""
    base: dict[Any, Any] = {"run": {"dir": "x"}, "data": {"prompts": "p"}, "policy": {"model": "m"}}
    for key, value in data.items():
        section, dot, name = key.partition(".") if isinstance(key, str) else (key, "", "")
        base[section] = (
            {**base.get(section, {}), name: value} if dot and isinstance(base.get(section, {}), dict) else value
        )
    config = outcome(lambda: build_config(base, tmp_path))
    if isinstance(config, Config):
        loaded(tmp_path, dump_config(config).encode())


@bounded
@given(
    key=st.sampled_from(PATHS) | st.text(CHARACTERS, max_size=12),
    value=SCALARS.map(str) | st.sampled_from(SNIPPETS).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)
def test_overrides(tmp_path: Path, key: str, value: str) -> None:
    loaded(tmp_path, SHIPPED[0], [f"{key}={value}"])


def test_a_billion_laughs_and_a_bottomless_config(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"aliases \(\*name\) are not read here"):
        load_config(path)
    path.write_text("a: &a {b: *a}")
    with pytest.raises(ConfigError, match="aliases"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"/dev/zero has more than 1048576 bytes"):
        load_config(Path("/dev/zero"))


# ---------------------------------------------------------------- prompts

ROWS = [{"prompt_id": f"p{n}", "prompt": f"text {n} \U0001f642", "n": n} for n in range(6)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
JSON_SNIPPETS = [b"\xef\xbb\xbf", b"\r\n", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b"[" * 3000,
                 b'{"prompt": ' * 900, b'"prompt": 1, ', b"\0", b"\xff\xfe", b"\n", b'{"prompt": ["a", {"b": null}]}\n',
                 b'"prompt_id": true', b'"prompt_id": 9' + b"9" * 300, b"\xe2\x80\xa8", b"{}", b"null\n"]  # fmt: skip
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS, max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)


def read(path: Path, content: bytes) -> None:
    """Every prompt that is accepted is text that can be written, with a name of its own."""
    path.write_bytes(content)
    found = outcome(lambda: load_texts(str(path), "prompt", "prompt_id"))
    if not isinstance(found, str):
        assert len({prompt.prompt_id for prompt in found}) == len({prompt.text for prompt in found}) == len(found)
        pa.array([prompt.text for prompt in found], pa.string())
        assert all(prompt.text.strip() for prompt in found)
    else:
        assert str(path) in found  # which file


@bounded
@given(content=st.binary(max_size=120) | mutated([JSONL], JSON_SNIPPETS))
def test_jsonl(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "p.jsonl", content)


@bounded
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["prompt", "prompt_id", "x"]), JSON_VALUES, max_size=3) | JSON_VALUES,
        max_size=5,
    )
)
def test_jsonl_values(tmp_path: Path, rows: list[Any]) -> None:
    read(tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)).encode())


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


TABLES = [
    pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    pa.table({"prompt": pa.array(["a", "b", "a"]).dictionary_encode(), "prompt_id": pa.array([1, 2, 3], pa.uint64())}),
    pa.table({"prompt": pa.array(["a", None], pa.large_string()), "nested": [{"prompt": [1]}, None]}),
]
PARQUET = [
    parquet(table, **o)
    for table in TABLES
    for o in ({"compression": "none"}, {"row_group_size": 2}, {"version": "1.0"})
]


@bounded
@given(content=st.binary(max_size=120) | mutated(PARQUET))
def test_parquet(tmp_path: Path, content: bytes) -> None:
    read(tmp_path / "p.parquet", content)


KINDS = [pa.string(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.bool_(), pa.date32(), pa.timestamp("ns"),
         pa.timestamp("us", tz="Mars/Olympus"), pa.time64("ns"), pa.duration("s"), pa.decimal128(38, 3), pa.null(),
         pa.list_(pa.string()), pa.struct([("prompt", pa.string())]), pa.map_(pa.string(), pa.int8()),
         pa.large_string(), pa.dictionary(pa.int32(), pa.string())]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("column", ["prompt", "prompt_id"])
def test_parquet_columns_of_every_kind(tmp_path: Path, kind: pa.DataType, column: str) -> None:
    """Read as text (or numbers, for ids), or refused with the kind; never a failed conversion."""
    other = {"prompt": "prompt_id", "prompt_id": "prompt"}[column]
    odd = {pa.timestamp("ns"): [1], pa.date32(): [2**31 - 1], pa.duration("s"): [2**62]}.get(kind, [None])
    values = (
        pa.array(odd, pa.int32() if kind == pa.date32() else None).cast(kind) if odd != [None] else pa.nulls(1, kind)
    )
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({column: values, other: ["a"]}), path)
    found = outcome(lambda: load_texts(str(path), "prompt", "prompt_id"))
    assert isinstance(found, list) or "not text" in found


# ---------------------------------------------------------------- model folders


def rewritten(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    shutil.copytree(ASSETS / "policy", folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file({"model.embed_tokens.weight": np.zeros((838, 2), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ASSETS / "judge", tmp_path_factory.mktemp("judge") / "judge"))


def fields(path: Path) -> st.SearchStrategy[bytes]:
    """A JSON file with some of its fields replaced by anything."""
    whole = json.loads(path.read_text())
    extra = [
        "text_config",
        "auto_map",
        "added_tokens_decoder",
        "chat_template",
        "added_tokens",
        "max_position_embeddings",
    ]
    changed = st.dictionaries(st.sampled_from([*whole, *extra]), JSON_VALUES, min_size=1, max_size=3)
    return changed.map(lambda some: json.dumps(whole | some).encode())


def garbled(path: Path) -> st.SearchStrategy[bytes]:
    return fields(path) | mutated([path.read_bytes()], JSON_SNIPPETS) | st.binary(max_size=50)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_policy_folders(policy: Path, name: str) -> None:
    original = (policy / name).read_bytes()

    @bounded
    @given(content=garbled(ASSETS / "policy" / name))
    def check(content: bytes) -> None:
        outcome(lambda: inspect_policy(str(rewritten(policy, name, content))))
        outcome(lambda: has_chat_template(policy))

    try:
        check()
    finally:
        rewritten(policy, name, original)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"])
def test_judge_folders(judge: Path, name: str) -> None:
    source = ASSETS / "judge" / name
    original = source.read_bytes() if source.exists() else b"{}"

    @bounded
    @given(content=garbled(source if source.exists() else ASSETS / "judge" / "tokenizer_config.json"))
    def check(content: bytes) -> None:
        outcome(lambda: inspect_pairrm(rewritten(judge, name, content)))

    try:
        check()
    finally:
        rewritten(judge, name, original)


@bounded
@given(content=mutated([(ASSETS / "judge" / "model.safetensors").read_bytes()[:4096]]) | st.binary(max_size=60))
def test_safetensors(policy: Path, judge: Path, content: bytes) -> None:
    for folder, inspect in ((policy, inspect_policy), (judge, inspect_pairrm)):
        outcome(lambda folder=folder, inspect=inspect: inspect(str(rewritten(folder, "model.safetensors", content))))
