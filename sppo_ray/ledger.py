"""The durable record of a run: what was generated and judged, what was sealed, what was trained. What is left to do is
derived from it.

    iter_<t>/ledger/shard-<n>.parquet              judged groups as they came; atomic, every page with its checksum
    iter_<t>/generated.parquet, train.parquet      the sealed slice, in the order of its prompts
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

from sppo_ray.atomic import whole_file, write_json
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.tables import generated_table, train_table
from sppo_ray.types import JudgedGroup, SliceSummary, TrainedIteration

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

    def append(self, iteration: int, judged: Sequence[JudgedGroup]) -> None:
        """Write groups as one shard; they are durable when this returns."""
        folder = self.folder(iteration) / "ledger"
        folder.mkdir(parents=True, exist_ok=True)
        if folder not in self._next_shard:
            self._next_shard[folder] = 1 + max((int(p.stem.split("-")[1]) for p in folder.glob("shard-*")), default=-1)
        number = self._next_shard[folder]
        _write(folder / f"shard-{number:06d}.parquet", generated_table(judged, self.config.judge.win_rates))
        self._next_shard[folder] = number + 1

    def read(self, iteration: int) -> pa.Table | None:
        """All judged groups of an unsealed iteration, each prompt once; None if there are none.

        A shard that cannot be read whole is set aside (renamed .corrupt) with a warning; its groups are made again.
        """
        tables = []
        for path in sorted((self.folder(iteration) / "ledger").glob("shard-*.parquet")):
            try:
                tables.append(_read(path))
            except (OSError, pa.ArrowInvalid) as error:
                log.warning("ledger shard %s is damaged (%s); set aside, its groups will be made again", path, error)
                path.rename(path.with_suffix(".corrupt"))
        return _first_of_each(pa.concat_tables(tables)) if tables else None

    # Sealed slices.

    def seal(self, iteration: int, prompt_ids: Sequence[str]) -> pa.Table:
        """Write the slice's two tables in the order of prompt_ids; the shards stay as they are until `mark_sealed`."""
        table = self.read(iteration)
        position = {} if table is None else {p: n for n, p in enumerate(table["prompt_id"].to_pylist())}
        missing = [p for p in prompt_ids if p not in position]
        if table is None or missing:
            raise SppoError(
                f"iteration {iteration} cannot be sealed: {len(missing)} prompts have no group: {missing[:5]}"
            )
        table = table.take([position[p] for p in prompt_ids])
        for name, content in (("generated", table), ("train", train_table(table, self.config, iteration))):
            _write(self.folder(iteration) / f"{name}.parquet", content)
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


def _first_of_each(table: pa.Table) -> pa.Table:
    seen: dict[str, int] = {}
    for n, prompt_id in enumerate(table["prompt_id"].to_pylist()):
        seen.setdefault(prompt_id, n)
    return table if len(seen) == len(table) else table.take(list(seen.values()))
