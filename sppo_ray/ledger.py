"""The durable record of a run: what was generated and judged, what was sealed, what was trained. What is left to do is
derived from it.

    iter_<t>/ledger/shard-<n>-<hash>.parquet       judged groups as they came; atomic, the hash is of the file's bytes
    iter_<t>/batches.jsonl                         async: what each batch took, a line per update
    iter_<t>/generated.parquet, train.parquet      the sealed slice, in the order of its prompts (or batches)
    iter_<t>/sealed.json                           written last: the slice is complete
    iter_<t>/reference.parquet                     reference log-probabilities of the slice
    iter_<t>/policy/, trained.json                 the policy it gave; trained.json is written last
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sppo_ray.atomic import append_line, read_whole_lines, whole_file, write_json
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.tables import SealedRow, generated_table, train_table
from sppo_ray.types import CutBatch, JudgedGroup, SliceSummary, TrainedIteration

log = logging.getLogger(__name__)


class Ledger:
    """The files of one run directory. One process writes (the buffer actor)."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.root = Path(config.run.dir)
        self._next_shard: dict[Path, int] = {}

    def folder(self, iteration: int) -> Path:
        return self.root / f"iter_{iteration}"

    # Judged groups.

    def append(self, iteration: int, judged: Sequence[JudgedGroup]) -> pa.Table:
        """Write groups as one shard, which is returned; they are durable then."""
        folder = self.folder(iteration) / "ledger"
        if folder not in self._next_shard:
            self._next_shard[folder] = 1 + max((int(p.name.split("-")[1]) for p in folder.glob("shard-*")), default=-1)
        number = self._next_shard[folder]
        table = generated_table(judged, self.config.judge.win_rates)
        content = _serialised(table)
        with whole_file(folder / f"shard-{number:06d}-{_hash(content)}.parquet") as temporary:
            temporary.write_bytes(content)
        self._next_shard[folder] = number + 1
        return table

    def read(self, iteration: int) -> pa.Table | None:
        """All judged groups of an unsealed iteration, each (prompt, epoch) once, the newest; None if there are none.

        A shard whose bytes are not what was written is set aside (renamed .corrupt) with a warning; its groups are made
        again.
        """
        tables = []
        for path in sorted((self.folder(iteration) / "ledger").glob("shard-*.parquet")):
            content = path.read_bytes()
            if _hash(content) == path.stem.split("-")[2]:
                tables.append(pq.read_table(pa.BufferReader(content)))
            else:
                log.warning("ledger shard %s is damaged; set aside, its groups will be made again", path)
                path.rename(path.with_suffix(".corrupt"))
        return _newest_of_each(pa.concat_tables(tables)) if tables else None

    # Batches (async).

    def append_batch(self, batch: CutBatch) -> None:
        """Durable when this returns: a learner that restarts gets the same batch again."""
        append_line(self._batches_path(batch.iteration), dataclasses.asdict(batch))

    def batches(self, iteration: int) -> list[CutBatch]:
        """In order; a last line that a crash cut off is dropped, here and on disk."""
        path = self._batches_path(iteration)
        return [CutBatch.of(line) for line in read_whole_lines(path)] if path.exists() else []

    def rewrite_batches(self, iteration: int, batches: Sequence[CutBatch]) -> None:
        with whole_file(self._batches_path(iteration)) as temporary:
            temporary.write_text("".join(json.dumps(dataclasses.asdict(batch)) + "\n" for batch in batches))

    def _batches_path(self, iteration: int) -> Path:
        return self.folder(iteration) / "batches.jsonl"

    # Sealed slices.

    def seal(self, iteration: int, rows: Sequence[SealedRow]) -> pa.Table:
        """Write the slice's two tables, a row for each of `rows`, in their order; the shards stay as they are until
        `mark_sealed`. Raises SppoError if a group is missing."""
        table = self.read(iteration)
        position = {} if table is None else {key: n for n, key in enumerate(group_keys(table))}
        missing = [row.prompt_id for row in rows if row.key not in position]
        if table is None or missing:
            raise SppoError(
                f"iteration {iteration} cannot be sealed: {len(missing)} prompts have no group: {missing[:5]}"
            )
        table = table.take([position[row.key] for row in rows])
        _write(self.folder(iteration) / "generated.parquet", table)
        _write(self.folder(iteration) / "train.parquet", train_table(table, self.config, iteration, rows))
        return table

    def mark_sealed(self, summary: SliceSummary) -> None:
        """The slice is complete; its shards are no longer needed."""
        write_json(self.folder(summary.iteration) / "sealed.json", dataclasses.asdict(summary))
        shutil.rmtree(self.folder(summary.iteration) / "ledger")

    def sealed(self, iteration: int) -> SliceSummary | None:
        path = self.folder(iteration) / "sealed.json"
        return SliceSummary(**json.loads(path.read_text())) if path.exists() else None

    def generated(self, iteration: int) -> pa.Table:
        return _read(self.folder(iteration) / "generated.parquet")

    # Training.

    def write_reference(self, iteration: int, prompt_ids: Sequence[str], logps: Sequence[tuple[float, ...]]) -> None:
        """Reference log-probabilities (nats) of each example's selected responses."""
        table = pa.table({"prompt_id": list(prompt_ids), "logps": [list(values) for values in logps]})
        _write(self.folder(iteration) / "reference.parquet", table)

    def reference(self, iteration: int) -> list[tuple[float, ...]] | None:
        path = self.folder(iteration) / "reference.parquet"
        return [tuple(v) for v in _read(path)["logps"].to_pylist()] if path.exists() else None

    def mark_trained(self, trained: TrainedIteration) -> None:
        write_json(self.folder(trained.iteration) / "trained.json", dataclasses.asdict(trained))

    def trained(self, iteration: int) -> TrainedIteration | None:
        path = self.folder(iteration) / "trained.json"
        if not path.exists():
            return None
        # The run directory may have moved since.
        return TrainedIteration(**json.loads(path.read_text()) | {"policy_dir": str(self.folder(iteration) / "policy")})

    def last_trained(self) -> TrainedIteration | None:
        """The newest iteration whose policy is saved, if any."""
        last = None
        for iteration in range(1, self.config.schedule.iterations + 1):
            last = self.trained(iteration) or last
        return last


def _write(path: Path, table: pa.Table) -> None:
    with whole_file(path) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def _read(path: Path) -> pa.Table:
    return pq.read_table(path, page_checksum_verification=True)


def group_keys(table: pa.Table) -> list[tuple[str, int]]:
    """(prompt id, epoch) of each row."""
    return list(zip(table["prompt_id"].to_pylist(), table["epoch"].to_pylist(), strict=True))


def _newest_of_each(table: pa.Table) -> pa.Table:
    """A group that was sampled again, since it had become too old, stands for the one before."""
    last = {key: n for n, key in enumerate(group_keys(table))}
    return table if len(last) == len(table) else table.take(list(last.values()))


def _serialised(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def _hash(content: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(content)
