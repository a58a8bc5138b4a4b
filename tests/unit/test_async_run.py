"""The async buffer driven through random orders of finishing, aborting, training, publishing, crashing and resuming."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from groups import HandingOut, config, judged
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sppo_ray.types import Publication, PublishTask, ReferenceTask, SaveTask, StopTask, TrainedIteration, TrainTask


class AsyncRun(RuleBasedStateMachine):
    """A model of a whole run; whatever happens, it can be brought to its end, and every row obeys the bound."""

    @initialize(
        staleness=st.integers(0, 3),
        every=st.one_of(st.integers(1, 3), st.just("slice")),
        sizes=st.lists(st.integers(1, 7), min_size=1, max_size=3),
        batch=st.integers(1, 3),
        epochs=st.integers(1, 2),
        order=st.sampled_from(["ready", "ready", "slice"]),
        resamples=st.sampled_from([1, 2, 100]),
    )
    def begin(self, staleness, every, sizes, batch, epochs, order, resamples):
        self.dir = Path(tempfile.mkdtemp())
        self.config = config(
            self.dir,
            schedule__mode="async",
            schedule__iterations=len(sizes),
            schedule__max_staleness=staleness,
            schedule__max_resamples=resamples,
            schedule__batch_order=order,
            weights__publish_every="slice" if order == "slice" else every,
            learner__batch_size=batch,
            learner__epochs=epochs,
            rollout__responses_per_prompt=2,
            objective__reference="snapshot",
        )
        self.slices = [[f"{t}-{n}" for n in range(size)] for t, size in enumerate(sizes, start=1)]
        self.batches = {}  # step -> rows, as first handed out
        self.checkpoints = set()  # steps after which the learner's state was kept
        self.loosest = staleness
        self.resume()

    def resume(self):
        self.buffer = HandingOut(self.config, self.slices)
        self.running = []
        self.exhausted = False
        # The hub's and the rollout workers', of the last policy; a learner that goes on from a later checkpoint publishes.
        self.version = self.served = self.buffer.plan.version_at(self.buffer.resume_point().step)
        self.restart_learner()

    def restart_learner(self):
        point = self.buffer.resume_point()
        if point.up_to is not None:
            self.checkpoints = {step for step in self.checkpoints if step <= point.up_to}
        self.step = max({point.step, *(step for step in self.checkpoints if step > point.step)})

    # What may happen, in any order.

    @rule(room=st.integers(1, 5))
    def admit(self, room):
        if self.exhausted:
            return  # as the schedule does: it has stopped asking
        tickets = self.buffer.admit(room)
        self.exhausted = self.buffer.admission.exhausted
        for ticket in tickets:
            assert ticket.number not in {other.number for other, _ in self.running}
            assert ticket.number < self.trained_through(self.served + self.config.schedule.max_staleness)
            assert ticket.protected == (ticket.resamples >= self.config.schedule.max_resamples)
            self.running.append((ticket, self.served))

    @rule(data=st.data())
    def finish(self, data):
        if self.running:
            at = data.draw(st.integers(0, len(self.running) - 1))
            ticket, oldest = self.running.pop(at)
            version = data.draw(st.integers(oldest, max(oldest, self.version)))  # a worker may be ahead of the others
            group = judged(self.slices[ticket.iteration - 1][ticket.index], ticket.iteration, 2, version, ticket.epoch)
            self.buffer.add([group, group])
            self.buffer.add([group])  # a second copy changes nothing

    @rule(data=st.data())
    def abort(self, data):
        """By a publish: the worker finishes those that are protected."""
        at_risk = [entry for entry in self.running if not entry[0].protected]
        if at_risk:
            entry = at_risk[data.draw(st.integers(0, len(at_risk) - 1))]
            self.running.remove(entry)
            self.buffer.resample(entry[0])

    @rule()
    def learn(self):
        self.take_task()

    @rule()
    def serve(self):
        self.served = self.version
        self.buffer.serve(self.served)
        done = self.buffer.last_trained()
        self.buffer.evaluated(done.iteration if done else 0)

    @rule()
    def seal(self):
        done = self.buffer.last_trained()
        t = done.iteration + 1 if done else 1
        if t <= len(self.slices) and self.buffer.collected(t):
            self.buffer.seal(t, self.slices[t - 1])
            self.buffer.release(t)

    @rule()
    def checkpoint(self):
        self.checkpoints.add(self.step)

    @rule()
    def learner_dies(self):
        self.restart_learner()

    @rule(staleness=st.integers(0, 3))
    def everything_dies(self, staleness):
        """The run goes on, perhaps under another bound: what was put into batches before stays as it is."""
        schedule = self.config.schedule.model_copy(update={"max_staleness": staleness})
        self.config = self.config.model_copy(update={"schedule": schedule})
        self.loosest = max(self.loosest, staleness)
        self.resume()

    # What must hold.

    @invariant()
    def out_is_bounded(self):
        """Groups accepted or running never exceed what all updates at versions up to served + bound train on."""
        if not hasattr(self, "buffer"):
            return
        out = {ticket.number for ticket, _ in self.running}
        for t in range(1, len(self.slices) + 1):
            out |= set(self.buffer._versions(t, self.buffer._table(t)))
        assert len(out) <= self.trained_through(self.reached() + self.loosest)  # whatever the bound was before
        assert self.buffer.resamples["most_resamples"] <= self.config.schedule.max_resamples

    def trained_through(self, version):
        """Groups that all updates at versions up to this one train on, counted one by one."""
        plan = self.buffer.plan
        if self.config.schedule.batch_order == "slice":
            starts = (plan.version_at(plan.first_step(t)) for t in range(1, len(self.slices) + 1))
            return sum(len(part) for part, start in zip(self.slices, starts, strict=True) if start <= version)
        return sum(plan.place(step).size for step in range(plan.steps) if plan.place(step).version <= version)

    def reached(self):
        """The newest version that was served before everything died."""
        self.highest = max(getattr(self, "highest", 0), self.served)
        return self.highest

    def take_task(self):
        whole = self.config.schedule.batch_order == "slice"
        self.sealed_before = whole and self.buffer._open is not None  # closed under another bound, perhaps
        task = self.buffer.next_task(self.step)
        match task:
            case TrainTask(step=step, examples=examples):
                assert step == self.step
                consumed = self.buffer.plan.version_at(step)
                rows = [(e.prompt_id, e.policy_version) for e in examples]
                bound = (
                    self.loosest if step in self.batches or self.sealed_before else self.config.schedule.max_staleness
                )
                for example in examples:
                    assert 0 <= example.staleness == consumed - example.policy_version <= bound
                assert self.batches.setdefault(step, rows) == rows  # asked again, the same rows
                self.step += 1
            case PublishTask(version=version):
                assert version == self.buffer.plan.version_at(self.step)
                self.published(version, ends=False)
            case SaveTask(iteration=iteration, version=version):
                self.buffer.saved(TrainedIteration(iteration, version, self.step, "c", "policy"))
                self.published(version, ends=True)
            case ReferenceTask(iteration=iteration, examples=examples):
                self.buffer.record_reference(iteration, [(0.0, 0.0)] * len(examples))
        return task

    def published(self, version, ends):
        self.version = max(self.version, version)
        self.buffer.published(Publication(version, self.step, 1, ends, "c", 0.0))

    def teardown(self):
        """Whatever happened: the run comes to its end, and its tables hold every prompt once per pass within the bound."""
        if not hasattr(self, "buffer"):
            return
        for _ in range(40 * (self.buffer.plan.tickets + self.buffer.plan.steps + 1)):
            self.admit_and_finish_oldest_last()
            self.seal()
            if isinstance(self.take_task(), StopTask):
                break
            self.serve()
        else:
            raise AssertionError("the run does not come to its end")
        assert self.buffer.admission.exhausted
        assert self.buffer.admit(5) == []
        for t, prompt_ids in enumerate(self.slices, start=1):
            rows = pq.read_table(self.dir / f"iter_{t}/train.parquet").to_pylist()
            keys = sorted((row["prompt_id"], row["epoch"]) for row in rows)
            assert keys == sorted((p, epoch) for p in prompt_ids for epoch in range(self.buffer.plan.passes))
            for row in rows:
                assert row["consumed_version"] - row["policy_version"] <= self.loosest
                assert (row["prompt_id"], row["policy_version"]) in self.batches[row["step"] - 1]
        shutil.rmtree(self.dir)

    def admit_and_finish_oldest_last(self):
        for _ in range(3):
            self.admit(3)
        while self.running:
            ticket, version = self.running.pop()
            group = judged(self.slices[ticket.iteration - 1][ticket.index], ticket.iteration, 2, version, ticket.epoch)
            self.buffer.add([group])


TestAsyncRun = AsyncRun.TestCase
TestAsyncRun.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck))
