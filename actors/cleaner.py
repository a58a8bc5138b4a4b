"""Ray Train's PlacementGroupCleaner, made to end, and to take nobody for dead who lives.

It is a detached actor that watches the controller and, when that has died, gives back its resources and exits. In Ray 2.60 it
does not exit: it calls `exit_actor` in a thread of its own, which ends that thread alone. Nor does it watch if the controller
died before its call to `start_monitoring` arrived. A learner that was stopped or killed would leave a process behind on the
cluster. And it asks the dashboard, at the address that the cluster has on record: where the cluster has none, that is the one
of another Ray on the machine, which knows no such controller, so that the ranks of a learner that lives are taken from it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.exceptions import RpcError
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import placement_group_cleaner
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.train.v2.api import data_parallel_trainer
from ray.util.state.exception import RayStateApiException


def is_actor_alive(actor_id: str, timeout: float) -> bool:
    """By the GCS of the Ray that this process is of. Raises RayStateApiException, on which the cleaner goes on watching, if that
    does not answer within `timeout` seconds."""
    gcs = ray._private.worker.global_worker.gcs_client

    async def ask() -> dict[ray.ActorID, Any]:
        found: dict[ray.ActorID, Any] = await gcs.async_get_all_actor_info(
            ray.ActorID.from_hex(actor_id), timeout=timeout
        )
        return found

    try:
        found = asyncio.run(ask())
    except RpcError as error:
        raise RayStateApiException(f"the GCS did not say whether actor {actor_id} lives") from error
    return any(actor.state != ActorTableData.DEAD for actor in found.values())


class EndingCleaner(PlacementGroupCleaner):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        placement_group_cleaner.is_actor_alive = is_actor_alive
        self.start_monitoring()

    def _exit(self) -> None:
        if threading.current_thread() is not self._monitor_thread:
            super()._exit()
        elif self._stop_event.is_set():
            sys.exit()  # this thread; the one that asked it to stop exits the actor, as Ray expects
        else:
            os._exit(0)


class EndingCleanerCallback(PlacementGroupCleanerCallback):  # type: ignore[misc]
    """Runs in the controller's process."""

    def after_controller_start(self, train_run_context: Any) -> None:
        placement_group_callback.PlacementGroupCleaner = EndingCleaner
        super().after_controller_start(train_run_context)


def use_ending_cleaner() -> None:
    """For trainers that this process makes from now on."""
    data_parallel_trainer.PlacementGroupCleanerCallback = EndingCleanerCallback
