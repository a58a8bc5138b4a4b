"""Checkpoints within an iteration: going on from one is as if nothing had happened, on any number of ranks at any stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from learner_checkpoint_probe import SHARED
from learner_factory import run_ranks, write_tiny_policy
from safetensors.torch import load_file

pytestmark = pytest.mark.timeout(1500)  # with the ranks that run for all tests of the file
ELSEWHERE = [(1, 0), (3, 2), (3, 3)]  # ranks, ZeRO stage

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("learner")
    write_tiny_policy(folder / "policy")
    for world in (2, 1, 3):  # the others take up what two have left
        run_ranks("learner_checkpoint_probe.py", folder / "policy", folder / f"world-{world}", world)
    return folder


def checkpoint(out: Path, name: str) -> Weights:
    (file,) = (out / "world-2" / name / "checkpoints" / "learner" / "step-1").glob("*.safetensors")
    return load_file(file)


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[n].view(torch.uint8), b[n].view(torch.uint8)) if a[n].dim() else a[n] == b[n] for n in a
    )


@pytest.mark.parametrize("name", [SHARED, "rmsprop 0", "rmsprop 2", "rmsprop 3", "adamw 0", "snapshot 2", "snapshot 3"])
def test_resumed_on_as_many_ranks_it_ends_with_the_same_bits(out: Path, name: str) -> None:
    """Also with AdamW, whose step counts matter, in bfloat16, and with a frozen reference."""
    going_on, resumed = (load_file(out / "world-2" / f"{name} {end}.safetensors") for end in ("going on", "resumed"))
    assert same_bits(going_on, resumed)
    start = load_file(out / "policy" / "model.safetensors")
    assert max((going_on[key].float() - start[key]).abs().max() for key in start) > 1e-5


@pytest.mark.parametrize(("world", "stage"), ELSEWHERE)
def test_the_state_of_two_ranks_is_taken_up_by_others_to_the_last_bit(out: Path, world: int, stage: int) -> None:
    """Sizes of 128 and 1,024 do not divide by three: ZeRO-3 pads them."""
    found = load_file(out / f"world-{world}" / f"from two {stage} state.safetensors")
    assert same_bits(found, checkpoint(out, SHARED))


@pytest.mark.parametrize(("world", "stage"), ELSEWHERE)
def test_and_they_end_where_the_two_would_have(out: Path, world: int, stage: int) -> None:
    """As close as gradients that are summed in another order allow; an update moves each weight by about 1e-4."""
    going_on = load_file(out / "world-2" / f"{SHARED} going on.safetensors")
    found = load_file(out / f"world-{world}" / f"from two {stage} resumed.safetensors")
    off = torch.cat([(going_on[name] - found[name]).abs().flatten() for name in going_on])
    assert (off > 1e-6).float().mean() < 1e-3
    assert off.max() < 1e-4


@pytest.mark.parametrize("kind", ["rmsprop 3", "adamw 0", "snapshot 2"])
def test_a_checkpoint_holds_every_tensor_by_name(out: Path, kind: str) -> None:
    """Weights and optimizer states in float32, the frozen reference in the learner's precision."""
    found = checkpoint(out, kind)
    kinds = {
        "rmsprop 3": {"weights", "square_avg"},
        "adamw 0": {"weights", "exp_avg", "exp_avg_sq"},
        "snapshot 2": {"weights", "square_avg", "frozen"},
    }[kind]
    policy = load_file(out / "policy" / "model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in found.items()} == {
        f"{kind}/lm.{name}": tuple(tensor.shape) for kind in kinds for name, tensor in policy.items()
    }
    assert {tensor.dtype for key, tensor in found.items() if not key.startswith("frozen/")} == {torch.float32}
    assert {tensor.dtype for key, tensor in found.items() if key.startswith("frozen/")} <= {torch.bfloat16}
