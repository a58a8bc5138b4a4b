"""Does a long run stay as small as it began? An hour of async self-play on the tiny models; memory, open files, threads of
every process and the object store, read at 5, 30 and 60 minutes.

    python scripts/bench/soak.py --minutes 5 30 60 --out runs/soak

Exit code 1 if something has grown by more than --slack since the first reading, if a process is not the one it was (one that died
of its leak would come back small), or if the run ends by itself. Two things grow and are no leak:

- Threads of gRPC's two pools are counted apart. Ray's processes have them, and they get their next thread whenever more comes at
  once than ever before, however late that is; so long as there are at most MOST_POOL_THREADS.
- What the object store has touched is the most it ever needed, gaps included: TOUCHED_MIB more are allowed. What it keeps is held
  to --slack: the least that was in use in three minutes, for what leaks stays, while a batch of groups comes and goes, and so does
  the second version of the weights during each publishing. (Ray counts every 10 s: how many of those it meets is chance.)

Ray gives raylet jemalloc, which keeps gaps for each of its threads: with them it is at 16 to 18 MiB after 5 minutes and at up to
19.5 after an hour, in steps, while what it holds stays at 6.0 (jemalloc's own count). Here it keeps none: LEAN.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import statistics
import sys
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import psutil
from ending import exit_on_sigterm
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
# Many short iterations of several passes each: everything that happens in a run, evaluations and saving too, happens often. The
# policy hardly moves, so that its answers stay as long as they are: longer ones need more memory, and are no leak.
LONG = ("schedule.iterations=96", "learner.epochs=48", "learner.checkpoint_every=8", "learner.learning_rate=1e-9")
NAMED = {
    "RolloutWorker": "rollout",
    "JudgeWorker": "judge",
    "BufferActor": "buffer",
    "WeightsHub": "weights",
    "RayTrainWorker": "learner rank",
    "LearnerActor": "learner",
    "TrainController": "train controller",
}
KEPT, TOUCHED = "object store, kept", "object store, touched"
READINGS = 60  # 3 s apart
POOLS = ("default-executo", "event_engine")  # as Linux cuts their names
# Twice what was seen in an hour on two cores, and gRPC's own bound.
MOST_POOL_THREADS = max(16, 4 * (os.cpu_count() or 1))
TOUCHED_MIB = 2
LEAN = {
    "RAY_JEMALLOC_PROFILE": "raylet",  # Ray's name for whom the next one is for
    "RAY_JEMALLOC_CONF": "narenas:1,tcache:false,background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0",
}


class Figures(NamedTuple):
    """Of one process."""

    mib: float  # its own
    files: int
    threads: int  # but those of gRPC's pools
    pools: int
    pid: int


Reading = dict[str, Figures]  # by process


def main() -> None:
    exit_on_sigterm()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 30, 60])
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--slack", type=float, default=0.03)
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny_cpu_async.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value")
    options = parser.parse_intermixed_args()  # overrides may follow --minutes
    command = ["--config", str(options.config), f"run.dir={options.out}", *LONG, *options.overrides]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.with_suffix(".log").open("wb") as log:
        train = [sys.executable, "-m", "sppo_ray", "train", *command]
        run = psutil.Popen(train, cwd=ROOT, env=os.environ | LEAN, stdout=log, stderr=log)
        try:
            readings = _follow(run, sorted(options.minutes))
        finally:
            _end(run)
    _show(readings)
    grown = _grown(readings, options.slack)
    for line in grown:
        print(line, file=sys.stderr)
    sys.exit(1 if grown else 0)


def _end(run: psutil.Popen) -> None:
    """With all that is under it, if it does not end in order."""
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [run, *run.children(recursive=True)]
        run.terminate()
        for process in psutil.wait_procs(processes, timeout=120)[1]:
            process.kill()


def _follow(run: psutil.Popen, minutes: list[float]) -> dict[float, Reading]:
    began, readings = time.monotonic(), {}
    for mark in minutes:
        while time.monotonic() - began < 60 * mark:
            _refuse_ended(run, mark)
            time.sleep(1)
        found = read(run)
        _refuse_ended(run, mark)  # what was read of a run that ended meanwhile says nothing
        readings[mark] = _summaries(found)
    return readings


def _refuse_ended(run: psutil.Popen, mark: float) -> None:
    if run.poll() is not None:
        sys.exit(f"the run ended (exit code {run.returncode}) before the reading at {mark:g} minutes was done")


def read(run: psutil.Process) -> dict[str, list[Figures]]:
    """Of the driver and all processes under it, through three minutes, which are more than an iteration: work comes in waves."""
    found: dict[str, list[Figures]] = {}
    for _ in range(READINGS):
        for process in (run, *run.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess, FileNotFoundError):
                if (name := _name(process, run)) is None:
                    continue
                found.setdefault(name, []).append(_figures(process))
                if name == "raylet":
                    found.setdefault(TOUCHED, []).append(Figures(_store_touched(process), 0, 0, 0, 0))
                    with contextlib.suppress(OSError):  # on a busy machine the node may not answer in time
                        found.setdefault(KEPT, []).append(Figures(_store_in_use(process), 0, 0, 0, 0))
        time.sleep(3)
    return found


def _summaries(found: dict[str, list[Figures]]) -> Reading:
    if (times := len(found.get(KEPT, []))) < READINGS / 2:
        sys.exit(f"the node told what is in its object store {times} times of {READINGS}: too seldom")
    return {name: _summary(name, each) for name, each in found.items()}


def _summary(name: str, each: list[Figures]) -> Figures:
    """The median; of what is in the object store the least."""
    if name == KEPT:
        return min(each)
    return Figures(*map(statistics.median_high, zip(*each, strict=True)))


def _name(process: psutil.Process, run: psutil.Process) -> str | None:
    """None: a process that comes and goes, such as an idle worker."""
    if process.pid == run.pid:
        return "driver"
    title = " ".join(process.cmdline())
    if found := re.match(r"(?:ray::|ray-dashboard-|VLLM::)(\w+)", title):
        return None if found[1].startswith("IDLE") else NAMED.get(found[1], found[1])
    if process.name() in ("gcs_server", "raylet"):
        return process.name()
    scripts = [Path(part).name for part in process.cmdline() if part.endswith(".py")]
    return scripts[0] if scripts and scripts[0] in ("dashboard.py", "monitor.py", "log_monitor.py") else None


def _figures(process: psutil.Process) -> Figures:
    memory, names = process.memory_info(), []
    for thread in Path(f"/proc/{process.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append((thread / "comm").read_text().strip())
    pools = sum(name in POOLS for name in names)
    return Figures((memory.rss - memory.shared) / 2**20, process.num_fds(), len(names) - pools, pools, process.pid)


def _store_in_use(raylet: psutil.Process) -> float:
    """MiB of objects in memory, as the node's metrics have it."""
    session = next(part.partition("=")[2] for part in raylet.cmdline() if part.startswith("--session_dir="))
    (port,) = Path(session).glob("metrics_export_port_*")
    with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text()}/metrics", timeout=30) as page:
        families = text_string_to_metric_families(page.read().decode())
    samples = [sample for family in families if family.name == "ray_object_store_memory" for sample in family.samples]
    return sum(_in_memory(samples)) / 2**20


def _in_memory(samples: list[Sample]) -> list[float]:
    """Bytes by state. An object in a worker's own heap is of that worker's memory."""
    if not (found := [sample.value for sample in samples if sample.labels["Location"].startswith("MMAP")]):
        sys.exit("the node's metrics do not say what is in the object store: this Ray has other names for it")
    return found


def _store_touched(raylet: psutil.Process) -> float:
    """MiB of the object store's memory that were ever written to, and not given back."""
    blocks = 0
    for link in Path(f"/proc/{raylet.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "plasma" in str(link.readlink()):
                blocks += link.stat().st_blocks
    if not blocks:
        sys.exit(f"{raylet} has no open file of the object store, or one that nothing was written to")
    return blocks * 512 / 2**20


def _grown(readings: dict[float, Reading], slack: float) -> list[str]:
    first, found = readings[min(readings)], []
    for mark, reading in readings.items():
        found += [f"{name}: was not there at every reading" for name in first.keys() ^ reading.keys()]
        for name in sorted(first.keys() & reading.keys()):
            (*before, _, pid), (*after, pools, other) = first[name], reading[name]
            if pid != other:
                found.append(f"{name}: is another process at {mark:g} minutes")
            if pools > MOST_POOL_THREADS:
                found.append(f"{name}: gRPC's pools have {pools} threads at {mark:g} minutes")
            found += [
                f"{name}: {what} grew from {a:g} to {b:g} at {mark:g} minutes"
                for what, a, b in zip(("MiB", "open files", "threads"), before, after, strict=True)
                if b > a * (1 + slack) + (TOUCHED_MIB if name == TOUCHED else 0)
            ]
    return found


def _show(readings: dict[float, Reading]) -> None:
    table = Table(title="MiB of its own, open files, threads, threads of gRPC's pools", title_justify="left")
    table.add_column("process")
    for mark in readings:
        table.add_column(f"{mark:g} min", justify="right")
    for name in sorted(set().union(*readings.values())):
        cells = (reading.get(name) for reading in readings.values())
        table.add_row(name, *("-" if c is None else f"{c[0]:.1f}  {c[1]:>3}  {c[2]:>3}  {c[3]:>2}" for c in cells))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
