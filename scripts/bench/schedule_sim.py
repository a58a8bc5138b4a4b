"""What each schedule and layout gives on 8 GPUs at the rates of a 7B policy, and on many more: the real schedules and buffer
in virtual time, between fakes that take as long as sppo_ray/simulation/rates.py says. No GPU.

    python scripts/bench/schedule_sim.py [--prompts N] [--publish-every N] [--workers 64 256 [--slices N N]] [--lengths FILE]

For each mode the best split of the GPUs is searched first. sync-colocated uses all GPUs in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sppo_ray.config import Config
from sppo_ray.config_io import build_config
from sppo_ray.simulation.layouts import Split, recommend, with_split
from sppo_ray.simulation.rates import RateCard
from sppo_ray.simulation.run import Outcome, simulate
from sppo_ray.simulation.workload import RESPONSE_TOKENS

STALENESS = (0, 1, 2, 4, 8)
RECORDED = "  reference: behavior"  # sync-colocated, with the one saving that async takes for itself


def configured(mode: str, gpus: int, options: argparse.Namespace, staleness: int = 2, **learner: Any) -> Config:
    """mode: sync-colocated, sync-disaggregated or async. Of a disaggregated one the numbers of workers are set later."""
    colocated, is_async = mode == "sync-colocated", mode == "async"
    count = gpus if colocated else 1
    weights = {"publish_every": options.publish_every, "pause": options.pause, "at_once": options.at_once}
    return build_config(
        {
            "run": {"dir": "runs/simulated"},
            "schedule": {"mode": "async" if is_async else "sync", "iterations": 1, "max_staleness": staleness},
            "data": {"prompts": "none"},
            "policy": {"model": "mistralai/Mistral-7B-Instruct-v0.2"},
            "rollout": {"num_workers": count, "max_num_seqs": options.max_num_seqs, "in_flight": options.in_flight},
            "judge": {"num_workers": count, "dtype": "float16"},
            "learner": {"num_workers": count, "micro_batch_size": options.micro_batch_size, **learner},
            "weights": weights if is_async else {},
            "buffer": {"flush_s": 5.0},
            "cluster": {"gpus": gpus, "layout": "colocated" if colocated else "disaggregated"},
        }
    )


def with_recorded_reference(config: Config) -> Config:
    """Without the reference pass, as async is by default."""
    return config.model_copy(update={"objective": config.objective.model_copy(update={"reference": "behavior"})})


def best_split(config: Config, quantiles: Sequence[float]) -> Split:
    return recommend(config, RateCard(), 8, quantiles)[0].split


def on_8_gpus(options: argparse.Namespace, quantiles: Sequence[float]) -> Table:
    apart = configured("sync-disaggregated", 8, options)
    modes = {
        "sync-colocated": configured("sync-colocated", 8, options),
        RECORDED: with_recorded_reference(configured("sync-colocated", 8, options)),
        "sync-disaggregated": with_split(apart, best_split(apart, quantiles)),
    }
    split = best_split(configured("async", 8, options), quantiles)
    for bound in STALENESS:
        modes[f"async, staleness {bound}"] = with_split(configured("async", 8, options, bound), split)
    found = {name: simulate(config, [options.prompts], quantiles=quantiles) for name, config in modes.items()}
    title = f"8 GPUs, 7B, {options.prompts:,} prompts, publish_every {options.publish_every}, pause {options.pause}"
    return compared(title, modes, found)


def with_workers(rollouts: int, options: argparse.Namespace, quantiles: Sequence[float]) -> Table:
    """As many 8-GPU nodes as hold so many rollout workers in the best split of one. The batch grows with them, and so do the
    slices unless they are given."""
    split = best_split(configured("async", 8, options), quantiles)
    nodes = max(1, rollouts // split[0])
    slices = options.slices or [options.prompts * nodes]
    batch = {"batch_size": 64 * nodes}

    def scaled(mode: str, of_one: Split, staleness: int = 0) -> Config:
        r, l, j = of_one  # noqa: E741
        return with_split(configured(mode, 8 * nodes, options, staleness, **batch), (r * nodes, l * nodes, j * nodes))

    in_turns = best_split(configured("sync-disaggregated", 8, options), quantiles)
    modes = {
        "sync-colocated": configured("sync-colocated", 8 * nodes, options, **batch),
        "sync-disaggregated": scaled("sync-disaggregated", in_turns),
    }
    for bound in options.staleness:
        modes[f"async, staleness {bound}"] = scaled("async", split, bound)
    found = {name: simulate(config, slices, quantiles=quantiles) for name, config in modes.items()}
    prompts = " + ".join(f"{count:,}" for count in slices)
    title = f"{split[0] * nodes} rollout workers, {8 * nodes} GPUs, batch {64 * nodes:,}, {prompts} prompts, "
    return compared(f"{title}publish_every {options.publish_every}", modes, found)


def compared(title: str, modes: dict[str, Config], found: dict[str, Outcome]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("schedule")
    for name in ("rollout+learner+judge", "hours", "groups/s", "over disagg.", "over coloc.", "idle: rollout", "judge"):
        table.add_column(name, justify="right")
    table.add_column("learner", justify="right")
    table.add_column("groups by staleness")
    table.add_column("re-sampled", justify="right")
    table.add_column("dropped", justify="right")
    apart, together = found["sync-disaggregated"], found["sync-colocated"]
    for name, outcome in found.items():
        config = modes[name]
        roles = (config.rollout.num_workers, config.learner.num_workers, config.judge.num_workers)
        table.add_row(
            name,
            "all in turns" if config.cluster.layout == "colocated" else "+".join(map(str, roles)),
            f"{outcome.seconds / 3600:.2f}",
            f"{outcome.groups_per_s:.2f}",
            f"{apart.seconds / outcome.seconds:.2f}",
            f"{together.seconds / outcome.seconds:.2f}",
            *(f"{role['idle']:.1%}" for role in (outcome.rollout, outcome.judge, outcome.learner)),
            "  ".join(f"{lag}: {groups / outcome.groups:.0%}" for lag, groups in outcome.staleness.items()),
            f"{outcome.resampled:,}",
            "0" if outcome.trained_once else "SOME",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8_000, help="prompts of the iteration simulated on 8 GPUs")
    parser.add_argument("--publish-every", type=int, default=16, help="updates between publishes")
    parser.add_argument("--pause", choices=("finish", "keep", "abort"), default="finish")
    parser.add_argument("--at-once", type=float, default=0.34)
    parser.add_argument("--in-flight", type=int, default=128, help="groups per rollout worker")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[64, 256], help="rollout workers of larger clusters")
    parser.add_argument("--slices", type=int, nargs="+", help="prompts of each iteration there; else --prompts a node")
    parser.add_argument("--staleness", type=int, nargs="+", default=[2], help="bounds of async there")
    parser.add_argument("--only-workers", action="store_true", help="leave the 8 GPUs out")
    parser.add_argument(
        "--lengths", type=Path, help="response lengths in tokens, one a line, instead of the built-in ones"
    )
    options = parser.parse_args()
    quantiles: Sequence[float] = RESPONSE_TOKENS
    if options.lengths:
        quantiles = np.quantile(np.loadtxt(options.lengths), np.linspace(0, 1, 101)).tolist()
    console = Console(width=190)
    if not options.only_workers:
        console.print(on_8_gpus(options, quantiles))
    for rollouts in options.workers:
        console.print(with_workers(rollouts, options, quantiles))


if __name__ == "__main__":
    main()
