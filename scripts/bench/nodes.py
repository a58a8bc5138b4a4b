"""A Ray of two nodes on this machine for chaos.py: the run's driver is on the first; the second may be killed, and is replaced."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import sys
import tempfile
import time
from pathlib import Path

import psutil
from ending import end_with_parent

START_LIMIT_S = 180
UP = "Ray runtime started"  # what `ray start` prints
CPUS = 4  # of each node: all workers of a small run fit on one


class TwoNodes:
    """As configs/ray/README.md starts a head, with a token of its own; a node beside it."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs.resolve()
        self._ray_dir = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # paths must be short
        self._port, self._dashboard, self._agent = _free_ports(3)
        self.address = f"127.0.0.1:{self._port}"
        self.env = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # both keep to loopback
            "GLOO_SOCKET_IFNAME": "lo",
            "RAY_scheduler_spread_threshold": "0",  # workers on both; by default a node is filled by half first
            "RAY_prestart_worker_first_driver": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._head: psutil.Popen | None = None
        self._node: psutil.Popen | None = None

    def __enter__(self) -> TwoNodes:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Also again, when all was killed."""
        head = ["ray", "start", "--block", "--head", "--node-ip-address=127.0.0.1", f"--num-cpus={CPUS}"]
        head += [f"--port={self._port}", f"--dashboard-port={self._dashboard}", "--dashboard-host=127.0.0.1"]
        head += [f"--dashboard-agent-listen-port={self._agent}", f"--temp-dir={self._ray_dir.name}"]
        self._head = self._begin("head", head)
        self.add_node()

    def add_node(self) -> None:
        """In the place of the one that was killed."""
        self._node = self._begin("node", [sys.executable, __file__, self.address])

    @property
    def processes(self) -> list[psutil.Process]:
        """Of both nodes, the actors on them included."""
        return [*family(self._head), *family(self._node)]

    @property
    def second(self) -> list[psutil.Process]:
        """Of the second node, which is dead when all of them are."""
        return family(self._node)

    def stop(self) -> None:
        left = self.processes
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        self._ray_dir.cleanup()

    def _begin(self, name: str, command: list[str]) -> psutil.Popen:
        """Returns when it is up. Raises SystemExit with its output if it does not come up."""
        log = self._logs / f"{name}-{time.time_ns()}.log"
        with log.open("wb") as output:
            process = psutil.Popen(command, env=self.env, stdout=output, stderr=output, preexec_fn=end_with_parent)
        end = time.monotonic() + START_LIMIT_S
        while UP not in log.read_text():
            if process.poll() is not None or time.monotonic() > end:
                for each in family(process):
                    each.kill()
                sys.exit(f"no Ray node came up; {log}:\n{log.read_text()[-4000:]}")
            time.sleep(0.1)
        return process


def family(process: psutil.Process | None) -> list[psutil.Process]:
    """It and all under it; none if it is gone."""
    try:
        if process is None or process.status() == psutil.STATUS_ZOMBIE:
            return []
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _free_ports(count: int) -> list[int]:
    """Not of those that the system, or Ray, deals out: a head that starts again needs the same ones."""
    free: set[int] = set()
    while len(free) < count:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            free.add(port)
    return list(free)


def main() -> None:
    """The second node: `python nodes.py ADDRESS`. `ray start` refuses to add a node to a head that keeps to loopback."""
    from ray._private.node import Node  # as ray.cluster_utils does
    from ray._private.parameter import RayParams

    given = RayParams(
        gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=CPUS, object_store_memory=200 << 20,
        min_worker_port=0, max_worker_port=0, node_manager_port=0, dashboard_agent_listen_port=None, include_log_monitor=False,
    )  # fmt: skip
    Node(given, head=False, shutdown_at_exit=True, spawn_reaper=False)
    print(UP, flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
