"""How the job tests run `sppo`, and a Ray head to which they submit it."""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sppo_ray.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SMALL = (
    "data.limit=48", "schedule.iterations=2", "learner.batch_size=8", "learner.epochs=1",
    "evaluation.limit=6", "rollout.in_flight=8",
)  # fmt: skip
PROMPTS = 24  # an iteration
RUNTIME_ENV = (
    "--runtime-env",
    str(ROOT / "configs/ray/runtime_env.yaml"),
)  # a stopped job then has time to end its run
LIMIT_S = 900  # for a run, which takes a minute or two, or for what is to happen in one: only what hangs meets it

# With one group in flight, and each on disk before the next begins, an iteration's prompts take seconds to sample: time
# enough to stop a run in the middle. Both keys may change when it goes on.
SLOW = ("rollout.in_flight=1", "buffer.flush_s=0.25")


# Secrets of a user's environment; a run may write them nowhere.
PLANTED = {
    "HF_TOKEN": "hf_plantedPlantedPlanted0",
    "WANDB_API_KEY": "planted5d2f6a7b8c9d0e1f",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED00000000",
    "AWS_SECRET_ACCESS_KEY": "planted/Secret+Access=Key00",
    "OTHER_SERVICE_PASSWORD": "planted-pass-word",
}


def sppo(*arguments: str, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "sppo_ray", *arguments], env=os.environ | environ,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=_heed_ctrl_c,
    )  # fmt: skip


def _heed_ctrl_c() -> None:
    """A shell starts `pytest &` with SIGINT ignored, and children inherit that: Ctrl-C would go unheard."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def train(run_dir: Path, config: str = "tiny_cpu") -> tuple[str, ...]:
    """Arguments of a shipped default, made small."""
    return ("train", "--config", f"configs/{config}.yaml", f"run.dir={run_dir}", *SMALL)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> int:
    """Updates on record, also while the run goes on: a line may be there by half."""
    return sum("step" in line for line in read_metrics(run_dir / "metrics.jsonl"))


def metric_names(run_dir: Path) -> set[tuple[str, str]]:
    """(event, name) of all that is in metrics.jsonl; the event of an update is "step"."""
    found = set()
    for line in metrics(run_dir):
        event = line.pop("event", "step")
        inner = [line.get("mismatch", {}), *(line["workers"].values() if event == "publish" else ())]
        found |= {(event, name) for names in (line, *inner) for name in names}
    return found


def explained_metrics() -> dict[tuple[str, str], str]:
    """(event, name) of all that docs/metrics.md explains, and the pattern that such names have."""
    metrics_part, _ = (ROOT / "docs/metrics.md").read_text().split("## Counts in manifest.json")
    _, *sections = re.split(r"^## ", metrics_part, flags=re.MULTILINE)
    found = {}
    for section in sections:
        event = re.search(r"event: (\w+)", section)
        for name in re.findall(r"`([a-z_<>*]+)`", section):
            pattern = name.replace("*", "(greedy|sampled)").replace("<s>", r"\d+")
            found[event[1] if event else "step", name] = pattern
    return found


def unexplained(run_dir: Path) -> set[tuple[str, str]]:
    """What of a run's metrics docs/metrics.md does not explain."""
    explained = explained_metrics().items()
    return {
        (event, name)
        for event, name in metric_names(run_dir)
        if not any(of == event and re.fullmatch(pattern, name) for (of, _), pattern in explained)
    }


def manifest(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "manifest.json").read_text())


def shards(run_dir: Path, iteration: int) -> int:
    """Shards of judged groups on disk, while the iteration is being sampled."""
    return len(list((run_dir / f"iter_{iteration}/ledger").glob("shard-*.parquet")))


def wait_for(
    condition: Callable[[], object], timeout: float = LIMIT_S, found: Callable[[], object] = lambda: ""
) -> None:
    """found: what the failure is to tell beside the condition."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"not in {timeout:g} s: {inspect.getsource(condition).strip()} {found()}"
        time.sleep(0.1)


@dataclass(frozen=True)
class Head:
    """A Ray head as the README starts one."""

    address: str
    env: dict[str, str]  # with the token
    pid: int

    def job(self, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`ray job <command>`"""
        return subprocess.run(
            [str(BIN / "ray"), "job", command, "--address", self.address, *arguments],
            env=self.env, cwd="/", capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip

    def submit(self, *arguments: str, options: tuple[str, ...] = RUNTIME_ENV) -> subprocess.CompletedProcess[str]:
        """`arguments`: as after `sppo train`."""
        entry_point = ("python", "scripts/train.py", *arguments)
        return self.job("submit", "--working-dir", str(ROOT), *options, "--", *entry_point)

    def actors(self) -> list[dict[str, Any]]:
        """What the dashboard lists, dead actors included."""
        token = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(
            f"{self.address}/api/v0/actors?detail=1", headers={"Authorization": f"Bearer {token}"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["data"]["result"]["result"]

    def alive(self) -> set[str]:
        """Classes of the actors that live, apart from those that Ray keeps for itself: for jobs, and for who shares the cluster."""
        living = (actor for actor in self.actors() if actor["state"] == "ALIVE")
        kept = ("_ray_internal", "AutoscalingCoordinator")
        return {actor["class_name"] for actor in living if not actor["name"].startswith(kept)}


def head_of(page: str) -> tuple[dict[str, str], list[str]]:
    """How a page of the documentation starts a head on one machine: the variables it exports, and its command."""
    text = (ROOT / page).read_text()
    exports = re.findall(r"^export ([^#\n]+)", text, re.MULTILINE)
    variables = dict(pair.split("=", 1) for line in exports for pair in line.split())
    (command,) = re.findall(r"^ray start --head .*$", text, re.MULTILINE)
    return variables, shlex.split(command)


def titled(title: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those of them whose command line, which Ray and vLLM overwrite with a title, holds `title`."""
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def listening(processes: list[psutil.Process]) -> set[tuple[str, str]]:
    """(name of the process, address) of all on which they take connections."""
    found = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # an idle worker that ended meanwhile
            name, connections = process.name(), process.net_connections(kind="inet")
            ips = {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}
            found |= {(name, ip.removeprefix("::ffff:")) for ip in ips}  # an IPv4 address on an IPv6 socket
    return found


@contextmanager
def ray_head(folder: Path) -> Iterator[Head]:
    """A head as the README starts one, but on free ports and with a token of its own, in `folder`; its sockets, whose paths must be
    short, are elsewhere."""
    port, dashboard, agent = free_port(), free_port(), free_port()
    token = folder / "token"
    token.write_text("a-token-for-this-test-of-thirty-two-characters")
    token.chmod(0o600)
    variables, start = head_of("README.md")
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= variables | {"RAY_AUTH_TOKEN_PATH": str(token)}
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"  # as in an activated environment
    command = [
        str(BIN / "ray"), *start[1:], "--block", "--num-cpus=2", f"--port={port}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}",  # it takes the jobs; at its default port it may be another Ray's
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as sockets:
        process = subprocess.Popen(
            [*command, f"--temp-dir={sockets}"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # The dashboard refuses a job if the agent, which may be later, is not there in 10 s.
            wait_for(lambda: answers(dashboard) and answers(agent), timeout=180)
            yield Head(f"http://127.0.0.1:{dashboard}", env, process.pid)
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.terminate()
            for left in psutil.wait_procs(family, timeout=10)[1]:
                left.kill()


def free_port() -> int:
    """Not one of those that the system, or Ray, deals out: nobody else is given it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
