"""Rows of prompts from a .jsonl file, a .parquet file or a hub data set, one at a time.

Whatever is wrong with a source becomes a ConfigError that names the file and the line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sppo_ray.errors import ConfigError
from sppo_ray.given import user_path

FILE_SUFFIXES = (".jsonl", ".parquet")
# Names that are plainly files, so that a misspelt path is not looked up on the hub.
_OTHER_FILES = (".json", ".csv", ".tsv", ".txt", ".arrow", ".gz", ".zip", ".zst", ".xz")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_BATCH = 2048
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the source; nothing is checked yet."""

    where: str  # for messages: "line 7" (from 1) or "row 6" (from 0)
    text: Any
    prompt_id: Any  # None where the source has none


def is_file(source: str) -> bool:
    """Whether `source` means a file (there or not) rather than a hub data set."""
    path = user_path(source)
    return path.exists() or path.suffix in FILE_SUFFIXES + _OTHER_FILES or not _HUB_NAME.fullmatch(source)


def read_rows(
    source: str, column: str, id_column: str, split: str | None, base_dir: Path | None = None
) -> Iterator[Row]:
    """Rows in file order. Raises ConfigError, at the first row or on the way, naming the source and the line."""
    if not is_file(source) and not (base_dir is not None and user_path(base_dir / source).exists()):
        return _hub_rows(source, column, id_column, split)
    path = _find(source, base_dir)
    if split is not None:
        raise ConfigError(f"{path} is a file and has no split {split!r}: set data.splits or evaluation.split to null.")
    if path.suffix == ".jsonl":
        return _jsonl_rows(path, column, id_column)
    return _parquet_rows(path, column, id_column)


def _find(source: str, base_dir: Path | None) -> Path:
    path = user_path(source)
    tried = [path] if path.is_absolute() or base_dir is None else [base_dir / path, path]
    found = next((candidate for candidate in tried if user_path(candidate).exists()), None)
    if found is None:
        raise ConfigError(
            f"There is no file of prompts at {' or '.join(str(p.absolute()) for p in tried)}: "
            "correct data.prompts (or evaluation.prompts), a .jsonl or .parquet file or a hub data set name."
        )
    if not found.is_file() or found.suffix not in FILE_SUFFIXES:
        kind = "a folder" if found.is_dir() else "neither .jsonl nor .parquet"
        raise ConfigError(f"{found} is {kind}: prompts come from one .jsonl or .parquet file, or a hub data set name.")
    return found


def _jsonl_rows(path: Path, column: str, id_column: str) -> Iterator[Row]:
    try:
        with path.open("rb") as file:  # as bytes, so that a bad one can be placed on its line
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield _jsonl_row(f"{path}, line {number}", f"line {number}", line, column, id_column)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error}): check the file and its permissions.") from error


def _jsonl_row(place: str, where: str, line: bytes, column: str, id_column: str) -> Row:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place} is not UTF-8 ({error.reason}): save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not valid JSON ({error}): write one JSON object per line.") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{place} holds a JSON {type(record).__name__}, not an object: write {{{column!r}: ...}}.")
    _require(column, record, place)
    return Row(where, record[column], record.get(id_column))


def _parquet_rows(path: Path, column: str, id_column: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _require(column, schema.names, str(path))
            wanted = [name for name in dict.fromkeys((column, id_column)) if name in schema.names]
            for name in wanted:
                _refuse_columns_of_another_kind(path, schema, name, numbers=name != column)
            number = 0
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                columns = {name: _values(batch.column(name), f"{path}, {name!r}", number) for name in wanted}
                yield from _column_rows(columns, column, id_column, number)
                number += batch.num_rows
    except UnicodeDecodeError as error:  # of a column's name
        raise ConfigError(f"{path} holds a name that is not UTF-8 ({error.reason}): write the file again.") from error
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as parquet ({error}): if it was cut short, copy it again.") from error


def _refuse_columns_of_another_kind(path: Path, schema: Any, name: str, numbers: bool) -> None:
    """Only what becomes Python text (and whole numbers) is read: dates and nested values may fail on the way."""
    import pyarrow.types as kinds

    if schema.names.count(name) > 1:
        raise ConfigError(f"{path} has {schema.names.count(name)} columns {name!r}: keep one.")
    kind = schema.field(name).type
    plain = kind.value_type if kinds.is_dictionary(kind) else kind
    text = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_null)
    if not any(test(plain) for test in (*text, kinds.is_integer) if numbers or test is not kinds.is_integer):
        raise ConfigError(
            f"{path}: {name!r} holds {kind}, not text{' or whole numbers' if numbers else ''}: set "
            f"{'data.id_column' if numbers else 'data.column (evaluation.column for held-out prompts)'} to another column."
        )


def _values(column: Any, place: str, first: int) -> list[Any]:
    """A column as Python values. Arrow does not look at the bytes of its text when it reads them."""
    values = []
    for number, value in enumerate(column, start=first):
        try:
            values.append(value.as_py())
        except UnicodeDecodeError as error:
            raise ConfigError(f"{place}, row {number} is not UTF-8 ({error.reason}): repair the row.") from error
    return values


def _hub_rows(name: str, column: str, id_column: str, split: str | None) -> Iterator[Row]:
    table = _hub_table(name, split)
    _require(column, table.column_names, f"data set {name}")
    kept = [c for c in dict.fromkeys((column, id_column)) if c in table.column_names]
    number = 0
    for batch in table.select_columns(kept).iter(batch_size=_BATCH):
        yield from _column_rows(batch, column, id_column, number)
        number += len(batch[column])


def _hub_table(name: str, split: str | None) -> Any:
    """A datasets.Dataset of one split: the one asked for, else the only one, else `train`."""
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from huggingface_hub.errors import HTTPError  # base of every transport error, whichever client the hub uses

    if name in _PACKAGED_DATASETS_MODULES:  # it would read every such file below the working directory
        raise ConfigError(
            f"{name!r} is a format of files, not a data set: name one .jsonl or .parquet file, or a data set of the hub (owner/name)."
        )
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, HTTPError) as error:
        raise ConfigError(
            f"The data set {name!r}{f', split {split!r}' if split else ''} cannot be loaded ({error}): check the name "
            "and the "
            "split, and the connection to the hub; offline it must be in the local cache already."
        ) from error
    if split is not None:
        return loaded
    if len(loaded) != 1 and "train" not in loaded:
        splits = ", ".join(map(str, loaded))
        raise ConfigError(
            f"The data set {name!r} has the splits {splits}: name one in data.splits or evaluation.split."
        )
    return loaded["train"] if "train" in loaded else next(iter(loaded.values()))


def _column_rows(columns: dict[str, list[Any]], column: str, id_column: str, first: int) -> Iterator[Row]:
    texts = columns[column]
    ids = columns.get(id_column) or [None] * len(texts)
    for offset, (text, prompt_id) in enumerate(zip(texts, ids, strict=True)):
        yield Row(f"row {first + offset}", text, prompt_id)


def _require(column: str, found: Iterable[str], place: str) -> None:
    if column not in (names := list(found)):
        raise ConfigError(
            f"{place} has no column {column!r}; it has {', '.join(map(repr, names)) or 'none'}: set data.column "
            "(evaluation.column for held-out prompts) to the column that holds the prompts."
        )
