"""Parquet files whose bytes are checked: tables by a checksum on record, ledger shards by the hash in their names."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from sppo_ray.atomic import hash_of, whole_file

log = logging.getLogger(__name__)


def write_table(path: Path, table: pa.Table) -> str:
    """Returns the checksum of the file, of what was meant to be written."""
    with whole_file(path) as temporary, _Hashed(temporary, "wb") as file:
        pq.write_table(table, file, write_page_checksum=True)
        file.close()
        return file.digest.hexdigest()


class _Hashed(io.FileIO):
    """A file that is hashed on its way to the disk."""

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self.digest = xxhash.xxh3_64()

    def write(self, data: Any, /) -> int:
        rest = content = memoryview(data).cast("B")
        while rest:  # a disk that is nearly full takes a part
            rest = rest[super().write(rest) :]
        self.digest.update(content)
        return len(content)


def read_table(path: Path) -> pa.Table:
    return pq.read_table(path, page_checksum_verification=True)


def serialised(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def shard_content(path: Path) -> bytes | None:
    """None if its bytes are not those of the hash in its name: it is set aside then (renamed .corrupt)."""
    content = path.read_bytes()
    if hash_of(content) == path.stem.split("-")[2]:
        return content
    log.warning("ledger shard %s is damaged; set aside, its groups will be made again", path)
    path.rename(path.with_suffix(".corrupt"))
    return None


def rows_of(path: Path) -> int:
    """0 for a file that is damaged, or was set aside at this moment."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowInvalid, OSError):  # OSError: what Arrow raises for a footer it cannot make out, too
        return 0
