"""The buffer of async self-play: the training buffer, plus who may sample what (`Admission`) and batches cut from the groups
that are ready. No actor, no waiting in it; built from the same run directory again, it is where it was.

A batch, once cut, is written down before it is handed out, so a learner that restarts gets the same rows for the same step.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from sppo_ray.admission import Admission
from sppo_ray.buffer import OpenSlice, TrainingBuffer
from sppo_ray.config import Config
from sppo_ray.errors import SppoError
from sppo_ray.ledger import LedgerDamaged, group_keys
from sppo_ray.step_plan import StepPlan
from sppo_ray.tables import SealedRow, examples_of
from sppo_ray.types import (
    CutBatch,
    JudgedGroup,
    LearnerTask,
    Publication,
    PublishTask,
    ResumePoint,
    SaveTask,
    SliceSummary,
    StopTask,
    Ticket,
    TrainedIteration,
    TrainingExample,
    TrainTask,
)

log = logging.getLogger(__name__)


class AsyncBuffer(TrainingBuffer):
    """`schedule.batch_order=ready`: batches of finished groups. `slice`: whole slices in sync's order, as in the base class."""

    def __init__(self, config: Config, slices: Sequence[Sequence[str]]) -> None:
        """slices: prompt ids of each iteration."""
        self._prompt_ids = slices
        self._index = [{prompt_id: n for n, prompt_id in enumerate(part)} for part in slices]
        self.plan = StepPlan(config, [len(part) for part in slices])
        self._ready_order = config.schedule.batch_order == "ready"
        super().__init__(config)
        if self._ready_order:
            self._reference_beforehand = False
        self._examples: dict[int, TrainingExample] = {}  # by ticket: ready, or in one of the last batches
        self._batches: dict[int, CutBatch] = {}  # by step, of the iteration in training
        self.publication: Publication | None = None  # the newest
        self._evaluated = -1  # the last iteration whose policy was evaluated while it was served
        self._published = self.plan.version_at(super().resume_point().step)
        self.admission = self._restore()

    # Sampling.

    def admit(self, room: int) -> list[Ticket]:
        return self.admission.admit(room)

    def resample(self, ticket: Ticket) -> None:
        self.admission.resample(ticket.number)

    def serve(self, version: int) -> None:
        """Every rollout worker serves the published `version`."""
        self.admission.serve(version)

    def evaluated(self, iteration: int) -> None:
        """The iteration's policy need not be served any longer."""
        self._evaluated = iteration

    @property
    def resamples(self) -> dict[str, int]:
        """Groups thrown away since this process began, and the most of any one prompt."""
        return {"resampled_groups": self.admission.resampled, "most_resamples": self.admission.most_resamples}

    # Collecting.

    def fresh(self, judged: Sequence[JudgedGroup]) -> list[JudgedGroup]:
        named = {self._number(j): j for j in judged}
        return [j for number, j in named.items() if self.admission.wanted(number)]

    def accept(self, fresh: Sequence[JudgedGroup], stored: Sequence[pa.Table]) -> None:
        for j in fresh:
            self.admission.accept(self._number(j), j.group.version_start)
        if self._ready_order:
            for iteration, table in zip(sorted({j.group.iteration for j in fresh}), stored, strict=True):
                self._remember(table, iteration)

    def collected(self, iteration: int) -> bool:
        """Whether the iteration can be sealed: every group is on disk and, in ready order, in a batch."""
        if self._ready_order:
            return self.admission.next_step >= self.plan.end_step(iteration)
        return self.admission.accepted(iteration)

    # Training.

    def release(self, iteration: int) -> None:
        super().release(iteration)
        if not self._ready_order:
            self.admission.take_slice(iteration)

    def next_task(self, step: int) -> LearnerTask | None:
        """The task after `step` updates; None while it needs groups that are not ready, or weights that are not served."""
        iteration = self._next_iteration()
        if iteration is None:
            return StopTask()
        if not self._ready_order:
            task = super().next_task(step)
            if not isinstance(task, SaveTask):
                return task
            return replace(task, probe=self._probe(self._open_examples)) if self._may_publish(iteration) else None
        if step == self.plan.end_step(iteration):
            if self._open is None or not self._may_publish(iteration):
                return None  # saved only when its tables are written
            return SaveTask(step, iteration, self.plan.last_version(iteration), self._probe(self._last_batch(step)))
        if (version := self.plan.version_at(step)) > self._published:
            if not self._may_publish(iteration):
                return None
            return PublishTask(step, iteration, version, self._probe(self._last_batch(step)))
        batch = self._batch(step)
        return None if batch is None else self._train_batch(batch)

    def _may_publish(self, iteration: int) -> bool:
        """The policy that ended the iteration before is evaluated while it is served: nothing newer may replace it, neither
        at the workers nor in the hub, which a worker that restarts loads from. Without evaluation nobody has to wait."""
        return self.config.evaluation.prompts is None or self._evaluated >= iteration - 1

    def resume_point(self) -> ResumePoint:
        """A checkpoint beyond the last batch that is on disk (its groups were lost) must not be gone on from."""
        start = super().resume_point()
        return replace(start, up_to=self.admission.next_step) if self._ready_order else start

    def of_lost_history(self, line: Mapping[str, Any]) -> bool:
        """Also of updates whose batches are cut anew."""
        step = line.get("step", line.get("after_step", 0))
        return super().of_lost_history(line) or (self._ready_order and step > self.admission.next_step)

    def published(self, publication: Publication) -> None:
        """The hub holds these weights."""
        self.publication, self._published = publication, publication.version

    def saved(self, trained: TrainedIteration) -> None:
        super().saved(trained)
        for number in itertools.chain.from_iterable(map(self._numbers, self._batches.values())):
            self._examples.pop(number, None)
        self._batches.clear()

    # Batches.

    def _batch(self, step: int) -> CutBatch | None:
        if step not in self._batches:
            if step != self.admission.next_step:
                raise SppoError(
                    f"the learner is at step {step}, but batch {self.admission.next_step} is the next to be cut"
                )
            taken = self.admission.cut()
            if taken is None:
                return None
            place = self.plan.place(step)
            groups = tuple((self.plan.ticket_place(number)[2], version) for number, version in taken)
            batch = CutBatch(step, place.iteration, place.epoch, place.version, groups)
            self.ledger.append_batch(batch)
            self._batches[step] = batch
        return self._batches[step]

    def _train_batch(self, batch: CutBatch) -> TrainTask:
        if old := self._batches.get(batch.step - 2):
            for number in self._numbers(old):
                self._examples.pop(number, None)
        place = self.plan.place(batch.step)
        steps_per_epoch = self.plan.steps_per_epoch(batch.iteration)
        return TrainTask(batch.step, batch.iteration, place.step_in_iteration, steps_per_epoch, self._rows(batch))

    def _rows(self, batch: CutBatch) -> tuple[TrainingExample, ...]:
        numbers = self._numbers(batch)
        if any(number not in self._examples for number in numbers):  # a learner that restarted goes through it again
            self._remember(self._table(batch.iteration), batch.iteration)
            if any(number not in self._examples for number in numbers):
                raise LedgerDamaged(f"groups of iteration {batch.iteration}, step {batch.step} are on disk no longer")
        return tuple(
            replace(self._examples[number], staleness=batch.version - version)
            for number, (_, version) in zip(numbers, batch.groups, strict=True)
        )

    def _numbers(self, batch: CutBatch) -> list[int]:
        return [self.plan.ticket_number(batch.iteration, batch.epoch, index) for index, _ in batch.groups]

    def _last_batch(self, step: int) -> tuple[TrainingExample, ...]:
        batch = self._batches.get(step - 1)
        return self._rows(batch) if batch else ()

    def _probe(self, examples: Sequence[TrainingExample]) -> tuple[TrainingExample, ...]:
        return tuple(examples[: self.config.objective.mismatch_groups])

    @property
    def _open_examples(self) -> tuple[TrainingExample, ...]:
        return self._open.examples if self._open else ()

    # From the run directory.

    def _restore(self) -> Admission:
        schedule = self.config.schedule
        step, first = super().resume_point().step, self._next_iteration()
        tables = {t: self._table(t) for t in range(first or self.plan.iterations + 1, self.plan.iterations + 1)}
        versions = {n: version for t, table in tables.items() for n, version in self._fresh_versions(t, table).items()}
        in_batches: set[int] = set()
        if first and self._ready_order:
            self._batches = {batch.step: batch for batch in self._whole_batches(first, versions)}
            in_batches = set(itertools.chain.from_iterable(map(self._numbers, self._batches.values())))
            for t, table in tables.items():
                self._remember(table, t)
        next_step = max(self._batches, default=step - 1) + 1
        # Where batches were lost, what was sampled from later weights is of a history that will not come again.
        newest = self.plan.version_at(next_step)
        ready = {number: v for number, v in versions.items() if v <= newest or number in in_batches}
        admission = Admission(self.plan, schedule.max_staleness, schedule.max_resamples, self._published, next_step)
        admission.restore(ready, in_batches)
        return admission

    def _whole_batches(self, iteration: int, versions: Mapping[int, int]) -> list[CutBatch]:
        """The batches whose groups are all on disk, up to the first that is not: the learner starts before all of them."""
        cut, first = self.ledger.batches(iteration), self.plan.first_step(iteration)
        whole: list[CutBatch] = []
        free = set(versions)  # each group is in one batch
        for step, batch in enumerate(cut, start=first):
            numbers = set(self._numbers(batch))
            if batch.step != step or len(numbers) < len(batch.groups) or not numbers <= free:
                break
            free -= numbers
            whole.append(batch)
        if len(whole) < len(cut):
            log.warning(
                "batches of iteration %d are cut anew from step %d on: groups are lost", iteration, first + len(whole)
            )
            self.ledger.rewrite_batches(iteration, whole)
        return whole

    def _table(self, iteration: int) -> pa.Table | None:
        sealed = self.ledger.sealed(iteration)
        return self.ledger.generated(iteration) if sealed else self.ledger.read(iteration)

    def _versions(self, iteration: int, table: pa.Table | None) -> dict[int, int]:
        """Policy version by ticket."""
        if table is None:
            return {}
        numbers = (self._ticket(iteration, key) for key in group_keys(table))
        return dict(zip(numbers, table["policy_version"].to_pylist(), strict=True))

    def _fresh_versions(self, iteration: int, table: pa.Table | None) -> dict[int, int]:
        """In slice order nothing is looked at again when it is trained on: what is too old for a bound that became smaller
        is left out here, and so is sampled again."""
        versions = self._versions(iteration, table)
        if self._ready_order or self.ledger.sealed(iteration):
            return versions
        oldest = self.plan.version_at(self.plan.first_step(iteration)) - self.config.schedule.max_staleness
        return {number: version for number, version in versions.items() if version >= oldest}

    def _remember(self, table: pa.Table | None, iteration: int) -> None:
        if table is not None:
            examples = examples_of(table, self.config, iteration)
            numbers = (self._ticket(iteration, key) for key in group_keys(table))
            self._examples.update(zip(numbers, examples, strict=True))

    def _number(self, judged: JudgedGroup) -> int:
        group = judged.group
        return self._ticket(group.iteration, (group.prompt.prompt_id, group.epoch))

    def _ticket(self, iteration: int, key: tuple[str, int]) -> int:
        prompt_id, epoch = key
        return self.plan.ticket_number(iteration, epoch, self._index[iteration - 1][prompt_id])

    # What the base class asks.

    def _sealed_rows(self, iteration: int, prompt_ids: Sequence[str]) -> list[SealedRow]:
        if self._ready_order:
            return [
                SealedRow(self._prompt_ids[iteration - 1][index], batch.epoch, batch.step + 1, batch.version)
                for batch in self._batches.values()
                for index, _ in batch.groups
            ]
        first = self.plan.first_step(iteration)
        start = self.plan.tickets_of(iteration).start
        size, version = self.config.learner.batch_size, self.plan.version_at(first)
        positions = [self.plan.ticket_number(iteration, 0, n) - start for n in range(len(prompt_ids))]
        return [
            SealedRow(p, 0, first + position // size + 1, version)
            for p, position in zip(prompt_ids, positions, strict=True)
        ]

    def _steps(self, groups: int) -> int:
        iteration = self._next_iteration()
        assert iteration is not None
        return self.plan.end_step(iteration) - self.plan.first_step(iteration)

    def _slice(self, summary: SliceSummary, table: pa.Table) -> OpenSlice:
        if self._ready_order:
            return OpenSlice(summary, self.plan.first_step(summary.iteration), examples=(), referenced=True)
        opened = super()._slice(summary, table)
        version = self.plan.version_at(opened.first_step)
        return replace(
            opened, examples=tuple(replace(e, staleness=version - e.policy_version) for e in opened.examples)
        )  # fmt: skip
