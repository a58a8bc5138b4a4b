"""The durable record of a run: what was generated and judged, what was sealed, what was trained. What is left to do is
derived from it. Every write waits out a fault of the storage (`storage.Storage`) and raises StorageError in the end.

    iter_<t>/ledger/shard-<n>-<hash>.parquet       judged groups as they came; atomic, the hash is of the file's bytes
    iter_<t>/batches.jsonl                         async: what each batch took, a line with a checksum per update
    iter_<t>/generated.parquet, train.parquet      the sealed slice, in the order of its prompts (or batches)
    iter_<t>/sealed.json                           written last: the slice is complete; holds checksums of its tables
    iter_<t>/reference.parquet                     reference log-probabilities of the slice; its checksum is in sealed.json
    iter_<t>/policy/, trained.json                 the policy it gave; trained.json is written last, with its checksums

What is damaged there is found by `recovery.recover` before a run goes on.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sppo_ray.atomic import (
    LineFile,
    checksums_of,
    hash_of,
    line_of,
    read_checked_lines,
    write_bytes,
    write_json,
)
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.storage import Storage, StorageError
from sppo_ray.table_files import read_table, rows_of, serialised, shard_content, write_table
from sppo_ray.tables import SealedRow, generated_table, train_table, with_every_column
from sppo_ray.types import CutBatch, JudgedGroup, SliceSummary, TrainedIteration

SEALED, TRAINED, REFERENCE = "sealed.json", "trained.json", "reference.parquet"
TABLES, POLICY_FILES = "tables", "policy_files"  # keys in sealed.json and trained.json: checksums by file name
CHECKSUM = "xxh3"  # key in both: of the rest


class LedgerDamaged(SppoError):
    """Groups that were on disk are not there any more as they were written. All actors must be started again: what is missing
    is found then, and made again."""


class Ledger:
    """The files of one run directory. One process writes (the buffer actor)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.run.dir)
        self.storage = Storage(config.run.storage_patience_s)
        self._next_shard: dict[Path, int] = {}
        self._tables: dict[int, dict[str, str]] = {}  # by iteration: checksums of the tables written, by file name
        self._batch_files: dict[int, LineFile] = {}
        self._unwritten: list[CutBatch] = []
        self._settling = threading.Lock()

    def folder(self, iteration: int) -> Path:
        return self.root / f"iter_{iteration}"

    # Judged groups.

    def append(self, iteration: int, judged: Sequence[JudgedGroup]) -> pa.Table:
        """Write groups as one shard, which is returned; they are durable then."""
        return self.append_table(iteration, generated_table(judged, self.config.judge.win_rates))

    def append_table(self, iteration: int, table: pa.Table) -> pa.Table:
        folder = self.folder(iteration) / "ledger"
        if folder not in self._next_shard:
            self._next_shard[folder] = 1 + max((int(p.name.split("-")[1]) for p in folder.glob("shard-*")), default=-1)
        number = self._next_shard[folder]
        content = serialised(table)
        path = folder / f"shard-{number:06d}-{hash_of(content)}.parquet"
        self.storage.patiently("judged groups", path, lambda: write_bytes(path, content))
        self._next_shard[folder] = number + 1
        return table

    def read(self, iteration: int) -> pa.Table | None:
        """All judged groups of an unsealed iteration, each (prompt, epoch) once, the newest; None if there are none.

        A damaged shard is set aside, and its groups are made again.
        """
        contents = (content for path in self._shards(iteration) if (content := shard_content(path)) is not None)
        tables = [with_every_column(pq.read_table(pa.BufferReader(content))) for content in contents]
        return _newest_of_each(pa.concat_tables(tables)) if tables else None

    def set_damaged_shards_aside(self, iteration: int) -> list[str]:
        """Their names."""
        return [path.name for path in self._shards(iteration) if shard_content(path) is None]

    def _shards(self, iteration: int) -> list[Path]:
        return sorted((self.folder(iteration) / "ledger").glob("shard-*.parquet"))

    # Batches (async).

    def append_batch(self, batch: CutBatch) -> None:
        """On disk when `settle_batches` returns: this does not wait for the disk. A batch is handed out after that, so a
        learner that restarts gets the same one again."""
        self._unwritten.append(batch)

    def settle_batches(self) -> None:
        """Returns when every batch is on disk."""
        with self._settling:
            while self._unwritten:
                batch = self._unwritten[0]
                file, line = self._batch_file(batch.iteration), dataclasses.asdict(batch)
                self.storage.patiently("a batch", file.path, lambda file=file, line=line: file.append(line))  # type: ignore[misc]
                self._unwritten.pop(0)

    def batches(self, iteration: int) -> list[CutBatch]:
        """In order, up to the first that is damaged or that a crash cut off."""
        return [CutBatch.of(line) for line in read_checked_lines(self._batches_path(iteration))]

    def rewrite_batches(self, iteration: int, batches: Sequence[CutBatch]) -> None:
        path, content = self._batches_path(iteration), b"".join(line_of(dataclasses.asdict(b), True) for b in batches)
        self.storage.patiently("batches", path, lambda: write_bytes(path, content))
        self._batch_files.pop(iteration, None)

    def _batch_file(self, iteration: int) -> LineFile:
        if iteration not in self._batch_files:
            self._batch_files[iteration] = LineFile(self._batches_path(iteration), checked=True)
        return self._batch_files[iteration]

    def _batches_path(self, iteration: int) -> Path:
        return self.folder(iteration) / "batches.jsonl"

    # Sealed slices.

    def seal(self, iteration: int, rows: Sequence[SealedRow]) -> pa.Table:
        """Write the slice's two tables, a row for each of `rows`, in their order; the shards stay as they are until
        `mark_sealed`. Raises LedgerDamaged if a group is missing: it was acknowledged, else nobody would seal."""
        self.settle_batches()
        folder = self.folder(iteration) / "ledger"
        table = self.storage.patiently("the judged groups in", folder, lambda: self.read(iteration), "read")
        position = {} if table is None else {key: n for n, key in enumerate(group_keys(table))}
        missing = [row.prompt_id for row in rows if row.key not in position]
        if table is None or missing:
            raise LedgerDamaged(
                f"iteration {iteration} cannot be sealed: {len(missing)} prompts have no undamaged group in "
                f"{folder}: {missing[:5]}. When the run goes on, they are made again."
            )
        table = table.take([position[row.key] for row in rows])
        self.write_table(iteration, "generated.parquet", table)
        self.write_table(iteration, "train.parquet", train_table(table, self.config, iteration, rows))
        return table

    def write_table(self, iteration: int, name: str, table: pa.Table) -> str:
        """Returns the file's checksum."""
        path = self.folder(iteration) / name
        checksum = self.storage.patiently("a table", path, lambda: write_table(path, table))
        self._tables.setdefault(iteration, {})[name] = checksum
        return checksum

    def mark_sealed(self, summary: SliceSummary) -> None:
        """The slice is complete; its shards are no longer needed."""
        folder = self.folder(summary.iteration)
        self.write_record(folder / SEALED, dataclasses.asdict(summary) | {TABLES: self._tables[summary.iteration]})
        shutil.rmtree(folder / "ledger", ignore_errors=True)  # what stays is cleared when the run goes on

    def sealed(self, iteration: int) -> SliceSummary | None:
        return _read_as(SliceSummary, self.folder(iteration) / SEALED, without=TABLES)

    def write_record(self, path: Path, record: dict[str, Any]) -> None:
        content = record | {CHECKSUM: _checksum(record)}
        self.storage.patiently("the record", path, lambda: write_json(path, content))

    def groups(self, iteration: int) -> int:
        """Judged groups of the iteration on disk, sealed or not; those sampled again may count twice until it is sealed."""
        if summary := self.sealed(iteration):
            return summary.groups
        return sum(rows_of(path) for path in self._shards(iteration))

    def generated(self, iteration: int) -> pa.Table:
        return read_table(self.folder(iteration) / "generated.parquet")

    # Training.

    def write_reference(self, iteration: int, prompt_ids: Sequence[str], logps: Sequence[tuple[float, ...]]) -> None:
        """Reference log-probabilities (nats) of each example's selected responses, of a sealed slice."""
        self.write_table(
            iteration, REFERENCE, pa.table({"prompt_id": list(prompt_ids), "logps": [list(values) for values in logps]})
        )
        path = self.folder(iteration) / SEALED
        record = read_record(path) or {}
        record[TABLES] = record.get(TABLES, {}) | self._tables[iteration]
        self.write_record(path, record)

    def reference(self, iteration: int) -> list[tuple[float, ...]] | None:
        """None too for one whose writing was not finished."""
        path, record = self.folder(iteration) / REFERENCE, read_record(self.folder(iteration) / SEALED) or {}
        if not path.exists() or REFERENCE not in record.get(TABLES, [REFERENCE]):  # before checksums: as it is
            return None
        return [tuple(v) for v in read_table(path)["logps"].to_pylist()]

    def mark_trained(self, trained: TrainedIteration) -> None:
        """Raises StorageError if the policy that the learner wrote is not there for this process."""
        path, policy = self.folder(trained.iteration) / TRAINED, self.folder(trained.iteration) / "policy"

        def checksums() -> dict[str, str]:
            # A simulated learner writes none, and names another folder. A file server may show it a moment later.
            if Path(trained.policy_dir) == policy and not policy.is_dir():
                text = "the learner wrote it, but this node does not see it: run.dir must be shared by all nodes"
                raise FileNotFoundError(errno.ENOENT, text, str(policy))
            return checksums_of(policy)

        files = self.storage.patiently("the checksums of the policy into", path, checksums)
        self.write_record(path, dataclasses.asdict(trained) | {POLICY_FILES: files})

    def trained(self, iteration: int) -> TrainedIteration | None:
        # The run directory may have moved since.
        policy_dir = str(self.folder(iteration) / "policy")
        return _read_as(TrainedIteration, self.folder(iteration) / TRAINED, without=POLICY_FILES, policy_dir=policy_dir)

    def last_trained(self) -> TrainedIteration | None:
        """The newest iteration whose policy is saved, if any."""
        last = None
        for iteration in range(1, self.config.schedule.iterations + 1):
            last = self.trained(iteration) or last
        return last


def read_record(path: Path) -> dict[str, Any] | None:
    """What sealed.json, trained.json or the like holds; None if there is none. Raises StorageError if it is damaged."""
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError(f"it holds {type(record).__name__}")
        if CHECKSUM in record and record.pop(CHECKSUM) != _checksum(record):  # of before there were checksums: none
            raise ValueError("its checksum is of other content")
    except ValueError as error:
        raise _damaged(path, error) from None
    return record


def _checksum(record: Mapping[str, Any]) -> str:
    return hash_of(json.dumps(record, sort_keys=True).encode())


def _read_as(kind: Any, path: Path, without: str, **given: Any) -> Any:
    record = read_record(path)
    try:
        return (
            record
            if record is None
            else kind(**{key: value for key, value in record.items() if key != without} | given)
        )
    except (AttributeError, TypeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"{path} is damaged ({error}). Put back a whole copy (run.mirror's, if there is one), or delete it: what it records is "
        "then done again where it is still needed (without sealed.json a slice is sampled anew)."
    )


def group_keys(table: pa.Table) -> list[tuple[str, int]]:
    """(prompt id, epoch) of each row."""
    return list(zip(table["prompt_id"].to_pylist(), table["epoch"].to_pylist(), strict=True))


def _newest_of_each(table: pa.Table) -> pa.Table:
    """A group that was sampled again, since it had become too old, stands for the one before."""
    last = {key: n for n, key in enumerate(group_keys(table))}
    return table if len(last) == len(table) else table.take(list(last.values()))
