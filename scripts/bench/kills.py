"""A run in a process of its own, and what chaos.py does to it."""

from __future__ import annotations

import contextlib
import random
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from ending import end_with_parent
from nodes import TwoNodes, family

from sppo_ray.attempts import Progress, progress_of
from sppo_ray.config import Config
from sppo_ray.ledger import Ledger
from sppo_ray.metrics import read_metrics
from sppo_ray.step_plan import StepPlan

ROOT = Path(__file__).resolve().parents[2]
# By the title that Ray gives a worker process: the class, then the method that runs; before it, while it starts, its name.
CLASSES = {
    "rollout": "RolloutWorker",
    "judge": "JudgeWorker",
    "buffer": "BufferActor",
    "weights": "WeightsHub",
    "learner": "RayTrainWorker",
    "controller": "LearnerActor|TrainController",
}
ENGINE = "VLLM::EngineCore"  # vLLM's own title, where the engine has a process of its own
WHOLE = ("node", "power")  # kinds of which everything is killed, not one of several
LAST_KILL = 0.95  # of the work; later ones would often meet the end of the run
AT_ONCE = 0.25  # of the kills that may come whatever the run is at; others wait until it does something again
LIMIT_S = 900  # for a run to have a victim of the kind that is due, and to end after the last kill


def kinds_of(config: Config, two_nodes: bool) -> tuple[str, ...]:
    """What there is to kill in a run of this config."""
    engine = ("engine",) if config.engine_apart else ()
    return (*CLASSES, *engine, *(("node",) if two_nodes else ()), "driver", "power")


@dataclass
class Killed:
    """What was done to a run."""

    kinds: Counter[str] = field(default_factory=Counter)
    starts: int = 1
    back_s: list[tuple[str, float]] = field(default_factory=list)  # by kind: until the run had got something done again

    def __iadd__(self, other: Killed) -> Killed:
        self.kinds += other.kinds
        self.starts += other.starts
        self.back_s += other.back_s
        return self


class Work:
    """How much of a run is on record, as a share of all of it; groups and updates are half of it each."""

    def __init__(self, config: Config, undisturbed: Path) -> None:
        self._config = config
        self._groups, self._updates = planned(config, undisturbed)

    def done(self, folder: Path) -> float:
        """In [0, 1]; beyond while groups sampled again are on disk twice."""
        groups, updates = self._counts(folder)
        return (groups / self._groups + updates / self._updates) / 2

    def _counts(self, folder: Path) -> tuple[int, int]:
        ledger = Ledger(
            self._config.model_copy(update={"run": self._config.run.model_copy(update={"dir": str(folder)})})
        )
        groups = sum(ledger.groups(t) for t in range(1, self._config.schedule.iterations + 1))
        return groups, updates_of(folder).total()


def planned(config: Config, undisturbed: Path) -> tuple[int, int]:
    """Groups and updates of a whole run on the prompts of the one in `undisturbed`: as many as that one made or, in async by
    the order of readiness, by the plan, whatever that one's schedule and epochs."""
    tables = (undisturbed / f"iter_{t}/train.parquet" for t in range(1, config.schedule.iterations + 1))
    sizes = [len(set(pq.read_table(table, columns=["prompt_id"])["prompt_id"].to_pylist())) for table in tables]
    if config.schedule.mode == "async" and config.schedule.batch_order == "ready":
        return sum(sizes) * config.learner.epochs, StepPlan(config, sizes).end_step(len(sizes))
    return sum(sizes), updates_of(undisturbed).total()


def updates_of(folder: Path) -> Counter[int]:
    """How often each is on record."""
    return Counter(line["step"] for line in read_metrics(folder / "metrics.jsonl") if "step" in line)


class Stopwatch:
    """How long after a kill a run has more on record than before it. A kill that comes before that stops the watch."""

    def __init__(self, folder: Path, done: Killed) -> None:
        self._folder, self._done = folder, done
        self._killed: tuple[str, float, Progress] | None = None  # kind, when, what was on record
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Stopwatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def start(self, kind: str) -> None:
        self._killed = kind, time.monotonic(), progress_of(self._folder)

    def stop(self) -> None:
        self._killed = None

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            if (killed := self._killed) and progress_of(self._folder) != killed[2]:
                self._done.back_s.append((killed[0], time.monotonic() - killed[1]))
                self._killed = None


class Run:
    """`sppo train` in a process of its own, begun again when it was killed. nodes: the Ray that it joins, else it starts one."""

    def __init__(self, config: Path, folder: Path, overrides: list[str], nodes: TwoNodes | None = None) -> None:
        self.folder, self.log, self.nodes = folder, folder.with_suffix(".log"), nodes
        self._earlier: set[psutil.Process] = set()  # of a driver that was killed: its actors end soon
        folder.parent.mkdir(parents=True, exist_ok=True)
        joins = [f"cluster.address={nodes.address}"] if nodes else []
        self._command = ["--config", str(config), f"run.dir={folder}", *overrides, *joins]
        self.start(resume=False)

    def start(self, resume: bool) -> None:
        arguments = ["--resume", f"run.dir={self.folder}"] if resume else self._command
        self._earlier = set(self.nodes.processes) if self.nodes else set()
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                [sys.executable, "-m", "sppo_ray", "train", *arguments], cwd=ROOT, stdout=log, stderr=log,
                env=self.nodes.env if self.nodes else None, preexec_fn=end_with_parent,
            )  # fmt: skip

    @property
    def over(self) -> bool:
        return self.process.poll() is not None

    def victims(self, kind: str, started: bool = False) -> list[psutil.Process]:
        """started: only those that have left their constructor. None once the run is over, or before it has begun to start."""
        own, nodes = family(self.process), self.nodes.processes if self.nodes else []
        titles = {process: _title(process) for process in {*own, *nodes} - self._earlier}
        actors = {process for process, title in titles.items() if any(is_title(title, each) for each in CLASSES)}
        if self.over or not actors:
            return []
        if kind == "power":
            return [*own, *nodes]
        if kind == "driver":
            return own[:1]
        if kind == "node":  # with some of the run's actors on it
            assert self.nodes is not None
            return self.nodes.second if actors & set(self.nodes.second) else []
        return [process for process, title in titles.items() if is_title(title, kind, started)]

    def wait(self) -> None:
        """Raises SystemExit with the run's output if it failed, or has got nothing done for LIMIT_S."""
        before, end = None, time.monotonic() + LIMIT_S
        while not self.over and time.monotonic() < end:
            if (now := progress_of(self.folder)) != before:
                before, end = now, time.monotonic() + LIMIT_S
            time.sleep(0.2)
        failed = self.process.poll() != 0
        if not self.over:
            self.process.kill()
        if failed:
            sys.exit(f"the run failed or hangs; the end of {self.log}:\n{self.log.read_text()[-4000:]}")


def is_title(title: str, kind: str, started: bool = False) -> bool:
    """Whether a process of that title is of that kind; started: and has left its constructor (an engine's title never tells)."""
    if kind == "engine":
        return title.startswith(ENGINE)
    name = "" if started else r"(?:[\w-]+:)?"
    return bool(re.match(rf"ray::{name}(?:{CLASSES[kind]})\b", title))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def disturb(run: Run, kinds: list[str], rng: random.Random, work: Work, pause: tuple[float, float]) -> Killed:
    """Kill one process of each of `kinds` in turn, at random points of the work, so that sampling, training, publishing,
    evaluating and starting all meet them. Ends with the run."""
    done, at_once = Killed(), False
    due = sorted(rng.uniform(0, LAST_KILL) for _ in kinds)
    with Stopwatch(run.folder, done) as watch:
        for kind, share in zip(kinds, due, strict=True):
            at_once = not at_once and rng.random() < AT_ONCE  # never twice in a row: nothing done at all ends a run
            if not _has_done(run, work, share) or not (at_once or _serving_for(run, rng.uniform(*pause))):
                break
            watch.stop()
            if not strike(run, kind, rng):
                break
            watch.start(kind)
            done.kinds[kind] += 1
            print(f"killed {kind}", file=sys.stderr, flush=True)
            if run.nodes and kind == "node":
                run.nodes.add_node()
            if kind in ("driver", "power"):
                run.process.wait()
                if run.nodes and kind == "power":
                    run.nodes.start()
                run.start(resume=True)
                watch.start(kind)  # once more: the command is the user's
                done.starts += 1
        run.wait()
    return done


def strike(run: Run, kind: str, rng: random.Random) -> bool:
    """Kill one process of the kind, or all there are. False: the run is over."""
    while victims := _await_victims(run, kind):
        chosen = _held(run, kind) if kind in WHOLE else [rng.choice(victims)]
        if sum(_kill(victim) for victim in chosen):  # none: it ended by itself meanwhile
            return True
    return False


def _held(run: Run, kind: str) -> set[psutil.Process]:
    """All of the kind, stopped: what one of them starts in this moment is among them."""
    held: set[psutil.Process] = set()
    while more := set(run.victims(kind)) - held:
        for process in more:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        held |= more
    return held


def _has_done(run: Run, work: Work, share: float) -> bool:
    """Waits for that share of the work. False: the run is over, or nothing was done for LIMIT_S."""
    done, end = -1.0, time.monotonic() + LIMIT_S
    while done < share and not run.over and time.monotonic() < end:
        time.sleep(0.2)
        with contextlib.suppress(OSError):  # a shard that is removed since its slice was sealed just now
            before, done = done, work.done(run.folder)
            if done != before:
                end = time.monotonic() + LIMIT_S
    return done >= share


def _serving_for(run: Run, seconds: float) -> bool:
    """Waits until judges have been up for so long: the run has begun again to do something. False: the run is over."""
    began: float | None = None
    end = time.monotonic() + LIMIT_S
    while began is None or time.monotonic() - began < seconds:
        if run.over or time.monotonic() > end:
            return False
        if not run.victims("judge", started=True):
            began = None
        elif began is None:
            began = time.monotonic()
        time.sleep(0.1)
    return True


def _await_victims(run: Run, kind: str) -> list[psutil.Process]:
    end = time.monotonic() + LIMIT_S
    while not (victims := run.victims(kind)):
        if run.over or time.monotonic() > end:
            return []
        time.sleep(0.05)
    return victims


def _kill(process: psutil.Process) -> bool:
    """Whether it was there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True
