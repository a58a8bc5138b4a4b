"""Joining or starting a Ray cluster. A cluster started here listens on loopback and asks for a token."""

from __future__ import annotations

import logging
import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError
from rich.console import Console

from actors.access import REMEDY, close_token, ensure_token, refuse_open_cluster, stay_on_loopback
from sppo_ray.config import Config
from sppo_ray.errors import ConfigError, SppoError
from sppo_ray.layout import Layout
from sppo_ray.progress import say
from sppo_ray.seeds import derive

ROOT = Path(__file__).resolve().parent.parent  # where the packages `sppo_ray` and `actors` lie


@dataclass(frozen=True, slots=True)
class Connection:
    namespace: str
    dashboard: str | None  # URL, where there is one
    local: bool  # started here, ends here


@contextmanager
def connected(config: Config, layout: Layout) -> Iterator[Connection]:
    """Join the cluster of cluster.address or RAY_ADDRESS, else start a local one for the length of the run.

    Raises ConfigError if there is no such cluster, or if it is open to everyone on its network."""
    root = Path(config.run.dir)
    namespace = f"sppo-{root.name}-{derive(root) % 0xFFFF:04x}"  # two run directories may have one name
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    try:
        open_to = refuse_open_cluster(address, config.cluster.allow_unauthenticated) if address else ensure_token()
        if open_to:
            say(Console(stderr=True), f"warning: {open_to}", "yellow")
        context = _join(address, namespace) if address else _start(layout, namespace)
    except AuthenticationError as error:
        raise ConfigError(f"Ray's token: {error}. To use one, {REMEDY}.") from None
    except ConnectionError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: {error}. Check cluster.address and the token."
        ) from None
    try:
        # Again the same as Ctrl-C: ray.init() has installed a handler of its own.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _check_resources(layout, address)
        url = f"http://{context.dashboard_url}" if context.dashboard_url else None
        yield Connection(namespace, url, local=not address)
    finally:
        ray.shutdown()


def _join(address: str, namespace: str) -> ray.runtime_context.RuntimeContext:
    close_token()
    in_job = (
        "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    )  # then the job's own working directory is on every worker's path
    runtime_env = None if in_job else {"py_modules": [str(ROOT / "sppo_ray"), str(ROOT / "actors")]}
    return ray.init(
        address, namespace=namespace, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.ERROR
    )  # fmt: skip


def set_ray_defaults() -> None:
    """In this process's environment, for a Ray that it starts."""
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # Ray's announced default; unset, every worker warns of it
    # Objects that nobody holds any more are freed at once: by default Ray gathers them for a second, and the chunks of a
    # publish, each as large as a layer, would pile up meanwhile.
    os.environ.setdefault("RAY_free_objects_period_milliseconds", "0")
    # Of the tasks that are over Ray keeps 100,000 for its dashboard, at 4 KB each, and the names of a million more: a run makes
    # several a group, and the process that keeps them would grow for days.
    os.environ.setdefault("RAY_task_events_max_num_task_in_gcs", "4000")
    os.environ.setdefault("RAY_task_events_max_dropped_task_attempts_tracked_per_job_in_gcs", "4000")
    # Ray would start a worker for each CPU beforehand; none of our actors, which have environments of their own, could use it.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")


def _start(layout: Layout, namespace: str) -> ray.runtime_context.RuntimeContext:
    stay_on_loopback()
    set_ray_defaults()
    roles = (layout.rollout, layout.judge, layout.learner)
    cpus = max(os.cpu_count() or 1, math.ceil(sum(role.workers * role.cpus for role in roles)) + 1)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        return ray.init(
            address="local",
            num_cpus=cpus,
            namespace=namespace,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            runtime_env={"env_vars": {"PYTHONPATH": path}},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        if "timed out during startup" not in str(error):  # Ray has no type for it, and 30 s for the limit
            raise
        raise SppoError(
            "Ray did not start on this machine in the time it gives itself: it is overloaded; try again when it is not"
        ) from None


def _check_resources(layout: Layout, address: str | None) -> None:
    """Refuse at once what the cluster could never place; Ray would wait for ever."""
    have, where = ray.cluster_resources(), f"the cluster at {address}" if address else "this machine"
    if layout.gpus > have.get("GPU", 0):
        raise ConfigError(
            f"the layout wants {layout.gpus} GPUs but {where} has {have.get('GPU', 0):.0f}: "
            "lower cluster.gpus (0 runs on CPU), or run where the GPUs are."
        )
