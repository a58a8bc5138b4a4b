"""The plan of an async run: hand-computed on a small one, and by counting on any."""

from __future__ import annotations

import pytest
from groups import config
from hypothesis import given
from hypothesis import strategies as st

from sppo_ray.step_plan import StepPlan


def plan(slices, batch, every, epochs=1, order="ready"):
    run = config(
        "unused",
        schedule__mode="async",
        schedule__iterations=len(slices),
        schedule__batch_order=order,
        weights__publish_every=every,
        learner__batch_size=batch,
        learner__epochs=epochs,
    )
    return StepPlan(run, slices)


def test_by_hand():
    """Slices of 5 and 4 prompts, batches of 2 (2, 2, 1 and 2, 2), published every 2 updates and at each slice's end."""
    p = plan([5, 4], batch=2, every=2)
    assert (p.steps, p.tickets) == (5, 9)
    assert [p.place(step).size for step in range(5)] == [2, 2, 1, 2, 2]
    assert [p.version_at(step) for step in range(6)] == [0, 0, 1, 2, 2, 3]
    assert [p.groups_through(version) for version in range(-1, 4)] == [0, 4, 5, 9, 9]
    assert (p.last_version(1), p.last_version(2)) == (2, 3)
    assert [p.earliest_step(number) for number in range(9)] == [0] * 5 + [3] * 4
    assert [p.room_after(0, version) for version in (0, 1, 2)] == [2, 3, 3]


def test_epochs_sample_anew_in_ready_order_and_not_in_slice_order():
    ready, whole = plan([5], 2, 2, epochs=3), plan([5], 2, "slice", epochs=3, order="slice")
    assert (ready.steps, ready.tickets) == (9, 15)
    assert (whole.steps, whole.tickets) == (9, 5)
    assert [ready.place(step).epoch for step in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert (whole.groups_through(0), whole.last_version(1)) == (5, 1)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 4),
    st.one_of(st.integers(1, 4), st.just("slice")),
    st.integers(1, 3),
)
def test_by_counting(slices, batch, every, epochs):
    p = plan(slices, batch, every, epochs)
    places = [p.place(step) for step in range(p.steps)]
    assert sum(place.size for place in places) == p.tickets == sum(slices) * epochs
    versions = [place.version for place in places]
    assert versions == sorted(versions)
    for version in range(versions[-1] + 2):
        assert p.groups_through(version) == sum(place.size for place in places if place.version <= version)
        for step, place in enumerate(places):
            same = [q for q in places[step + 1 :] if (q.iteration, q.epoch) == (place.iteration, place.epoch)]
            assert p.room_after(step, version) == sum(q.size for q in same if q.version <= version)
    for number in range(p.tickets):
        where = p.ticket_place(number)
        assert p.ticket_number(*where) == number
        assert p.earliest_step(number) == next(s for s, q in enumerate(places) if (q.iteration, q.epoch) == where[:2])


def test_a_version_is_published_at_least_at_each_slice_s_end():
    p = plan([64, 64], batch=8, every=100)
    assert [p.version_at(step) for step in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("order", ["ready", "slice"])
def test_every_prompt_has_a_ticket_in_each_pass(order):
    p = plan([7], 2, "slice", epochs=2, order=order)
    places = [p.ticket_place(number) for number in range(p.tickets)]
    assert sorted(places) == [(1, epoch, n) for epoch in range(p.passes) for n in range(7)]
