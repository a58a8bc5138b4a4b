"""What the driver shows while a run goes on: live bars in a terminal, a line now and then elsewhere (e.g. a Ray job's log)."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sppo_ray.secrets import hide
from sppo_ray.types import Receipt, SliceSummary, TrainedIteration

LINE_EVERY_S = 10.0
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # of Ray's tracebacks
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def say(console: Console, text: str, style: str | None = None) -> None:
    """A line for the user, as it is: errors hold brackets that are no markup, may hold secrets, and quote what others wrote, which
    may hold commands to the terminal."""
    text = _CONTROL.sub(lambda found: repr(found[0])[1:-1], _COLOUR.sub("", hide(text)))
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class RunProgress:
    """Implements `protocols.Watch`. Use as a context manager."""

    def __init__(self, console: Console, iterations: int) -> None:
        self.console, self.iterations = console, iterations
        self._steps_before = 0  # updates of the iterations before the one shown
        self.bars = Progress(
            TextColumn("{task.description:<22}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._sampled = self._judged = self._trained = TaskID(0)
        self._iteration = self._held = self._tokens = self._truncated = self._steps = 0
        self.groups = 0  # sampled since this display began, repeated ones counted again
        self._since = self._last_line = time.monotonic()

    def __enter__(self) -> RunProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """A lasting line."""
        say(self.bars.console, text)

    def resumed(self, trained: TrainedIteration) -> None:
        self._steps_before = trained.step
        self.say(f"going on after iteration {trained.iteration}")

    # Watch.

    def sampling(self, iteration: int, total: int, held: int) -> None:
        self._iteration, self._held, self._tokens, self._truncated = iteration, held, 0, 0
        self._since = self._last_line = time.monotonic()
        for task in self.bars.task_ids:
            self.bars.remove_task(task)
        name = f"iteration {iteration}/{self.iterations}"
        self._sampled = self.bars.add_task(f"{name} sampled", total=total, completed=held, note="")
        self._judged = self.bars.add_task(f"{name} judged", total=total, completed=held, note="", held=held)
        again = f" ({held} already in the ledger)" if held else ""
        self.say(f"{name}: sampling and judging {total} prompts{again}")

    def sampled(self, receipt: Receipt) -> None:
        self.groups += 1
        self._tokens += receipt.tokens
        self._truncated += receipt.truncated
        self.bars.update(self._sampled, advance=1, note=f"{self._rate():,.0f} tokens/s")

    def judged(self, receipt: Receipt) -> None:
        self.bars.update(self._judged, advance=1)
        sampled, judged = self._task(self._sampled), self._task(self._judged)
        self._line(
            f"  sampled {sampled.completed:.0f}/{sampled.total:.0f}, judged {judged.completed:.0f}/{judged.total:.0f}, "
            f"{self._rate():,.0f} tokens/s{self._eta(judged)}"
        )

    def sealed(self, summary: SliceSummary) -> None:
        held = f"{self._held} of them from before; of the others " if self._held else ""
        self.say(
            f"  sealed: {summary.groups} groups, {held}{self._tokens:,} tokens, {self._truncated} responses at the token limit; "
            f"{summary.cut_responses} longer than the judge reads, {summary.identical_groups} groups of identical responses, "
            f"order inconsistency {summary.order_inconsistency:.1%}, cycles {summary.cycle_rate:.1%}"
        )
        self._steps, self._since = summary.steps, time.monotonic()
        name = f"iteration {summary.iteration}/{self.iterations}"
        self._trained = self.bars.add_task(f"{name} trained", total=summary.steps, note="")

    def stepped(self, line: Mapping[str, Any]) -> None:
        """The learner's newest step."""
        done = line["step"] - self._steps_before
        if not self._steps or done < 1:  # a line of an earlier iteration, seen late
            return
        note = f"loss {line['loss']:.3g}, margin {line['margin']:.2f}, {line['tokens_per_s']:,.0f} tokens/s"
        self.bars.update(self._trained, completed=done, note=note)
        self._line(f"  trained {done}/{self._steps} steps, {note}{self._eta(self._task(self._trained))}")

    def trained(self, trained: TrainedIteration) -> None:
        self.bars.update(self._trained, completed=self._steps)
        self._steps, self._steps_before = 0, trained.step
        self.say(f"  trained: step {trained.step}; policy in {trained.policy_dir}, weights {trained.checksum}")

    def alarm(self, text: str) -> None:
        """Something that does not stop the run but should be looked at."""
        say(self.bars.console, f"warning: {text}", style="yellow")

    # Inside.

    def _rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._since, 1e-9)

    def _task(self, task: TaskID) -> Any:
        return next(t for t in self.bars.tasks if t.id == task)

    def _eta(self, task: Any) -> str:
        elapsed = time.monotonic() - self._since
        done = task.completed - task.fields.get("held", 0)
        return f", {elapsed / done * (task.total - task.completed):.0f} s to go" if done > 0 else ""

    def _line(self, text: str) -> None:
        if not self.console.is_terminal and time.monotonic() - self._last_line > LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.say(text)
