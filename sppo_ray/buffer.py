"""The buffer between judges and learner, as a plain class: what is sealed, what comes next. No actor, no waiting in it.

An iteration goes collecting -> sealed -> released (by the schedule) -> referenced -> trained. The learner asks
`next_task(step)` with the number of updates it has done; the answer depends on nothing else, so a learner that restarts and
asks again gets the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from sppo_ray.batching import batches, epoch_order
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.ledger import Ledger
from sppo_ray.odd_text import holds_control, holds_emoji, holds_no_character, holds_right_to_left, looks_special
from sppo_ray.tables import SealedRow, examples_of
from sppo_ray.types import (
    JudgedGroup,
    LearnerTask,
    ReferenceTask,
    ResumePoint,
    SaveTask,
    SliceSummary,
    StopTask,
    TrainedIteration,
    TrainingExample,
    TrainTask,
)
from sppo_ray.win_rates import has_cycle, order_inconsistency


@dataclass(frozen=True, slots=True)
class OpenSlice:
    """The sealed iteration that is being trained."""

    summary: SliceSummary
    first_step: int
    examples: tuple[TrainingExample, ...]
    referenced: bool

    @property
    def end_step(self) -> int:
        return self.first_step + self.summary.steps


class TrainingBuffer:
    """State over a ledger; built from the same run directory again, it is where it was."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ledger = Ledger(config)
        self._done = self.ledger.last_trained()
        self._open: OpenSlice | None = None
        self._held: dict[int, set[str]] = {}
        self._released: int | None = None  # the iteration the schedule lets the learner work on
        # Of a slice that is trained from one policy: the snapshot it is compared with is that policy.
        self._reference_beforehand = (config.reference, config.objective.snapshot_every) == ("snapshot", "slice")
        if (iteration := self._next_iteration()) and (summary := self.ledger.sealed(iteration)):
            self._open = self._slice(summary, self.ledger.generated(iteration))

    # Collecting.

    def held(self, iteration: int) -> set[str]:
        """Prompt ids whose judged group is on disk."""
        if iteration not in self._held:
            sealed = self.ledger.sealed(iteration)
            table = self.ledger.generated(iteration) if sealed else self.ledger.read(iteration)
            self._held[iteration] = set() if table is None else set(table["prompt_id"].to_pylist())
        return self._held[iteration]

    def add(self, judged: Sequence[JudgedGroup]) -> None:
        """Make groups durable. A group that is already held is left as it is."""
        fresh = self.fresh(judged)
        self.accept(fresh, self.store(fresh))

    # `add` in three: only the middle one touches the disk, so it may run in a thread while the rest of the state is used.

    def fresh(self, judged: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        """Those that are not held yet, each once."""
        named = {(j.group.iteration, j.group.prompt.prompt_id): j for j in judged}
        return [j for (iteration, prompt_id), j in named.items() if prompt_id not in self.held(iteration)]

    def store(self, fresh: Sequence[JudgedGroup]) -> list[pa.Table]:
        """Write them to the ledger, a shard per iteration, in the order of the iterations."""
        iterations = sorted({j.group.iteration for j in fresh})
        return [self.ledger.append(t, [j for j in fresh if j.group.iteration == t]) for t in iterations]

    def accept(self, fresh: Sequence[JudgedGroup], stored: Sequence[pa.Table]) -> None:
        """They are on disk."""
        for j in fresh:
            self.held(j.group.iteration).add(j.group.prompt.prompt_id)

    def seal(self, iteration: int, prompt_ids: Sequence[str]) -> SliceSummary:
        """Close the slice. Sealing a sealed slice gives its summary again."""
        if summary := self.ledger.sealed(iteration):
            return summary
        if iteration != self._next_iteration():
            raise SppoError(f"iteration {iteration} cannot be sealed: {self._next_iteration()} is the next to train")
        table = self.ledger.seal(iteration, self._sealed_rows(iteration, prompt_ids))
        summary = summarise(table, iteration, self.config, self._steps(len(table)))
        self.ledger.mark_sealed(summary)
        self._open = self._slice(summary, table)
        return summary

    # Training.

    def release(self, iteration: int) -> None:
        """Let the learner work on the iteration, once it is sealed."""
        self._released = iteration

    def resume_point(self) -> ResumePoint:
        """Where a learner without a newer checkpoint starts. Checkpoints within an iteration are of no use while its
        reference is still to be computed: that is by the weights at its beginning."""
        step, policy = (self._done.step, self._done.policy_dir) if self._done else (0, self.config.policy.model)
        ready = self._open is not None and (self._open.referenced or not self._reference_beforehand)
        return ResumePoint(step, policy, up_to=None if ready else step)

    def next_task(self, step: int) -> LearnerTask | None:
        """The task after `step` updates; None while the slice it needs is not sealed or not released."""
        if self._next_iteration() is None:
            return StopTask()
        if self._open is None or self._open.summary.iteration != self._released:
            return None
        now = self._open
        if not now.first_step <= step <= now.end_step:
            raise SppoError(
                f"the learner is at step {step}, outside of {now.first_step}..{now.end_step} now in training"
            )
        if not now.referenced and self._reference_beforehand:
            return ReferenceTask(now.summary.iteration, now.examples)
        if step == now.end_step:
            return SaveTask(step, now.summary.iteration, version=now.summary.iteration)
        return self._train_task(now, step)

    def record_reference(self, iteration: int, logps: Sequence[tuple[float, ...]]) -> None:
        """Reference log-probabilities (nats), one tuple per example in the slice's order; durable, and kept if repeated."""
        now = self._current(iteration)
        if not now.referenced:
            self.ledger.write_reference(iteration, [e.prompt_id for e in now.examples], logps)
            self._open = replace(now, examples=_with_reference(now.examples, logps), referenced=True)

    def saved(self, trained: TrainedIteration) -> None:
        """The iteration's policy is on disk and published."""
        self._current(trained.iteration)
        self.ledger.mark_trained(trained)
        self._done, self._open = trained, None
        self._held.pop(trained.iteration, None)

    def trained(self, iteration: int) -> TrainedIteration | None:
        """What an iteration gave, once its policy is saved."""
        return self.ledger.trained(iteration) if self._done and self._done.iteration >= iteration else None

    def last_trained(self) -> TrainedIteration | None:
        return self._done

    def of_lost_history(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of metrics.jsonl tells of a slice that is not sealed any more, or of a policy that is no more."""
        event, iteration = line.get("event"), line.get("iteration", 0)
        if event == "slice":
            return self.ledger.sealed(iteration) is None
        return event == "evaluation" and iteration > (self._done.iteration if self._done else 0)

    # Inside.

    def _next_iteration(self) -> int | None:
        following = 1 + (self._done.iteration if self._done else 0)
        return following if following <= self.config.schedule.iterations else None

    def _current(self, iteration: int) -> OpenSlice:
        if self._open is None or self._open.summary.iteration != iteration:
            raise SppoError(f"iteration {iteration} is not the one in training")
        return self._open

    def _sealed_rows(self, iteration: int, prompt_ids: Sequence[str]) -> list[SealedRow]:
        return [SealedRow(prompt_id) for prompt_id in prompt_ids]

    def _steps(self, groups: int) -> int:
        """Updates that a slice of so many groups gives."""
        return math.ceil(groups / self.config.learner.batch_size) * self.config.learner.epochs

    def _slice(self, summary: SliceSummary, table: pa.Table) -> OpenSlice:
        examples = tuple(examples_of(table, self.config, summary.iteration))
        reference = self.ledger.reference(summary.iteration)
        if reference is not None:
            examples = _with_reference(examples, reference)
        return OpenSlice(summary, self._done.step if self._done else 0, examples, reference is not None)

    def _train_task(self, now: OpenSlice, step: int) -> TrainTask:
        size, local = self.config.learner.batch_size, step - now.first_step
        steps_per_epoch = math.ceil(len(now.examples) / size)
        epoch, batch = divmod(local, steps_per_epoch)
        order = epoch_order(len(now.examples), self.config.run.seed, now.summary.iteration, epoch)
        examples = tuple(now.examples[i] for i in batches(order, size)[batch])
        return TrainTask(step, now.summary.iteration, local, steps_per_epoch, examples)


def summarise(table: pa.Table, iteration: int, config: Config, steps: int) -> SliceSummary:
    """Counts of a slice, for the record and the progress display."""
    k = config.rollout.responses_per_prompt
    texts = list(zip(*([m[1]["content"] for m in table[f"generate_{i}"].to_pylist()] for i in range(k)), strict=True))
    responses = [text for group in texts for text in group]
    logits = np.array(table["logits"].to_pylist())
    return SliceSummary(
        iteration=iteration,
        groups=len(table),
        examples=len(table),
        identical_groups=sum(len(set(group)) == 1 for group in texts),
        empty_responses=sum(not text.strip() for text in responses),
        cut_responses=sum(table["cut_responses"].to_pylist()),
        control_responses=sum(map(holds_control, responses)),
        broken_responses=sum(map(holds_no_character, responses)),
        special_responses=sum(map(looks_special, responses)),
        right_to_left_responses=sum(map(holds_right_to_left, responses)),
        emoji_responses=sum(map(holds_emoji, responses)),
        order_inconsistency=float(order_inconsistency(logits).mean()),
        cycle_rate=float(has_cycle(logits).mean()),
        steps=steps,
    )


def _with_reference(
    examples: Iterable[TrainingExample], logps: Iterable[tuple[float, ...]]
) -> tuple[TrainingExample, ...]:
    return tuple(replace(e, reference_logps=values) for e, values in zip(examples, logps, strict=True))
