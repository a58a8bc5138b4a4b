"""Who hangs, from what the ranks say: small stories with a clock in hand."""

from __future__ import annotations

from sppo_ray.rank_watch import Place, RankWatch

BACKWARD = Place(passed=40, step=12, what="backward")
UPDATE = Place(passed=41, step=12, what="optimizer step")
WAITING = Place(passed=30, step=12, what="waiting for a task", limited=False)


def watch(timeout_s: float = 100) -> RankWatch:
    return RankWatch(timeout_s)


def hear(watched: RankWatch, places: dict[int, Place], times: range) -> None:
    for now in times:
        for rank, place in places.items():
            watched.heard(rank, place, now)


def test_ranks_that_move_on_do_not_hang() -> None:
    watched = watch()
    for now in range(0, 1000, 10):
        hear(
            watched, {r: Place(passed=now // 90, step=now // 90, what="backward") for r in (0, 1)}, range(now, now + 1)
        )
        assert watched.hanging(now) == []


def test_the_rank_that_is_behind_is_named_and_the_others_waited() -> None:
    watched = watch()
    hear(watched, {0: UPDATE, 1: BACKWARD, 2: UPDATE}, range(0, 101, 10))
    assert watched.hanging(100) == []
    hear(watched, {0: UPDATE, 1: BACKWARD, 2: UPDATE}, range(110, 111))
    assert watched.hanging(110) == [1]
    assert watched.describe([1]) == (
        "learner-1 did not reach step 13 (it was last seen at step 12, backward) within 100 s; learner-0, learner-2 waited"
    )


def test_a_stopped_rank_is_told_from_those_that_wait_for_it_at_the_same_place() -> None:
    watched = watch()
    hear(watched, {0: BACKWARD, 1: BACKWARD}, range(0, 21, 10))
    hear(watched, {0: BACKWARD}, range(30, 111, 10))
    assert watched.hanging(110) == [1]


def test_ranks_that_hang_together_are_all_named() -> None:
    watched = watch()
    hear(watched, {0: BACKWARD, 1: BACKWARD}, range(0, 111, 10))
    assert watched.hanging(110) == [0, 1]
    assert watched.describe([0, 1]) == (
        "learner-0 did not reach step 13 (it was last seen at step 12, backward), "
        "learner-1 did not reach step 13 (it was last seen at step 12, backward) within 100 s"
    )


def test_waiting_for_a_task_may_take_any_time_but_not_in_silence() -> None:
    watched = watch()
    hear(watched, {0: WAITING, 1: WAITING}, range(0, 5001, 10))
    assert watched.hanging(5000) == []
    hear(watched, {0: WAITING}, range(5010, 5111, 10))
    assert watched.hanging(5110) == [1]


def test_a_rank_that_never_took_up_the_task_is_the_one_that_is_behind() -> None:
    """Its own place is one without limit."""
    watched = watch()
    hear(watched, {0: BACKWARD, 1: WAITING}, range(0, 111, 10))
    assert watched.hanging(110) == [1]


def test_a_single_rank_is_watched_too() -> None:
    watched = watch()
    hear(watched, {0: Place()}, range(0, 111, 10))
    assert watched.hanging(110) == [0]
    assert watched.describe([0]) == "learner-0 did not reach step 1 (it was last seen at step 0, starting) within 100 s"


def test_a_new_group_begins_with_no_past() -> None:
    watched = watch()
    hear(watched, {0: BACKWARD, 1: BACKWARD}, range(0, 1))
    watched.forget()
    assert watched.hanging(1000) == []
