"""Before a run goes on: what a killed process left is cleared, and what the disk did not keep as it was written is found by
its checksum.

    ledger shard                        set aside, its groups are made again
    train.parquet                       made again from generated.parquet
    generated.parquet, not yet trained  set aside, its groups are made again
    reference.parquet, not yet trained  set aside, computed again
    evaluation.parquet, policy gone     set aside, made again
    evaluation.parquet else             set aside, made again if its policy is served again; nothing is compared with it
    batches.jsonl, not yet trained      lost batches are cut anew, and the slice is sealed again
    policy of the last one trained      StorageError: only the user knows of a copy
    of a trained iteration else         said, nothing needs it
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sppo_ray.atomic import checksum_of, sync
from sppo_ray.config import Config
from sppo_ray.ledger import POLICY_FILES, REFERENCE, SEALED, TABLES, TRAINED, Ledger, read_record
from sppo_ray.storage import StorageError
from sppo_ray.tables import SealedRow, train_table

GENERATED, TRAIN, EVALUATION = "generated.parquet", "train.parquet", "evaluation.parquet"


def recover(config: Config) -> list[str]:
    """Call it before anything else uses the run directory; reads every file on record once. Returns what to tell the user.

    Raises StorageError, which says what to do, if the policy that the run would go on from or end with is damaged, and if the
    storage does not let itself be read or put in order.
    """
    try:
        return _recover(config)
    except OSError as error:
        raise StorageError(
            f"{config.run.dir} cannot be looked through before the run goes on: {error}. Nothing of it is lost: see to the disk or "
            "file server, then give the same command again."
        ) from error


def _recover(config: Config) -> list[str]:
    ledger, said = Ledger(config), []
    _clear(ledger.root)
    last = ledger.last_trained()
    for iteration in range(1, config.schedule.iterations + 1):
        folder = ledger.folder(iteration)
        if not (folder / TRAINED).exists():
            _set_evaluation_aside(folder)  # of a policy that is no more: it is evaluated after it is recorded
        else:
            said += _check_policy(folder, iteration, newest=last is not None and last.iteration == iteration)
        if (folder / SEALED).exists():
            said += _check_tables(ledger, iteration)
        if (folder / SEALED).exists():
            shutil.rmtree(folder / "ledger", ignore_errors=True)
        else:
            said += _check_shards(ledger, iteration)
        _clear(folder / "ledger")
    for iteration in range(config.schedule.iterations + 1):
        _clear(ledger.folder(iteration))
        said += _check_evaluation(ledger.folder(iteration))
    return said


def _clear(folder: Path) -> None:
    """Temporary files and folders of writers that were killed."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_policy(folder: Path, iteration: int, newest: bool) -> list[str]:
    """newest: the run would start from this policy, or it is the run's product."""
    damaged = _damaged(folder / "policy", (read_record(folder / TRAINED) or {}).get(POLICY_FILES, {}))
    if damaged and newest:
        raise StorageError(
            f"{_names(damaged)} of the policy in {folder / 'policy'} is not what was written, and the run would go on from it or "
            f"end with it. Put back a whole copy (run.mirror's, if there is one), or delete {folder / TRAINED}: iteration {iteration} "
            "is then trained again from its tables."
        )
    return (
        [f"{_names(damaged)} in {folder / 'policy'} is not what was written; the run does not need it"]
        if damaged
        else []
    )


def _check_evaluation(folder: Path) -> list[str]:
    try:
        whole = not _damaged(folder, read_record((folder / EVALUATION).with_suffix(".json")) or {})
    except StorageError:  # the record itself
        whole = False
    if whole:
        return []
    _set_evaluation_aside(folder)
    return [
        f"{EVALUATION} in {folder} is not what was written; without it later policies may not be compared with that one"
    ]


def _set_evaluation_aside(folder: Path) -> None:
    _set_aside(folder / EVALUATION)
    (folder / EVALUATION).with_suffix(".json").unlink(missing_ok=True)


def _check_tables(ledger: Ledger, iteration: int) -> list[str]:
    folder, record = ledger.folder(iteration), read_record(ledger.folder(iteration) / SEALED) or {}
    trained = (folder / TRAINED).exists()
    damaged = _damaged(folder, record.get(TABLES, {}))
    if not damaged:
        return [] if trained else _check_batches(ledger, iteration)
    what = f"{_names(damaged)} in {folder} is not what was written"
    if GENERATED in damaged:
        if trained:
            return [f"{what}; it is trained already, and the run does not need it"]
        _unseal(folder, damaged)
        return [f"{what}; set aside, and the groups of iteration {iteration} are made again"]
    said = []
    if TRAIN in damaged:
        said.append(_remake_train(ledger, iteration, record, trained))
    if REFERENCE in damaged:
        _set_aside(folder / REFERENCE)
        said.append("it is not needed any more" if trained else "the reference is computed again")
    return [f"{what}; {'; '.join(said)}"]


def _check_shards(ledger: Ledger, iteration: int) -> list[str]:
    """Of a slice that is not sealed, or not any more."""
    damaged = ledger.set_damaged_shards_aside(iteration)
    what = f"{_names(damaged)} in {ledger.folder(iteration) / 'ledger'} is not what was written; set aside, its groups are made again"
    return [what] if damaged else []


def _check_batches(ledger: Ledger, iteration: int) -> list[str]:
    """Of a sealed slice whose batches were cut as groups became ready; train.parquet says which step took what."""
    folder, schedule = ledger.folder(iteration), ledger.config.schedule
    if schedule.mode == "sync" or schedule.batch_order != "ready":
        return []
    table = pq.read_table(folder / GENERATED)
    if _rows(ledger, iteration, table) is not None:
        return []
    ledger.append_table(iteration, table)
    _unseal(folder, [])
    return [f"batches.jsonl in {folder} is not what was written; what it lacks is cut anew"]


def _remake_train(ledger: Ledger, iteration: int, record: dict[str, dict[str, str]], trained: bool) -> str:
    folder = ledger.folder(iteration)
    table = pq.read_table(folder / GENERATED)
    if (rows := _rows(ledger, iteration, table)) is not None:
        checksum = ledger.write_table(iteration, TRAIN, train_table(table, ledger.config, iteration, rows))
        record[TABLES][TRAIN] = checksum
        ledger.write_record(folder / SEALED, record)
    elif trained:
        return "the run does not need it"
    else:  # sealing it again makes it
        ledger.append_table(iteration, table)
        _unseal(folder, [TRAIN])
    return f"{TRAIN} is made again from {GENERATED}"


def _rows(ledger: Ledger, iteration: int, table: pa.Table) -> list[SealedRow] | None:
    """What became of each row of the generated table; None where only the schedule knows."""
    names, epochs = table["prompt_id"].to_pylist(), table["epoch"].to_pylist()
    if ledger.config.schedule.mode == "sync":
        return [SealedRow(name) for name in names]
    taken = [(b.epoch, b.step + 1, b.version) for b in ledger.batches(iteration) for _ in b.groups]
    if [epoch for epoch, _, _ in taken] != epochs:
        return None
    return [SealedRow(name, *what) for name, what in zip(names, taken, strict=True)]


def _unseal(folder: Path, damaged: Sequence[str]) -> None:
    """Sealed tables are written over when the slice is sealed again; a reference is of these tables alone."""
    (folder / SEALED).unlink()
    sync(folder)
    for name in {*damaged, REFERENCE}:
        _set_aside(folder / name)


def _set_aside(path: Path) -> None:
    if path.exists():
        path.rename(path.with_name(f"{path.name}.corrupt"))


def _damaged(folder: Path, checksums: Mapping[str, str]) -> list[str]:
    """Files that are not there or not what they were; runs of before there were checksums have none on record."""
    return [
        name
        for name, checksum in checksums.items()
        if not (folder / name).is_file() or checksum_of(folder / name) != checksum
    ]


def _names(files: Sequence[str]) -> str:
    return ", ".join(files)
