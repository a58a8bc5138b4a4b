"""Sources, checks and slices of prompts, and how they are held to the context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sppo_ray.config import Config
from sppo_ray.errors import ConfigError
from sppo_ray.prompts import (
    PromptReport,
    RawPrompt,
    load_texts,
    normalise,
    read_prompts,
    slice_prompts,
)


def write_jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def config_of(prompts: str, iterations: int = 2, **sections: dict[str, Any]) -> Config:
    given_data = {"prompts": prompts} | sections.pop("data", {})
    sections = {"rollout": {"max_new_tokens": 16}} | sections
    return Config.model_validate(
        {
            "run": {"dir": "unused"},
            "schedule": {"iterations": iterations},
            "data": given_data,
            "policy": {"model": "unused"},
            **sections,
        }
    )


def load(source: str, **options: Any) -> list[RawPrompt]:
    return load_texts(source, "prompt", "prompt_id", **options)


# ---------------------------------------------------------------- reading


def test_jsonl_and_parquet_give_the_same_prompts(tmp_path: Path) -> None:
    ids, texts = ["a", "b/1", "c"], ["first", "None", "Zeile\nzwei ü 🙂"]
    jsonl = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt_id": i, "prompt": t, "x": 1} for i, t in zip(ids, texts, strict=True)]
    )
    parquet = write_parquet(tmp_path / "p.parquet", {"x": [1, 2, 3], "prompt": texts, "prompt_id": ids})
    expected = [RawPrompt(i, t) for i, t in zip(ids, texts, strict=True)]
    assert load(jsonl) == load(parquet) == expected


def test_ids_are_made_from_row_numbers_where_there_are_none(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "prompt_id": 7}, {"prompt": "c"}])
    assert [prompt.prompt_id for prompt in load(source)] == ["row-0", "7", "row-2"]
    parquet = write_parquet(tmp_path / "p.parquet", {"prompt": [f"t{n}" for n in range(5000)]})
    assert [prompt.prompt_id for prompt in load(parquet)] == [f"row-{n}" for n in range(5000)]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "b"}')
    assert [prompt.text for prompt in load(str(path))] == ["a", "b"]


def test_empty_and_repeated_texts_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = ["a", "", " \n", "b", "a", "A", "a "]
    source = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text} for text in texts])
    report = PromptReport()
    assert [prompt.text for prompt in load(source, report=report)] == ["a", "b", "A", "a "]
    assert (report.empty, report.duplicates) == (2, 1)


def test_the_limit_counts_usable_prompts_and_stops_reading(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}\n{"prompt": "c"}\nnot json\n')
    assert [prompt.text for prompt in load(str(path), limit=2)] == ["a", "b"]


def test_a_relative_path_is_tried_beside_the_config_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, cwd = tmp_path / "configs", tmp_path / "cwd"
    beside.mkdir()
    cwd.mkdir()
    write_jsonl(beside / "p.jsonl", [{"prompt": "beside"}])
    write_jsonl(cwd / "p.jsonl", [{"prompt": "cwd"}])
    write_jsonl(cwd / "q.jsonl", [{"prompt": "only cwd"}])
    monkeypatch.chdir(cwd)
    assert load("p.jsonl", base_dir=beside)[0].text == "beside"
    assert load("q.jsonl", base_dir=beside)[0].text == "only cwd"
    assert load("p.jsonl")[0].text == "cwd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": ', r"p\.jsonl, line 2 is not valid JSON"),
        (b'{"prompt": "a"}\n\n{"prompt": "b"} {}\n', r"line 3 is not valid JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xff\xfe"}\n', r"p\.jsonl, line 2 is not UTF-8"),
        ('{"prompt": "a"}'.encode("utf-16"), r"line 1 is not UTF-8"),
        (b"[" * 100_000, r"line 1 is not valid JSON"),
        (b'["a"]\n', r"line 1 holds a JSON list, not an object"),
        (b'{"text": "a", "id": 1}\n', r"line 1 has no column 'prompt'; it has 'text', 'id': set data\.column"),
        (b'{"prompt": "a"}\n{"prompt": ["b"]}\n', r"line 2: 'prompt' holds list"),
        (b'{"prompt": null}\n', r"line 1: 'prompt' holds NoneType"),
        (b'{"prompt": "\\ud800"}\n', r"line 1: 'prompt' holds half a surrogate pair"),
        (b'{"prompt": "a", "prompt_id": 1.5}\n', r"line 1: the id in 'prompt_id' is a float"),
        (b'{"prompt": "a", "prompt_id": "x"}\n{"prompt": "b", "prompt_id": "x"}\n', r"line 1 and line 2 .* id 'x'"),
        (b'{"prompt": "a", "prompt_id": "row-1"}\n{"prompt": "b"}\n', r"have the same id 'row-1'"),
    ],
)
def test_bad_jsonl_is_refused_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load(str(path))


def test_bad_parquet_is_refused(tmp_path: Path) -> None:
    whole = Path(write_parquet(tmp_path / "whole.parquet", {"prompt": [f"text {n}" for n in range(3000)]}))
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cut\.parquet cannot be read as parquet"):
        load(str(cut))
    damaged = bytearray(whole.read_bytes())
    damaged[4:400] = bytes(396)
    cut.write_bytes(bytes(damaged))
    with pytest.raises(ConfigError, match=r"cut\.parquet cannot be read as parquet"):
        load(str(cut))
    with pytest.raises(ConfigError, match=r"no column 'prompt'; it has 'text', 'n'"):
        load(write_parquet(tmp_path / "other.parquet", {"text": ["a"], "n": [1]}))
    with pytest.raises(ConfigError, match=r"row 1: 'prompt' holds NoneType"):
        load(write_parquet(tmp_path / "null.parquet", {"prompt": ["a", None]}))
    with pytest.raises(ConfigError, match=r"int\.parquet: 'prompt' holds int64, not text: set data\.column"):
        load(write_parquet(tmp_path / "int.parquet", {"prompt": [3]}))
    invalid = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"prompt": invalid}), cut)
    with pytest.raises(ConfigError, match=r"cut\.parquet, 'prompt', row 0 is not UTF-8"):
        load(str(cut))


def test_sources_that_are_not_there_or_not_readable_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file of prompts at .*nowhere\.jsonl"):
        load(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ConfigError, match=r"no file of prompts at .*beside.* or .*p\.csv"):
        load("p.csv", base_dir=tmp_path / "beside")
    with pytest.raises(ConfigError, match="is a folder"):
        load(str(tmp_path))
    (tmp_path / "p.csv").write_text("prompt\na\n")
    with pytest.raises(ConfigError, match=r"neither \.jsonl nor \.parquet"):
        load(str(tmp_path / "p.csv"))
    with pytest.raises(ConfigError, match="has no split 'train'"):
        load(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}]), split="train")


def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {
        name: datasets.Dataset.from_dict({"prompt": [f"{name} {n}" for n in range(3)], "extra": [0, 0, 0]})
        for name in ("train", "test")
    }
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, split=None: datasets.DatasetDict(parts) if split is None else parts[split],
    )
    assert [prompt.text for prompt in load("org/set", split="test")] == ["test 0", "test 1", "test 2"]
    assert load("org/set")[0].text == "train 0"
    with pytest.raises(ConfigError, match="data set org/set has no column 'text'"):
        load_texts("org/set", "text", "prompt_id")
    del parts["train"]
    parts["valid"] = parts["test"]
    with pytest.raises(ConfigError, match=r"splits test, valid: name one"):
        load("org/set")


@pytest.mark.parametrize("name", ["text", "csv", "json", "parquet", "imagefolder"])
def test_the_name_of_a_file_format_does_not_stand_for_all_files_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("not a prompt")
    with pytest.raises(ConfigError, match=f"{name!r} is a format of files, not a data set"):
        load_texts(name, "text", "prompt_id")


@pytest.mark.parametrize("error", [ConnectionError("offline"), ValueError("Unknown split"), FileNotFoundError("none")])
def test_a_hub_data_set_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(name: str, split: str | None = None) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ConfigError, match=f"'org/set', split 'x' cannot be loaded .{error}"):
        load("org/set", split="x")


# ---------------------------------------------------------------- slices


@given(count=st.integers(0, 60), iterations=st.integers(1, 9), seed=st.integers(0, 2**63))
def test_slices_are_equal_disjoint_complete_and_repeatable(count: int, iterations: int, seed: int) -> None:
    raw = [RawPrompt(f"row-{n}", f"text {n}") for n in range(count)]
    slices = slice_prompts(raw, iterations, seed)
    assert len(slices) == iterations
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(p.prompt_id for part in slices for p in part) == sorted(p.prompt_id for p in raw)
    assert slices == slice_prompts(raw, iterations, seed)


def test_another_seed_cuts_another_way() -> None:
    raw = [RawPrompt(str(n), str(n)) for n in range(50)]
    assert slice_prompts(raw, 3, 1) != slice_prompts(raw, 3, 2)


def test_more_prompts_than_the_authors_scripts_could_take(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "p.parquet", {"prompt": [f"prompt {n}" for n in range(60_000)]})
    assert [len(part) for part in read_prompts(config_of(source, iterations=3)).slices] == [20_000] * 3


def test_splits_are_one_per_iteration_and_share_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    sets = {name: datasets.Dataset.from_dict({"prompt": [f"{name}{n}" for n in range(5)]}) for name in "ab"}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: sets[split])
    data = {"splits": ["a", "b"]}
    whole = read_prompts(config_of("org/set", data=data)).slices
    assert [[p.text for p in part] for part in whole] == [[f"{s}{n}" for n in range(5)] for s in "ab"]
    assert whole[1][0].prompt_id == "b-row-0"
    limited = read_prompts(config_of("org/set", data=data | {"limit": 5})).slices
    assert [len(part) for part in limited] == [3, 2]


@pytest.mark.parametrize(
    ("rows", "found"), [([], "no usable"), ([{"prompt": ""}], "no usable"), ([{"prompt": "a"}], "1")]
)
def test_too_few_prompts_are_refused(tmp_path: Path, rows: list[Any], found: str) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(ConfigError, match=rf"gives {found}.* but 2 iterations need"):
        read_prompts(config_of(source))


# ---------------------------------------------------------------- held out


def test_heldout_prompts_that_are_trained_on_are_left_out_before_the_limit(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Question {n}?"} for n in range(4)])
    held = write_jsonl(
        tmp_path / "held.jsonl",
        [{"prompt": t} for t in ("question  0?", "new one", "Question 3?\n", "new two", "new three")],
    )
    raw = read_prompts(config_of(train, evaluation={"prompts": held, "limit": 2}))
    assert [prompt.text for prompt in raw.heldout] == ["new one", "new two"]
    assert raw.report.leaked == 2
    assert normalise(" Question  3?\n") == "question 3?"


def test_held_out_prompts_have_a_column_of_their_own(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "t.jsonl", [{"instruction": "one"}, {"instruction": "two"}])
    held = write_jsonl(tmp_path / "h.jsonl", [{"prompt": "three", "question": "four"}])
    mine = {"column": "instruction"}
    raw = read_prompts(config_of(train, data=mine, evaluation={"prompts": held}))
    assert [prompt.text for prompt in raw.heldout] == ["three"]
    raw = read_prompts(config_of(train, data=mine, evaluation={"prompts": held, "column": "question"}))
    assert [prompt.text for prompt in raw.heldout] == ["four"]
    with pytest.raises(ConfigError, match=r"h\.jsonl, line 1 has no column 'text'.*evaluation\.column"):
        read_prompts(config_of(train, data=mine, evaluation={"prompts": held, "column": "text"}))


def test_a_heldout_set_with_nothing_new_is_refused(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"Question {n}?"} for n in range(4)])
    with pytest.raises(ConfigError, match=r"leaves nothing to evaluate on: it has 4 usable prompts and 4"):
        read_prompts(config_of(train, evaluation={"prompts": train}))
    rest = read_prompts(config_of(train, data={"limit": 2}, evaluation={"prompts": train}))
    assert [prompt.text for prompt in rest.heldout] == ["Question 2?", "Question 3?"]
