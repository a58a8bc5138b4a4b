"""Of failures that follow each other the first is told, until an update lies between them."""

from __future__ import annotations

import pytest

from actors.learner_failures import FirstCause, describe_ranks


def test_the_first_of_failures_without_an_update_between_them_is_told() -> None:
    cause = FirstCause()
    cause.failed("a full disk", 3)
    cause.failed("a lost peer", 3)
    assert (
        cause.of("no place for the ranks", 3) == "a full disk\n(started again, it ended with: no place for the ranks)"
    )


def test_a_failure_after_an_update_is_another_story_but_it_used_up_a_restart() -> None:
    cause = FirstCause()
    cause.failed("a full disk", 0)
    cause.failed("a lost peer", 4)
    cause.failed("its consequence", 4)
    before = "(it had been started again before, after 0 updates, because of: a full disk)"
    assert cause.of("a lost peer", 4) == f"a lost peer\n{before}"
    lost = "(it had been started again before, after 4 updates, because of: a lost peer)"
    assert cause.of("out of memory", 5) == f"out of memory\n{before}\n{lost}"


def test_updates_done_again_after_a_restart_are_no_progress() -> None:
    cause = FirstCause()
    cause.failed("a full disk", 3)
    cause.failed("a lost peer", 2)
    assert cause.of("a lost peer", 3).startswith("a full disk\n")


@pytest.mark.parametrize("peer", ["Connection closed by peer", "[gloo/transport/tcp/pair.cc] timed out", "NCCL error"])
def test_a_rank_that_failed_by_itself_comes_before_those_that_lost_it(peer: str) -> None:
    failed = ValueError("bad tensor")
    failed.add_note("its traceback")
    text = describe_ranks({0: RuntimeError(peer), 1: failed, 2: RuntimeError(peer)})
    assert text == "learner-1: bad tensor\nits traceback\nAlso failed: learner-0, learner-2."
