"""The learner off-policy: recorded and frozen references, metrics by staleness, probes of the published weights."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from learner_factory import assert_token_logprobs, examples, run_ranks, write_tiny_policy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.timeout(1500)  # with the ranks that run for all tests of the file
CASES = [(1, 0), (1, 3), (2, 0), (2, 2), (2, 3)]  # ranks, ZeRO stage


class Outcome:
    """What the probe left behind, run on one rank and on two."""

    def __init__(self, folder: Path) -> None:
        self.policy = folder / "policy"
        self.folders = {world: folder / f"world-{world}" for world in (1, 2)}
        self.results = {w: json.loads((f / "results.json").read_text()) for w, f in self.folders.items()}
        self.probes = {w: pickle.loads((f / "probes.pkl").read_bytes()) for w, f in self.folders.items()}

    def weights(self, name: str, world: int = 2) -> dict[str, torch.Tensor]:
        return load_file(self.folders[world] / f"{name}.safetensors")

    def same(self, one: str, other: str, world: int = 2) -> bool:
        """Bit for bit."""
        a, b = self.weights(one, world), self.weights(other, world)
        return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("learner")
    write_tiny_policy(folder / "policy")
    for world in (1, 2):
        run_ranks("learner_async_probe.py", folder / "policy", folder / f"world-{world}", world)
    return Outcome(folder)


@pytest.mark.parametrize(("world", "stage"), CASES)
def test_the_frozen_copy_gives_the_log_probabilities_of_the_slices_start(
    outcome: Outcome, world: int, stage: int
) -> None:
    """Bit for bit the epoch whose references were computed before it: so the copy is the old policy, and taking it in and
    out leaves the weights, and all else that an update depends on, as they were."""
    assert outcome.same(f"beforehand {stage}", f"snapshot slice {stage}", world)
    first, second, third = outcome.results[world][f"snapshot slice {stage}"]
    assert abs(first["delta_w"]) < 1e-4
    assert abs(second["delta_w"]) > 1e-2
    assert abs(third["delta_w"]) > 1e-2


@pytest.mark.parametrize(("world", "stage"), CASES)
def test_the_frozen_copy_is_renewed(outcome: Outcome, world: int, stage: int) -> None:
    """Every second update: at the first and the third the policy is its own reference, at the second it has moved."""
    first, second, third = outcome.results[world][f"snapshot 2 {stage}"]
    for metrics in (first, third):
        assert abs(metrics["delta_w"]) < 1e-4
        assert abs(metrics["delta_l"]) < 1e-4
    for name in ("loss", "delta_w", "delta_l"):
        assert second[name] == outcome.results[world][f"snapshot slice {stage}"][1][name]


def test_without_a_copy_the_error_says_what_to_do(outcome: Outcome) -> None:
    assert len(outcome.results[2]["no snapshot"]) == 2
    assert all("remove the run's checkpoints/" in message for message in outcome.results[2]["no snapshot"])


@pytest.mark.parametrize(("world", "stage"), CASES)
def test_recorded_log_probabilities_as_the_reference(outcome: Outcome, world: int, stage: int) -> None:
    """The policy's own: it has not moved, so the first loss is the mean squared target alone."""
    found = outcome.results[world][f"behavior {stage}"]
    whole = [e for e in examples(9) if len(e.prompt_ids) + max(map(len, e.response_ids)) <= 40]
    assert found["examples"] == len(whole) > 3
    assert abs(found["delta_w"]) < 1e-4
    assert abs(found["delta_l"]) < 1e-4
    targets = [10 * (p - 0.5) for e in whole for p in e.p_hat]
    assert found["loss"] == pytest.approx(sum(t**2 for t in targets) / len(targets), rel=1e-4)


@pytest.mark.parametrize(("world", "stage"), CASES)
def test_a_probe_is_of_the_policys_token_log_probabilities(outcome: Outcome, world: int, stage: int) -> None:
    probe = outcome.probes[world][f"behavior {stage}"]
    assert_token_logprobs(probe, AutoModelForCausalLM.from_pretrained(outcome.policy, dtype=torch.float32))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_probe_is_of_the_weights_as_published(outcome: Outcome, stage: int) -> None:
    """Rounded; and neither it nor a probe without an example that fits changes what is trained."""
    assert outcome.results[2][f"rounding {stage}"] == [{"kept": True, "rounded": True, "nothing": True}] * 2
    lm = AutoModelForCausalLM.from_pretrained(outcome.policy, dtype=torch.float32)
    lm.load_state_dict({k: v.float() for k, v in outcome.weights(f"rounding {stage}").items()}, strict=False)
    assert_token_logprobs(outcome.probes[2][f"rounding {stage}"], lm)


@pytest.mark.parametrize(("world", "stage"), CASES)
def test_metrics_by_staleness(outcome: Outcome, world: int, stage: int) -> None:
    """Batches of 7, 7 and 3 examples, 0, 1, 2, 0, ... versions old, dealt over ranks and micro-batches."""
    steps = outcome.results[world][f"snapshot slice {stage}"]
    for metrics, counts in zip(steps, [(3, 2, 2), (3, 2, 2), (1, 1, 1)], strict=True):
        size = sum(counts)
        assert metrics["staleness_mean"] == pytest.approx((counts[1] + 2 * counts[2]) / size)
        assert metrics["staleness_max"] == 2
        for name in ("loss", "delta_w", "delta_l"):
            parts = [metrics[f"{name}_staleness_{lag}"] for lag in range(3)]
            total = sum(count * part for count, part in zip(counts, parts, strict=True))
            assert metrics[name] * size == pytest.approx(total, rel=1e-5, abs=1e-4)
    # At the first update delta is 0, so the losses are the mean squared targets of the examples of each age.
    squares = [sum((10 * (p - 0.5)) ** 2 for p in e.p_hat) / 2 for e in examples(7, seed=100)]
    for lag in range(3):
        of_age = squares[lag::3]
        assert steps[0][f"loss_staleness_{lag}"] == pytest.approx(sum(of_age) / len(of_age), rel=1e-4)


def test_older_examples_weigh_less(outcome: Outcome) -> None:
    """Halving is exact in binary, so the losses are exactly 1, 1/2 and 1/4 of what they were; the mean stays over 7."""
    plain, halved = outcome.results[2]["discount 1"], outcome.results[2]["discount 0.5"]
    losses = [plain[f"loss_staleness_{lag}"] for lag in range(3)]
    assert [halved[f"loss_staleness_{lag}"] for lag in range(3)] == [losses[0], losses[1] / 2, losses[2] / 4]
    assert halved["loss"] == pytest.approx((3 * losses[0] + 2 * losses[1] / 2 + 2 * losses[2] / 4) / 7)
    assert halved["grad_norm"] < plain["grad_norm"]
    assert halved["delta_w"] == plain["delta_w"]
