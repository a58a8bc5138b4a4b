"""What the driver says of a slice."""

from __future__ import annotations

import io

from rich.console import Console

from sppo_ray.progress import RunProgress
from sppo_ray.types import Receipt, SliceSummary


def sealed_line(held: int) -> str:
    console = Console(file=io.StringIO(), width=400)
    with RunProgress(console, 3) as progress:
        progress.sampling(1, 48, held)
        for n in range(48 - held):
            progress.sampled(Receipt(f"p{n}", "rollout-0", tokens=100, truncated=1, version=0))
        progress.sealed(SliceSummary(1, 48, 48, 0, 0, 0.0, 0.0, 3))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()[-1]


def test_the_tokens_of_a_slice_are_those_sampled_by_this_start():
    assert "sealed: 48 groups, 4,800 tokens, 48 responses at the token limit;" in sealed_line(held=0)


def test_of_a_slice_that_was_begun_before_the_others_are_named():
    line = "48 groups, 40 of them from before; of the others 800 tokens, 8 responses at the token limit;"
    assert line in sealed_line(held=40)
