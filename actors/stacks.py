"""The stacks of a process that hangs, taken from outside by py-spy: it answers nothing itself any more."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

LIMIT_S = 60.0  # for the node to answer: it may be as ill as the process
READ_LIMIT_S = 20.0  # for py-spy


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is."""

    node_id: str  # Ray's, in hex
    pid: int


def here() -> Place:
    """Of the calling process, which must be one of Ray's."""
    return Place(ray.get_runtime_context().get_node_id(), os.getpid())


async def dump(name: str, node_id: str, pid: int, run_dir: str) -> Path:
    """Append the Python stacks of process `pid` and its children to <run_dir>/logs/<name>.stacks.txt, which is returned.

    Raises nothing when they cannot be read (py-spy may not trace, the node is lost): the file says so.
    """
    path = Path(run_dir) / "logs" / f"{name}.stacks.txt"
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    reading = ray.remote(_stacks).options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(pid)
    try:
        async with asyncio.timeout(LIMIT_S):
            text = await reading
    except (RayError, TimeoutError) as error:
        text = f"could not be read: node {node_id} {str(error) or f'gave no answer in {LIMIT_S:g} s'}\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(
                f"{datetime.now(UTC).isoformat(timespec='seconds')} {name}, process {pid} on node {node_id}\n{text}\n"
            )
    except OSError as error:  # a full disk is no reason to leave a hung process as it is
        logger.error("%s: %s; its stacks:\n%s", path, error, text)
    return path


def _stacks(pid: int) -> str:
    """What py-spy says of a process of this node; with its own words if it is refused."""
    # Without pausing the process: a stopped one cannot be paused, and a hung one does not move. No local variables: they
    # hold prompts and tokens.
    program = shutil.which("py-spy", path=os.pathsep.join([sysconfig.get_path("scripts"), os.defpath]))
    if program is None:
        return "could not be read: py-spy is not installed on the node (it comes with ray[default])\n"
    command = [program, "dump", "--nonblocking", "--subprocesses", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=READ_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"could not be read: py-spy did not end in {READ_LIMIT_S:g} s\n"
    if done.returncode != 0:
        said = done.stderr.partition("Stack backtrace:")[0].strip()  # its own backtrace helps nobody
        return f"{done.stdout}could not be read whole; py-spy dump ended with {done.returncode}: {said}\n"
    return done.stdout
