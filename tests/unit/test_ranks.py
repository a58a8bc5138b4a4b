"""What the learner's ranks tell each other arrives whole and in order, and nothing else is unpickled."""

from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from actors.ranks import Ranks, key_of

KEY = b"of these ranks"


class Harm:
    """Its pickle, unpickled, leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def talk(rank: int, key: bytes, out: Path, answers: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    ranks = Ranks.join(key)
    try:
        heard = [
            ranks.broadcast(("from the first", out) if ranks.first else None),
            ranks.gather("x" * 10 ** (3 * rank)),  # of different lengths
            ranks.gather({"rank": rank}),
            ranks.broadcast(None),
        ]
    except RuntimeError as error:
        heard = [str(error)]
    answers.put((rank, heard))
    dist.destroy_process_group()


def hear_both(tmp_path: Path, keys: list[bytes]) -> dict[int, Any]:
    start = multiprocessing.get_context("spawn")
    answers = start.Queue()
    both = [start.Process(target=talk, args=(rank, key, tmp_path, answers)) for rank, key in enumerate(keys)]
    for process in both:
        process.start()
    heard = dict(answers.get(timeout=200) for _ in both)
    for process in both:
        process.join(100)
    return heard


def test_every_rank_hears_the_same_in_rank_order(tmp_path: Path) -> None:
    heard = hear_both(tmp_path, [KEY, KEY])
    assert heard[0] == heard[1] == [("from the first", tmp_path), ["x", "x" * 1000], [{"rank": 0}, {"rank": 1}], None]


def alone(key: bytes = KEY, rank: int = 0) -> Ranks:
    return Ranks(rank=rank, world=2, group=None, key=key)


def message(ranks: Ranks, turn: int, value: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(ranks._sealed(turn, value)), dtype=torch.uint8)


def test_what_does_not_carry_the_key_is_not_unpickled(tmp_path: Path) -> None:
    harm = Harm(tmp_path / "harmed")
    for foreign in (
        message(alone(b"another"), 3, harm),
        torch.frombuffer(bytearray(pickle.dumps(harm)), dtype=torch.uint8),
    ):
        with pytest.raises(
            RuntimeError, match=r"^learner rank 0 got something that learner rank 1 did not send: .*SECURITY"
        ):
            alone()._opened(3, 1, foreign)
    assert not harm.path.exists()
    alone()._opened(3, 1, message(alone(rank=1), 3, harm))  # so it would have been
    assert harm.path.exists()


@pytest.mark.parametrize(("turn", "rank"), [(2, 1), (4, 1), (3, 0)])
def test_a_message_of_another_turn_or_rank_is_refused(turn: int, rank: int) -> None:
    with pytest.raises(RuntimeError, match="did not send"):
        alone()._opened(3, 1, message(alone(rank=rank), turn, "old"))


def test_a_message_of_ranks_that_were_started_before_is_refused() -> None:
    before, now = alone(key_of(KEY, "a placement group"), rank=1), alone(key_of(KEY, "the next"))
    with pytest.raises(RuntimeError, match="did not send"):
        now._opened(3, 1, message(before, 3, "old"))


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_a_changed_bit_is_found(place: int) -> None:
    changed = message(alone(), 0, "value")
    changed[place] ^= 1
    with pytest.raises(RuntimeError, match="did not send"):
        alone()._opened(0, 0, changed)


def test_a_rank_with_another_key_is_not_heard(tmp_path: Path) -> None:
    assert (
        "learner rank 1 got something that learner rank 0 did not send" in hear_both(tmp_path, [KEY, b"another"])[1][0]
    )
