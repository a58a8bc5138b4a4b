"""Kills the processes of a run, one after the other, by a seeded script, and compares what it made with an undisturbed run.
The kills are spread over the work: sampling, training, publishing, evaluating; one in five comes at once when
it is due, be the run starting again from the one before.

    python scripts/bench/chaos.py --kills 100 --nodes 2 rollout.engine=async       # sync: the same tables and weights?
    python scripts/bench/chaos.py --kills 100 --nodes 2 --config configs/tiny_cpu_async.yaml rollout.engine=async
                                                                                   # async: bound held, each prompt once?

Kinds: rollout, judge, buffer, weights (the hub), learner (a rank), controller (of the learner), driver, power (everything at
once); with rollout.engine=async, engine (vLLM's process under a rollout worker); with --nodes 2, node (the one without the driver,
with all that is on it; another joins). After driver and power the run is gone on with by `sppo train --resume run.dir=...`. Exit
code 1 if a row is lost, doubled or different. When a run ends before all kills are done, another one gets those that are left.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from ending import exit_on_sigterm
from kills import Killed, Run, Work, disturb, kinds_of, planned, updates_of
from nodes import TwoNodes
from rich.console import Console
from rich.table import Table

from sppo_ray.config import Config
from sppo_ray.config_io import load_config
from sppo_ray.run_dir import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = "learner.checkpoint_every=4"  # as often as the async default publishes


@dataclass(frozen=True)
class Verdict:
    rows_lost: int
    rows_doubled: int
    rows_different: int | None  # None: async, where a batch is what was ready
    weights_differ: bool | None
    beyond_bound: int  # async: rows older than schedule.max_staleness, or of weights that were yet to come
    updates_wrong: int  # on record not once, but more often or not at all

    @property
    def ok(self) -> bool:
        return not any(vars(self).values())


def compare(config: Config, folder: Path, undisturbed: Path) -> Verdict:
    """Bit for bit; async, where a batch is what was ready: every prompt once per epoch, within the bound."""
    streams = config.schedule.mode == "async" and config.schedule.batch_order == "ready"
    lost = doubled = different = beyond = 0  # rows
    for iteration in range(1, config.schedule.iterations + 1):
        mine, other = (_train_table(where, iteration) for where in (folder, undisturbed))
        keys = Counter(_keys(mine))
        expected = _once_per_epoch(other, config.learner.epochs) if streams else Counter(_keys(other))
        lost += sum((expected - keys).values())
        doubled += sum((keys - expected).values())
        if streams:
            lag = zip(mine["consumed_version"].to_pylist(), mine["policy_version"].to_pylist(), strict=True)
            beyond += sum(not 0 <= consumed - sampled <= config.schedule.max_staleness for consumed, sampled in lag)
        elif keys == expected:
            different += sum(a != b for a, b in zip(mine.to_pylist(), other.to_pylist(), strict=True))
    last = f"iter_{config.schedule.iterations}/policy"
    updates = updates_of(folder)
    due = Counter(range(1, planned(config, undisturbed)[1] + 1)) if streams else updates_of(undisturbed)
    wrong = ((updates - due) + (due - updates)).total()
    if streams:
        return Verdict(lost, doubled, None, None, beyond, wrong)
    return Verdict(lost, doubled, different, _weights(folder / last) != _weights(undisturbed / last), beyond, wrong)


def _train_table(folder: Path, iteration: int) -> pa.Table:
    return pq.read_table(folder / f"iter_{iteration}" / "train.parquet")


def _once_per_epoch(table: pa.Table, epochs: int) -> Counter[tuple[object, ...]]:
    """Of the prompts of a slice, whatever the undisturbed run's schedule was."""
    return Counter((prompt, epoch) for prompt in set(table["prompt_id"].to_pylist()) for epoch in range(epochs))


def _keys(table: pa.Table) -> list[tuple[object, ...]]:
    names = [name for name in ("prompt_id", "epoch") if name in table.column_names]
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def _weights(folder: Path) -> list[str]:
    """Hashes; of a folder without any it is an error to ask."""
    found = [xxhash.xxh3_64_hexdigest(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]
    if not found:
        raise SystemExit(f"{folder} holds no weights")
    return found


def main() -> None:
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny_cpu.yaml")
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="1: the Ray that the run starts by itself")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument(
        "--undisturbed",
        type=Path,
        help="a finished run that ends the same, else it is made; for async any one of the same prompts in the same slices",
    )
    parser.add_argument(
        "--pause", type=float, nargs=2, default=(0.5, 5.0), help="seconds of serving before most kills that are due"
    )
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_intermixed_args()
    options.overrides.insert(0, CHECKPOINTS)
    rng = random.Random(options.seed)
    config = load_config(options.config, [*options.overrides, f"run.dir={options.out / 'undisturbed'}"])
    undisturbed = options.undisturbed or options.out / "undisturbed"
    plain_s = _seconds_of_undisturbed(options.config, undisturbed, options.overrides)
    work = Work(config, undisturbed)

    kinds = kinds_of(config, options.nodes == 2)
    # Every kind before any comes again, in a new order each time.
    due = [kind for _ in range(options.kills) for kind in rng.sample(kinds, len(kinds))][: options.kills]
    killed, verdicts, runs, seconds, empty = Killed(starts=0), list[Verdict](), list[Path](), 0.0, 0
    with TwoNodes(options.out / "nodes") if options.nodes == 2 else nullcontext() as nodes:
        while left := due[killed.kinds.total() :]:
            folder = options.out / f"disturbed-{len(verdicts)}"
            started = time.monotonic()
            run = Run(options.config, folder, options.overrides, nodes)
            done = disturb(run, left, rng, work, tuple(options.pause))
            seconds += time.monotonic() - started
            killed += done
            runs.append(folder)
            verdicts.append(compare(config, folder, undisturbed))
            empty = 0 if done.kinds else empty + 1
            if empty == 3:
                sys.exit("three runs ended before anything could be killed: make --pause shorter or the run longer")
    _show(kinds, killed, verdicts, seconds, plain_s, runs)
    sys.exit(0 if all(verdict.ok for verdict in verdicts) else 1)


def _seconds_of_undisturbed(config: Path, folder: Path, overrides: list[str]) -> float:
    """Of the run in `folder`, which is made if it is not there."""
    if read_manifest(folder).get("status") != "done":
        Run(config, folder, overrides).wait()
    began, ended = (datetime.fromisoformat(read_manifest(folder)[key]) for key in ("started", "updated"))
    return (ended - began).total_seconds()


def _show(
    kinds: Sequence[str],
    killed: Killed,
    verdicts: list[Verdict],
    seconds: float,
    plain_s: float,
    runs: list[Path],
) -> None:
    kills = sum(killed.kinds.values())
    table = Table(title=f"{kills} kills over {len(verdicts)} runs", title_justify="left")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("s until more was done", justify="right")  # where no other kill came before
    for kind in kinds:
        took = [back_s for of, back_s in killed.back_s if of == kind]
        times = (
            f"{statistics.median(took):.0f} ({min(took):.0f} to {max(took):.0f}, {len(took)} times)" if took else "-"
        )
        table.add_row(f"killed: {kind}", str(killed.kinds[kind]), times)
    for name in ("rows_lost", "rows_doubled", "rows_different", "beyond_bound", "weights_differ", "updates_wrong"):
        found = [getattr(verdict, name) for verdict in verdicts]
        table.add_row(name.replace("_", " "), "not compared" if None in found else str(sum(found)))
    table.add_row("times a run was begun", str(killed.starts))
    manifests = [read_manifest(folder) for folder in runs]
    table.add_row("updates done again, at least", str(sum(manifest["updates_repeated"] for manifest in manifests)))
    table.add_row("groups sampled again, at least", str(sum(manifest["groups_regenerated"] for manifest in manifests)))
    table.add_row("seconds", f"{seconds:.0f}")
    table.add_row("seconds lost per kill", f"{(seconds - plain_s * len(verdicts)) / kills:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
