"""The measuring scripts of async run and print what docs and README take from them; what they measure is asserted nowhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT / "scripts/bench", capture_output=True, text=True, timeout=300,
        env=os.environ | {"COLUMNS": "200"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_simulation_of_the_schedules_trains_every_group_once_in_each() -> None:
    printed = bench("schedule_sim.py", "--prompts", "256", "--workers")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.count("│") > 5]
    names = [row[0] for row in rows]
    assert {"sync-colocated", "sync-disaggregated"} <= set(names)
    assert [name for name in names if name.startswith("async")] == [f"async, staleness {n}" for n in (0, 1, 2, 4, 8)]
    assert {row[-1] for row in rows} == {"0"}  # dropped


def test_the_coordinator_carries_as_many_groups_as_it_is_asked_to() -> None:
    printed = bench("coordinator.py", "--groups", "1000")
    assert "1,000 groups of 5 responses" in printed
    assert float(re.search(r"groups/s\s*│\s*([\d,]+)", printed)[1].replace(",", "")) > 0
