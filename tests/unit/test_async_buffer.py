"""The async buffer driven through random orders of finishing, aborting, training, publishing, crashing and resuming."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from groups import config, judged
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sppo_ray.async_buffer import AsyncBuffer
from sppo_ray.errors import SppoError
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
    )
    def begin(self, staleness, every, sizes, batch, epochs, order):
        self.dir = Path(tempfile.mkdtemp())
        self.config = config(
            self.dir,
            schedule__mode="async",
            schedule__iterations=len(sizes),
            schedule__max_staleness=staleness,
            schedule__max_resamples=100,
            schedule__batch_order=order,
            weights__publish_every="slice" if order == "slice" else every,
            learner__batch_size=batch,
            learner__epochs=epochs,
            rollout__responses_per_prompt=2,
            objective__reference="snapshot",
        )
        self.slices = [[f"{t}-{n}" for n in range(size)] for t, size in enumerate(sizes, start=1)]
        self.batches = {}  # step -> rows, as first handed out
        self.loosest = staleness
        self.resume()

    def resume(self):
        self.buffer = AsyncBuffer(self.config, self.slices)
        self.running = []
        self.exhausted = False
        self.restart_learner()
        self.version = self.served = self.buffer.plan.version_at(self.step)  # learner's and the rollout workers'

    def restart_learner(self):
        self.step = self.buffer.resume_point().step

    # What may happen, in any order.

    @rule(room=st.integers(1, 5))
    def admit(self, room):
        if self.exhausted:
            return  # as the schedule does: it has stopped asking
        tickets = self.buffer.admit(room)
        self.exhausted = self.buffer.admission.exhausted
        for ticket in tickets:
            assert ticket.number not in {other.number for other, _ in self.running}
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
        if self.running:
            ticket, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            self.buffer.resample(ticket)

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
        plan = self.buffer.plan
        out = {ticket.number for ticket, _ in self.running}
        for t in range(1, len(self.slices) + 1):
            out |= set(self.buffer._versions(t, self.buffer._table(t)))
        bound = max(self.served, self.reached()) + self.loosest
        assert (
            len(out) <= sum(plan.place(step).size for step in range(plan.steps) if plan.place(step).version <= bound)
            or self.config.schedule.batch_order == "slice"
        )

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
                    assert example.staleness == consumed - example.policy_version <= bound
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
TestAsyncRun.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def ready(tmp_path, prompts=6, **overrides):
    given = {
        "schedule__mode": "async",
        "schedule__iterations": 1,
        "schedule__max_staleness": 1,
        "weights__publish_every": 1,
        "learner__batch_size": 2,
        "rollout__responses_per_prompt": 2,
    }
    buffer = AsyncBuffer(config(tmp_path, **(given | overrides)), [[f"p{n}" for n in range(prompts)]])
    buffer.evaluated(0)
    return buffer


def finish(buffer, ticket, version=0):
    buffer.add([judged(f"p{ticket.index}", 1, 2, version)])


def test_admission_by_hand(tmp_path):
    """Batches of 2, a publish per update, staleness 1: (1 + 0 + 1) x 2 groups at version 0, two more at version 1."""
    buffer = ready(tmp_path)
    first = buffer.admit(10)
    assert [ticket.number for ticket in first] == [0, 1, 2, 3]
    assert buffer.admit(10) == []
    for ticket in first:
        finish(buffer, ticket)
    assert isinstance(buffer.next_task(0), TrainTask)
    assert buffer.admit(10) == []  # what was trained on still counts until a new version is served
    assert isinstance(buffer.next_task(1), PublishTask)
    buffer.published(Publication(1, 1, 1, False, "c", 0.0))
    buffer.serve(1)
    assert [ticket.number for ticket in buffer.admit(10)] == [4, 5]


def test_a_slow_prompt_is_waited_for_and_not_overtaken_for_ever(tmp_path):
    """Ticket 0 runs on. The first batch may do without it, the second may not: in the third it would be too old."""
    buffer = ready(tmp_path)
    slow, *others = buffer.admit(10)
    for ticket in others:
        finish(buffer, ticket)
    assert len(buffer.next_task(0).examples) == 2
    buffer.published(Publication(1, 1, 1, False, "c", 0.0))
    buffer.serve(1)
    for ticket in buffer.admit(10):
        finish(buffer, ticket, version=1)
    assert buffer.next_task(1) is None  # three newer groups are ready
    finish(buffer, slow)
    task = buffer.next_task(1)
    assert f"p{slow.index}" in {example.prompt_id for example in task.examples}
    assert max(example.staleness for example in task.examples) == 1


def test_a_smaller_bound_after_a_resume_sends_old_groups_back(tmp_path):
    buffer = ready(tmp_path, schedule__max_staleness=2, weights__publish_every=1)
    for ticket in buffer.admit(10):
        finish(buffer, ticket)
    for step in (0, 1):
        assert isinstance(buffer.next_task(step), TrainTask)
        if step == 0:
            buffer.published(Publication(1, 1, 1, False, "c", 0.0))
    stricter = ready(tmp_path, schedule__max_staleness=0)
    assert isinstance(stricter.next_task(0), TrainTask)  # batches that were cut stay as they are
    stricter.published(Publication(1, 1, 1, False, "c", 0.0))
    assert isinstance(stricter.next_task(1), TrainTask)
    stricter.published(Publication(2, 2, 1, False, "c", 0.0))
    stricter.serve(2)
    assert stricter.next_task(2) is None
    again = stricter.admit(10)
    assert [ticket.resamples for ticket in again] == [1, 1]
    for ticket in again:
        finish(stricter, ticket, version=2)
    assert {example.staleness for example in stricter.next_task(2).examples} == {0}


def test_sampling_again_is_bounded_and_names_the_prompt(tmp_path):
    buffer = ready(tmp_path, schedule__max_staleness=2, schedule__max_resamples=0)
    for ticket in buffer.admit(10):
        finish(buffer, ticket)
    stricter = ready(tmp_path, schedule__max_staleness=0, schedule__max_resamples=0)
    stricter.next_task(0)
    stricter.published(Publication(1, 1, 1, False, "c", 0.0))
    with pytest.raises(SppoError, match="max_staleness=0"):
        stricter.next_task(1)


def test_an_aborted_group_comes_again_before_newer_ones_and_is_protected_in_the_end(tmp_path):
    buffer = ready(tmp_path, schedule__max_resamples=1)
    first, second = buffer.admit(2)
    assert not first.protected
    buffer.resample(second)
    buffer.resample(first)
    again = buffer.admit(1)
    assert [(ticket.number, ticket.resamples, ticket.protected) for ticket in again] == [(0, 1, True)]


def test_batches_whose_groups_are_lost_are_cut_anew(tmp_path):
    buffer = ready(tmp_path)
    one, *others = buffer.admit(10)
    finish(buffer, one)
    for ticket in others:
        finish(buffer, ticket)
    buffer.next_task(0)
    shard = next((tmp_path / "iter_1/ledger").glob("shard-000000-*"))
    shard.write_bytes(shard.read_bytes()[:-9])
    again = ready(tmp_path)
    assert again.next_task(0) is not None  # of the three that are left
    assert [ticket.number for ticket in again.admit(10)] == [one.number]


def test_after_a_resume_nothing_is_sampled_that_would_be_too_old(tmp_path):
    """The learner goes through three cut batches again, from version 0; new groups sampled now would be consumed at 3."""
    buffer = ready(tmp_path, prompts=12, schedule__max_staleness=3)
    for ticket in buffer.admit(8):
        finish(buffer, ticket)
    for step in range(3):
        buffer.next_task(step)
        buffer.published(Publication(step + 1, step + 1, 1, False, "c", 0.0))
        buffer.serve(step + 1)
    finish(buffer, buffer.admit(1)[0], version=3)
    again = ready(tmp_path, prompts=12, schedule__max_staleness=2)
    assert again.admit(1) == []
    for step in range(3):
        assert isinstance(again.next_task(step), TrainTask)
        again.published(Publication(step + 1, step + 1, 1, False, "c", 0.0))
        again.serve(step + 1)
    assert again.admit(1) != []


def test_only_waiting_groups_and_the_last_batches_are_held(tmp_path):
    buffer = ready(tmp_path, prompts=40, schedule__max_staleness=0, weights__publish_every=1)
    for step in range(20):
        for ticket in buffer.admit(10):
            finish(buffer, ticket, version=step)
        buffer.next_task(step)
        assert len(buffer._examples) <= 6
        buffer.published(Publication(step + 1, step + 1, 1, False, "c", 0.0))
        buffer.serve(step + 1)


def test_what_is_sent_back_is_admitted_within_the_bound_too(tmp_path):
    """20 groups on disk from version 0, then a smaller bound: they come again as the served version allows, not at once."""
    buffer = ready(tmp_path, prompts=24, schedule__max_staleness=9)
    for ticket in buffer.admit(20):
        finish(buffer, ticket)
    stricter = ready(tmp_path, prompts=24, schedule__max_staleness=1)
    out = 0
    for step in range(12):
        while (task := stricter.next_task(step)) is None:
            tickets = stricter.admit(24)
            assert tickets, "nothing may be sampled, and nothing can be trained"
            out = max(out, max(ticket.number for ticket in tickets))
            for ticket in tickets:
                finish(stricter, ticket, version=step)
            assert out < (1 + step + 1) * 2
        assert max(example.staleness for example in task.examples) <= 1
        stricter.published(Publication(step + 1, step + 1, 1, False, "c", 0.0))
        stricter.serve(step + 1)
    assert stricter.admission.exhausted
    assert stricter.resamples["most_resamples"] == 1


def test_sampling_is_not_over_while_groups_may_come_back(tmp_path):
    buffer = ready(tmp_path, schedule__max_staleness=9)
    for ticket in buffer.admit(6):
        finish(buffer, ticket)
    assert not ready(tmp_path, schedule__max_staleness=0).admission.exhausted


def test_a_slice_that_is_too_old_for_a_smaller_bound_is_sampled_again(tmp_path):
    given = {"schedule__batch_order": "slice", "weights__publish_every": "slice", "schedule__iterations": 2}
    slices = [["p0", "p1"], ["q0", "q1"]]

    def start(staleness):
        made = {"schedule__mode": "async", "learner__batch_size": 2, "rollout__responses_per_prompt": 2} | given
        return AsyncBuffer(config(tmp_path, schedule__max_staleness=staleness, **made), slices)

    buffer = start(1)
    for ticket in buffer.admit(4):
        name = slices[ticket.iteration - 1][ticket.index]
        buffer.add([judged(name, ticket.iteration, 2)])
    again = start(0)
    again.seal(1, slices[0])
    again.release(1)
    again.saved(TrainedIteration(1, 1, 1, "c", "policy"))
    again.serve(1)
    assert sorted(ticket.iteration for ticket in again.admit(4)) == [2, 2]


def test_a_batch_that_could_not_be_written_is_not_handed_out(tmp_path, monkeypatch):
    buffer = ready(tmp_path)
    for ticket in buffer.admit(4):
        finish(buffer, ticket)

    def full(batch):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(buffer.ledger, "append_batch", full)
        with pytest.raises(OSError, match="disk full"):
            buffer.next_task(0)
    (tmp_path / "iter_1/batches.jsonl").write_text(
        '{"step": 1, "iteration": 1, "epoch": 0, "version": 1, "groups": []}\n'
    )
    assert isinstance(ready(tmp_path).next_task(0), TrainTask)  # a gap: cut anew from the beginning
