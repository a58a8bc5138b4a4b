"""Does async self-play learn as much as the synchronous schedule from as many trained pairs? Runs the tiny default per seed in
sync and in async at several staleness bounds, and prints the final held-out win rates side by side.

    python scripts/bench/async_learns.py --seeds 1 2 3 4 5 --staleness 1 4 --out runs/async_learns

Finished runs are taken as they are, so the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from sppo_ray.metrics import read_metrics
from sppo_ray.run_dir import read_manifest
from sppo_ray.summary import evaluations

ROOT = Path(__file__).resolve().parents[2]
SLACK = 0.03  # by which async may end below sync
FIGURES = (
    "judge_win_vs_base_sampled",
    "oracle_win_vs_base_sampled",
    "judge_win_vs_base_greedy",
    "oracle_win_vs_base_greedy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--staleness", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/async_learns"))
    parser.add_argument("--finished", action="store_true", help="run nothing; show the runs that are there")
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    options = parser.parse_args()
    variants = {"sync": ("tiny_cpu.yaml", [])}
    for bound in options.staleness:
        # As many groups in flight as the bound lets out: with fewer the learner waits for groups and they are hardly stale.
        values = [f"schedule.max_staleness={bound}", f"rollout.in_flight={256 * bound}"]
        variants[f"async, staleness {bound}"] = ("tiny_cpu_async.yaml", values)
    folders = {}
    for seed in options.seeds:
        for name, (config, values) in variants.items():
            folders[seed, name] = options.out / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
            if not options.finished:
                train(ROOT / "configs" / config, folders[seed, name], [f"run.seed={seed}", *values, *options.overrides])
    folders = {key: folder for key, folder in folders.items() if read_manifest(folder).get("status") == "done"}
    Console(width=130).print(table(folders, options.seeds, list(variants)))


def train(config: Path, run_dir: Path, overrides: list[str]) -> None:
    if read_manifest(run_dir).get("status") != "done":
        print(run_dir, file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "sppo_ray", "train", "--config", str(config), f"run.dir={run_dir}", *overrides]
        subprocess.run(command, check=True, stdout=sys.stderr)


def final(run_dir: Path) -> list[float]:
    """FIGURES of the last iteration's policy."""
    last = evaluations(read_metrics(run_dir / "metrics.jsonl"))[-1]
    return [last[name] for name in FIGURES]


def trained(run_dir: Path) -> str:
    """Pairs trained on, updates, mean and largest staleness over the updates."""
    steps = [line for line in read_metrics(run_dir / "metrics.jsonl") if "step" in line]
    pairs = sum(line["examples"] for line in steps)
    mean = sum(line.get("staleness_mean", 0.0) for line in steps) / len(steps)
    most = max(line.get("staleness_max", 0) for line in steps)
    sampled = sum(pq.read_metadata(path).num_rows for path in run_dir.glob("iter_*/generated.parquet"))
    return f"{pairs} / {sampled} / {len(steps)}, staleness {mean:.2f}, at most {most}"


def holds(ours: list[float], sync: list[float]) -> str:
    """Of the sampled answers, by judge and oracle."""
    return "yes" if all(a >= b - SLACK for a, b in zip(ours[:2], sync[:2], strict=True)) else "no"


def table(folders: dict[tuple[int, str], Path], seeds: list[int], variants: list[str]) -> Table:
    made = Table(title="Held-out win rate over the base after the last iteration")
    for heading in ("seed", "schedule", "judge sampled", "oracle sampled", "judge greedy", "oracle greedy"):
        made.add_column(heading)
    made.add_column("pairs trained / groups sampled / updates")
    made.add_column(f"judge and oracle sampled\n>= sync - {SLACK}")
    for seed in seeds:
        sync = final(folders[seed, "sync"]) if (seed, "sync") in folders else None
        for name in variants:
            if (seed, name) not in folders:
                continue
            ours = final(folders[seed, name])
            verdict = "" if name == "sync" or sync is None else holds(ours, sync)
            cells = [f"{value:.3f}" for value in ours]
            made.add_row(
                str(seed), name, *cells, trained(folders[seed, name]), verdict, end_section=name == variants[-1]
            )
    return made


if __name__ == "__main__":
    main()
