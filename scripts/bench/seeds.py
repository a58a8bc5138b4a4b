"""Does the tiny default learn, iteration after iteration, whatever the seed? Runs it per seed and prints the held-out figures.

    python scripts/bench/seeds.py --seeds 1 2 3 4 5 --out runs/seeds [key=value ...]

Finished runs are taken as they are, so the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sppo_ray.metrics import read_metrics
from sppo_ray.summary import evaluations

ROOT = Path(__file__).resolve().parents[2]
FIGURES = (
    "judge_win_vs_base_sampled",
    "oracle_win_vs_base_sampled",
    "judge_win_vs_base_greedy",
    "oracle_win_vs_base_greedy",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--config", default=str(ROOT / "configs/tiny_cpu.yaml"))
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    for seed in options.seeds:
        print(f"seed {seed}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "sppo_ray", "train", "--config", options.config]
        subprocess.run(
            [*command, f"run.dir={options.out / str(seed)}", f"run.seed={seed}", *options.overrides],
            check=True, stdout=sys.stderr, cwd=Path.cwd(),
        )  # fmt: skip
    Console(width=120).print(table({seed: figures(options.out / str(seed)) for seed in options.seeds}))


def figures(run_dir: Path) -> dict[str, list[float]]:
    """Each figure over the iterations; the base beats itself half the time."""
    lines = evaluations(read_metrics(run_dir / "metrics.jsonl"))
    return {name: [0.5, *(line[name] for line in lines if line["iteration"])] for name in FIGURES}


def rises(values: list[float]) -> bool:
    """Every iteration above the one before; a perfect score may stay."""
    return all(after > before or after == 1.0 for before, after in pairwise(values))


def table(runs: dict[int, dict[str, list[float]]]) -> Table:
    made = Table(title="Held-out win rate over the base, by iteration")
    made.add_column("seed", justify="right")
    for name in FIGURES:
        made.add_column(name.replace("_win_vs_base_", ", "))
    made.add_column("sampled rise in every iteration")
    for seed, found in runs.items():
        cells: list[Any] = ["  ".join(f"{value:.3f}" for value in found[name][1:]) for name in FIGURES]
        made.add_row(str(seed), *cells, "yes" if all(rises(found[name]) for name in FIGURES[:2]) else "no")
    return made


if __name__ == "__main__":
    main()
