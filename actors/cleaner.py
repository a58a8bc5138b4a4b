"""Ray Train's PlacementGroupCleaner, made to end.

It is a detached actor that watches the controller and, when that has died, gives back its resources and exits. In Ray 2.60 it
does not exit: it calls `exit_actor` in a thread of its own, which ends that thread alone. Nor does it watch if the controller
died before its call to `start_monitoring` arrived, or if there are two Rays on the machine: it looks for any, and finding two is
an error that ends its thread. A learner that was stopped or killed would leave a process behind on the cluster.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import ray
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner
from ray.train.v2.api import data_parallel_trainer


class EndingCleaner(PlacementGroupCleaner):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # Ray heeds it first
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address  # of the Ray to ask: its own
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
