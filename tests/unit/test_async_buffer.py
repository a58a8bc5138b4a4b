"""The async buffer on small cases worked out by hand; random orders of events are in test_async_run.py."""

from __future__ import annotations

import asyncio

import pytest
from groups import HandingOut, config, judged

from sppo_ray.atomic import line_of
from sppo_ray.buffer_service import BufferService
from sppo_ray.errors import SppoError
from sppo_ray.ledger import LedgerDamaged
from sppo_ray.metrics import MetricsLog, read_metrics
from sppo_ray.types import Publication, PublishTask, SaveTask, TrainedIteration, TrainTask


def ready(tmp_path, prompts=6, **overrides):
    given = {
        "schedule__mode": "async",
        "schedule__iterations": 1,
        "schedule__max_staleness": 1,
        "weights__publish_every": 1,
        "learner__batch_size": 2,
        "rollout__responses_per_prompt": 2,
    }
    buffer = HandingOut(config(tmp_path, **(given | overrides)), [[f"p{n}" for n in range(prompts)]])
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


def two_slices(tmp_path, **overrides):
    """Trained on the first, evaluated not yet: at the publish in the middle of the second."""
    given = {"schedule__mode": "async", "schedule__iterations": 2, "schedule__max_staleness": 9}
    given |= {"weights__publish_every": 1, "learner__batch_size": 2, "rollout__responses_per_prompt": 2}
    buffer = HandingOut(config(tmp_path, **(given | overrides)), [["p0", "p1"], [f"p{n}" for n in range(4)]])
    buffer.evaluated(0)
    for ticket in buffer.admit(10):
        buffer.add([judged(f"p{ticket.index}", ticket.iteration, 2)])
    assert isinstance(buffer.next_task(0), TrainTask)
    buffer.seal(1, ["p0", "p1"])
    buffer.release(1)
    assert isinstance(buffer.next_task(1), SaveTask)
    buffer.saved(TrainedIteration(1, 1, 1, "c", "policy"))
    buffer.published(Publication(1, 1, 1, True, "c", 0.0))
    assert isinstance(buffer.next_task(1), TrainTask)
    return buffer


def test_nothing_is_published_before_the_policy_that_is_served_is_evaluated(tmp_path):
    buffer = two_slices(tmp_path, evaluation__prompts="some")
    assert buffer.next_task(2) is None
    buffer.evaluated(1)
    assert isinstance(buffer.next_task(2), PublishTask)


def test_where_nothing_is_evaluated_no_publish_waits_for_it(tmp_path):
    assert isinstance(two_slices(tmp_path).next_task(2), PublishTask)


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


def test_what_was_sampled_from_weights_of_a_lost_history_is_not_trained_on(tmp_path):
    """Two batches are cut, a group of version 2 is ready. The first shard is lost, and with it both batches: the learner
    begins again at version 0."""
    buffer = ready(tmp_path, prompts=12, schedule__max_staleness=3)
    first, *others = buffer.admit(7)
    finish(buffer, first)
    for ticket in others:
        finish(buffer, ticket)
    for step in range(2):
        assert isinstance(buffer.next_task(step), TrainTask)
        buffer.published(Publication(step + 1, step + 1, 1, False, "c", 0.0))
        buffer.serve(step + 1)
    (late,) = buffer.admit(1)
    finish(buffer, late, version=2)
    next((tmp_path / "iter_1/ledger").glob("shard-000000-*")).unlink()
    again = ready(tmp_path, prompts=12, schedule__max_staleness=3)
    assert {first.number, late.number} <= {ticket.number for ticket in again.admit(12)}


def test_a_shard_that_is_lost_while_the_run_goes_on_asks_for_a_new_start(tmp_path):
    buffer = ready(tmp_path)
    for ticket in buffer.admit(4):
        finish(buffer, ticket)
    buffer.next_task(0)
    next((tmp_path / "iter_1/ledger").glob("shard-000000-*")).unlink()
    buffer._examples.clear()  # as in a long run, where only the last batches are held
    with pytest.raises(LedgerDamaged, match="iteration 1, step 0"):
        buffer.next_task(0)


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
        return HandingOut(config(tmp_path, schedule__max_staleness=staleness, **made), slices)

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


def test_what_was_told_of_batches_that_are_lost_is_taken_out_of_the_metrics(tmp_path):
    """Two updates in the first slice, of which the second's batch is lost with a part of batches.jsonl."""
    buffer = ready(tmp_path)
    for ticket in buffer.admit(4):
        finish(buffer, ticket)
    buffer.next_task(0)
    buffer.published(Publication(1, 1, 1, False, "c", 0.0))
    buffer.next_task(1)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    kept = [
        {"event": "evaluation", "iteration": 0}, {"event": "scale", "iteration": 0, "role": "judge", "at": 9.0},
        {"step": 1, "loss": 0.1}, {"event": "publish", "iteration": 1, "version": 1, "after_step": 1},
    ]  # fmt: skip
    lost = [
        {"step": 2, "loss": 0.2}, {"event": "publish", "iteration": 1, "version": 2, "after_step": 2},
        {"event": "evaluation", "iteration": 1},
    ]  # fmt: skip
    for line in (*kept, *lost[:2]):
        log.write(line)
    BufferService(buffer.config, [[f"p{n}" for n in range(6)]])
    assert read_metrics(tmp_path / "metrics.jsonl") == [*kept, *lost[:2]]  # nothing is lost yet
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(lost[2])
    batches = tmp_path / "iter_1/batches.jsonl"
    batches.write_bytes(batches.read_bytes().splitlines(keepends=True)[0])
    service = BufferService(buffer.config, [[f"p{n}" for n in range(6)]])
    assert read_metrics(tmp_path / "metrics.jsonl") == kept
    assert asyncio.run(service.record(lost[0]))  # it is written again, and at the end
    assert read_metrics(tmp_path / "metrics.jsonl") == [*kept, lost[0]]


def test_batches_with_a_gap_are_cut_anew(tmp_path):
    line = {"step": 1, "iteration": 1, "epoch": 0, "version": 1, "groups": []}
    buffer = ready(tmp_path)
    for ticket in buffer.admit(4):
        finish(buffer, ticket)
    (tmp_path / "iter_1/batches.jsonl").write_bytes(line_of(line, checked=True))
    assert isinstance(ready(tmp_path).next_task(0), TrainTask)
