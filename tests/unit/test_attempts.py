"""A run whose actors died is started again while that gets it further; else the first cause ends it."""

from __future__ import annotations

import errno

import pytest

from sppo_ray import attempts
from sppo_ray.attempts import Attempts, progress_of
from sppo_ray.errors import ConfigError, LearnerError, SppoError, WeightSyncError, WorkerDied
from sppo_ray.metrics import MetricsLog


class Run:
    """Attempts that each write something (or not) and fail (or not)."""

    def __init__(self, root, limit=2):
        self.root, self.said, self.slept = root, [], []
        self.attempts = Attempts(root, limit, self.said.append, self.slept.append)
        self.begun = 0

    def go(self, *bodies):
        bodies = iter(bodies)
        while self.attempts.more:
            with self.attempts.next():
                self.begun += 1
                assert self.attempts.begun == self.begun
                next(bodies)()


def died(text):
    def body():
        raise WorkerDied(text)

    return body


def shard(root, n, then):
    def body():
        (root / "iter_1" / "ledger").mkdir(parents=True, exist_ok=True)
        (root / "iter_1" / "ledger" / f"shard-{n:06d}-0.parquet").touch()
        then()

    return body


def test_an_attempt_that_ends_well_is_the_last(tmp_path):
    run = Run(tmp_path)
    run.go(lambda: None)
    assert (run.begun, run.attempts.more, run.said) == (1, False, [])


def test_it_starts_again_after_a_death_and_says_why(tmp_path):
    run = Run(tmp_path)
    run.go(died("buffer: ActorDiedError"), lambda: None)
    assert run.begun == 2
    assert "buffer: ActorDiedError" in run.said[0]
    assert str(tmp_path) in run.said[0]


def test_a_file_server_that_is_away_does_not_hide_why_an_attempt_ended(tmp_path, monkeypatch):
    def away(root):
        raise OSError(errno.ESTALE, "Stale file handle")

    def loses_its_disk():
        monkeypatch.setattr(attempts, "progress_of", away)
        died("buffer: ActorDiedError")()

    run = Run(tmp_path)
    run.go(loses_its_disk, lambda: None)
    assert run.begun == 2
    assert "buffer: ActorDiedError" in run.said[0]


def test_weights_that_do_not_arrive_count_as_well(tmp_path):
    def hub_gone():
        raise WeightSyncError("weights did not reach every worker")

    run = Run(tmp_path)
    run.go(hub_gone, lambda: None)
    assert run.begun == 2


def test_a_crash_loop_ends_with_its_first_cause_and_names_the_last(tmp_path):
    run = Run(tmp_path, limit=2)
    with pytest.raises(WorkerDied, match="the cause") as raised:
        run.go(died("the cause"), died("a symptom"), died("another symptom"))
    assert run.begun == 3
    assert run.slept == [1.0, 2.0]
    assert "another symptom" in raised.value.__notes__[0]


def test_no_restarts_means_none(tmp_path):
    run = Run(tmp_path, limit=0)
    with pytest.raises(WorkerDied) as raised:
        run.go(died("the cause"))
    assert (run.begun, run.slept) == (1, [])
    assert not hasattr(raised.value, "__notes__")


def test_progress_begins_the_count_and_the_cause_anew(tmp_path):
    run = Run(tmp_path, limit=1)
    with pytest.raises(WorkerDied, match="second"):
        run.go(
            shard(tmp_path, 0, died("first")),
            shard(tmp_path, 1, died("second")),
            died("third"),
        )
    assert run.slept == [1.0, 1.0]


def test_what_was_taken_back_and_made_again_is_no_loop(tmp_path):
    """An attempt that set a damaged shard aside left another record than it found."""

    def lose(then):
        def body():
            next((tmp_path / "iter_1/ledger").glob("shard-*")).unlink()
            then()

        return body

    run = Run(tmp_path, limit=1)
    shard(tmp_path, 0, lambda: None)()
    with pytest.raises(WorkerDied, match="second"):
        run.go(died("first"), lose(died("second")), died("third"))
    assert run.begun == 3


def test_what_would_come_again_is_not_tried_again(tmp_path):
    def diverged():
        raise LearnerError("the loss is not finite")

    run = Run(tmp_path)
    with pytest.raises(LearnerError):
        run.go(diverged)
    assert run.begun == 1


def test_every_kind_of_work_is_progress(tmp_path):
    """In the order in which a run goes: each state is further than the one before, shards removed at the seal or not."""
    states = [progress_of(tmp_path)]
    folder = tmp_path / "iter_1" / "ledger"
    folder.mkdir(parents=True)
    (folder / "shard-000000-a.parquet").touch()
    states.append(progress_of(tmp_path))
    (tmp_path / "iter_1" / "sealed.json").touch()
    (folder / "shard-000000-a.parquet").unlink()
    states.append(progress_of(tmp_path))
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.write({"event": "evaluation", "iteration": 0})
    assert progress_of(tmp_path) == states[-1]
    metrics.write({"step": 1})
    states.append(progress_of(tmp_path))
    (tmp_path / "iter_1" / "trained.json").touch()
    states.append(progress_of(tmp_path))
    assert sorted(states) == states
    assert len(set(states)) == 5


def test_another_error_in_a_later_attempt_names_the_first_cause(tmp_path):
    def overloaded():
        raise SppoError("Ray did not start")

    run = Run(tmp_path)
    with pytest.raises(SppoError, match="Ray did not start") as raised:
        run.go(died("the cause"), overloaded)
    assert "the cause" in raised.value.__notes__[0]


def test_a_cluster_that_is_gone_in_a_later_attempt_is_no_refused_config(tmp_path):
    def no_cluster():
        raise ConfigError("no Ray cluster answers")

    with pytest.raises(ConfigError):
        Run(tmp_path).go(no_cluster)
    with pytest.raises(SppoError, match=r"(?s)no Ray cluster answers.*the cause") as raised:
        Run(tmp_path).go(died("the cause"), no_cluster)
    assert not isinstance(raised.value, ConfigError)
