"""What the driver shows while an async run goes on: sampling, judging and training side by side, over the whole run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from sppo_ray.progress import RunProgress
from sppo_ray.step_plan import StepPlan
from sppo_ray.types import Receipt, SliceSummary, TrainedIteration


class AsyncProgress(RunProgress):
    """Implements `protocols.Watch`. Use as a context manager."""

    def __init__(self, console: Console, plan: StepPlan) -> None:
        super().__init__(console, plan.iterations)
        self.plan = plan
        self._sampled = self.bars.add_task("sampled", total=plan.tickets, note="")
        self._judged = self.bars.add_task("judged", total=plan.tickets, note="")
        self._trained = self.bars.add_task("trained (updates)", total=plan.steps, note="")
        self._first_step = 0

    def resumed(self, trained: TrainedIteration) -> None:
        self._first_step = trained.step
        self.bars.update(self._trained, completed=trained.step)
        self.say(f"going on after iteration {trained.iteration}")

    def holds(self, groups: int) -> None:
        """A run that goes on has so many judged groups on disk already."""
        for task in (self._sampled, self._judged):
            self.bars.update(task, completed=min(groups, self.plan.tickets))
        if groups:
            self.say(f"{groups} groups are already in the ledger")

    def judged(self, receipt: Receipt) -> None:
        self.bars.update(self._judged, advance=1)
        self._show("")

    def sealed(self, summary: SliceSummary) -> None:
        self.say(
            f"iteration {summary.iteration}/{self.iterations}: all {summary.groups} groups are in, "
            f"{summary.identical_groups} of identical responses, {summary.cut_responses} responses longer than the judge reads, "
            f"order inconsistency {summary.order_inconsistency:.1%}, "
            f"cycles {summary.cycle_rate:.1%}"
        )

    def stepped(self, line: Mapping[str, Any]) -> None:
        note = (
            f"loss {line['loss']:.3g}, margin {line['margin']:.2f}, "
            f"staleness {line['staleness_mean']:.2f} (at most {line['staleness_max']:.0f})"
        )
        self.bars.update(self._trained, completed=line["step"], note=note)
        self._show(f", {note}")

    def trained(self, trained: TrainedIteration) -> None:
        self.say(
            f"iteration {trained.iteration}/{self.iterations}: trained, step {trained.step}, version {trained.version}; "
            f"policy in {trained.policy_dir}, weights {trained.checksum}"
        )

    def _show(self, note: str) -> None:
        sampled, judged, trained = map(self._task, (self._sampled, self._judged, self._trained))
        steps = trained.completed - self._first_step
        left = (time.monotonic() - self._since) / steps * (trained.total - trained.completed) if steps > 0 else None
        self._line(
            f"  sampled {sampled.completed:.0f}/{sampled.total:.0f}, judged {judged.completed:.0f}, updates "
            f"{trained.completed:.0f}/{trained.total:.0f}{note}, {self._rate():,.0f} tokens/s"
            + (f", {left:.0f} s to go" if left is not None else "")
        )
