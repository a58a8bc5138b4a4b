"""The learner: DeepSpeed's arithmetic over ranks and ZeRO stages, then the whole of it under Ray Train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import learner_factory
import pytest
import ray
import torch
from learner_arithmetic import Weights, differences, plain_loss
from learner_factory import (
    SCRIPT_SIZES,
    assert_token_logprobs,
    config_for,
    examples,
    run_ranks,
    tasks,
    write_tiny_policy,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.learner import LearnerActor
from actors.learner_process import LearnerProcess
from actors.weights import WeightsHub
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError, WorkerFailed
from sppo_ray.layout import Layout, RoleLayout
from sppo_ray.logprobs import PolicyLogps
from sppo_ray.types import Publication, TrainedIteration
from sppo_ray.weight_chunks import Checksum, unpack

pytestmark = pytest.mark.timeout(1500)  # with the ranks that run for all tests of the file
METRICS = {
    "step", "iteration", "loss", "delta_w", "delta_l", "target_w", "target_l", "margin", "margin_accuracy", "grad_norm",
    "learning_rate", "tokens_per_s", "mean_length_w", "mean_length_l", "truncated_share", "examples",
}  # fmt: skip


class Outcome:
    """What the probe left behind, run on one rank and on two."""

    def __init__(self, folder: Path) -> None:
        self.policy = folder / "policy"
        self.start: Weights = load_file(self.policy / "model.safetensors")
        self.folders = {1: folder / "world-1", 2: folder / "world-2"}
        self.results = {w: json.loads((f / "results.json").read_text()) for w, f in self.folders.items()}

    def weights(self, name: str, world: int = 2) -> Weights:
        return load_file(self.folders[world] / f"{name}.safetensors")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("learner")
    write_tiny_policy(folder / "policy")
    for world in (1, 2):
        run_ranks("learner_probe.py", folder / "policy", folder / f"world-{world}", world)
    return Outcome(folder)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("name", ["sgd", "clipped"])
def test_gradients_are_the_same_on_any_number_of_ranks_at_any_stage(
    outcome: Outcome, name: str, world: int, stage: int
) -> None:
    """Under SGD weights are linear in the gradients. Batches of 7, 7 and 3 divide over no number of ranks."""
    expected = outcome.weights(f"{name} 0", world=1)
    assert differences(expected, outcome.start).max() > 1e-2
    assert differences(outcome.weights(f"{name} {stage}", world), expected).max() < 1e-6


def test_gradient_equals_plain_torch(outcome: Outcome) -> None:
    """The first update of the probe's epoch, by the formula, one sequence at a time, without any of our batching."""
    lm = AutoModelForCausalLM.from_pretrained(outcome.policy, dtype=torch.float32)
    total, delta_w = plain_loss(lm, tasks()[0].examples)
    total.backward()
    norm = torch.stack([p.grad.norm() for p in lm.parameters()]).norm().item()
    for world in (1, 2):
        first = outcome.results[world]["sgd 3 metrics"][0]
        assert first["loss"] == pytest.approx(total.item(), rel=1e-5)
        assert first["delta_w"] == pytest.approx(delta_w, rel=1e-5)
        assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert first["learning_rate"] == 1e-4


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_rmsprop_agrees_over_ranks_and_stages(outcome: Outcome, world: int, stage: int) -> None:
    """RMSprop divides by the gradient's size, so where that is near zero rounding decides: few elements, a small part
    of a step (the first is 10 x learning rate = 1e-3)."""
    found = differences(outcome.weights(f"rmsprop {stage}", world), outcome.weights("rmsprop 0", world=1))
    assert found.max() < 1e-4
    assert (found > 1e-6).float().mean() < 1e-3


def test_adamw_equals_adam_s_formulas(outcome: Outcome) -> None:
    """Three updates of Kingma & Ba's algorithm 1, without weight decay, on plain torch's gradients.

    As under RMSprop, rounding decides where a gradient is near zero: a few elements. AdamW's usual decay of 0.01 would
    move the median by 1e-7.
    """
    lm = AutoModelForCausalLM.from_pretrained(outcome.policy, dtype=torch.float32)
    mean = {name: torch.zeros_like(p) for name, p in lm.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in lm.named_parameters()}
    for t, task in enumerate(tasks(), start=1):
        lm.zero_grad()
        plain_loss(lm, task.examples)[0].backward()
        with torch.no_grad():
            for name, p in lm.named_parameters():
                mean[name] = 0.9 * mean[name] + 0.1 * p.grad
                square[name] = 0.999 * square[name] + 0.001 * p.grad**2
                p -= 1e-4 * (mean[name] / (1 - 0.9**t)) / ((square[name] / (1 - 0.999**t)).sqrt() + 1e-8)
    found = differences(outcome.weights("adamw 3"), {name: p.detach() for name, p in lm.named_parameters()})
    assert (found > 1e-6).float().mean() < 1e-3
    assert found.median() < 2e-8


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_metrics_are_exact_over_the_global_batch(outcome: Outcome, stage: int) -> None:
    alone, spread = (outcome.results[world][f"sgd {stage} metrics"] for world in (1, 2))
    for a, b in zip(alone, spread, strict=True):
        assert set(a) == set(b) == METRICS
        for name in METRICS - {"tokens_per_s"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    assert [m["examples"] for m in alone] == [7, 7, 3]
    assert [m["step"] for m in alone] == [1, 2, 3]
    assert 0 < alone[0]["truncated_share"] < 1


def test_reference_log_probabilities(outcome: Outcome) -> None:
    """The same from every number of ranks and stage, in the examples' order."""
    lm = AutoModelForCausalLM.from_pretrained(outcome.policy, dtype=torch.float32)
    short = [i for i, e in enumerate(examples(9)) if len(e.prompt_ids) + max(map(len, e.response_ids)) <= 40]
    assert short
    expected = torch.tensor(outcome.results[1]["sgd 0 reference"])
    for world in (1, 2):
        for stage in (0, 2, 3):
            found = torch.tensor(outcome.results[world][f"sgd {stage} reference"])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    for i in short:
        example = examples(9)[i]
        ids = torch.tensor([[*example.prompt_ids.tolist(), *example.response_ids[1].tolist()]])
        mask = torch.arange(ids.shape[1])[None] >= len(example.prompt_ids)
        alone = PolicyLogps(lm, 16)(ids, torch.ones_like(ids), mask).item()
        assert expected[i, 1].item() == pytest.approx(alone, rel=1e-5)


def test_taking_turns_changes_nothing(outcome: Outcome) -> None:
    """Offload and reload between updates. On the CPU nothing moves, but DeepSpeed's buffers are rebuilt all the same."""
    assert differences(outcome.weights("turns 3"), outcome.weights("rmsprop 3")).max() == 0


@pytest.mark.parametrize("name", ["restart bf16 0", "restart bf16 2", "restart bf16 3", "restart rounding 3"])
def test_going_on_equals_resuming_from_the_saved_folder(outcome: Outcome, name: str) -> None:
    """Bit for bit: optimizer state and the digits that saving rounds away do not outlive an iteration."""
    going_on, resumed = outcome.weights(f"{name} going on"), outcome.weights(f"{name} resumed")
    assert differences(going_on, resumed).max() == 0
    assert differences(going_on, load_file(outcome.folders[2] / f"{name} folder" / "model.safetensors")).max() > 0
    assert outcome.results[2][f"{name} going on"] == outcome.results[2][f"{name} resumed"]  # the reference policy


@pytest.mark.parametrize("reference", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite_names_the_prompt_on_every_rank(outcome: Outcome, reference: str) -> None:
    messages = outcome.results[2][f"not finite {reference}"]
    assert len(messages) == 2
    assert all("the loss is not finite for ['the-bad-one']" in message for message in messages)
    assert differences(outcome.weights(f"not finite {reference}"), outcome.start).max() == 0  # nothing was updated


@pytest.mark.parametrize("stage", [0, 3])
def test_a_gradient_that_is_not_finite_though_the_losses_are_names_the_batch(outcome: Outcome, stage: int) -> None:
    """DeepSpeed would leave the update out and say nothing."""
    messages = outcome.results[2][f"gradient not finite {stage}"]
    assert len(messages) == 2
    assert all("the gradient is not finite though the losses are; prompt ids" in message for message in messages)
    assert all("'prompt-0'" in message for message in messages)


# Under Ray Train.


def scripted_buffer(policy: Path, **script: Any) -> Any:
    # Shipped by value: the learner's workers cannot import the tests' helpers, and a handle whose class cannot be
    # loaded has methods that take no arguments.
    ray.cloudpickle.register_pickle_by_value(learner_factory)
    return ray.remote(learner_factory.ScriptedBuffer).options(num_cpus=0).remote(str(policy), **script)


LAYOUT = Layout(
    kind="cpu", rollout=RoleLayout(1, 0, 0.1), judge=RoleLayout(1, 0, 0.1), learner=RoleLayout(2, 0, 0.1), nodes=1
)


async def test_two_iterations_with_a_restart_within_the_second(
    ray_local: None, outcome: Outcome, tmp_path: Path
) -> None:
    """Reference, train, publish, save; a failure after three updates; the end is that of a run without failure."""
    config = config_for(tmp_path, outcome.policy, num_workers=2, checkpoint_every=1, max_restarts=1)
    buffer = scripted_buffer(outcome.policy, fail_at=3, checkpoints=str(tmp_path / "checkpoints" / "learner"))
    hub = ray.remote(WeightsHub).options(num_cpus=0).remote(config)
    learner = start(config, buffer, hub)
    first = await learner.train(1)
    assert (first.iteration, first.version, first.step) == (1, 2, 2)
    second = await learner.train(2)
    assert (second.iteration, second.version, second.step) == (2, 4, 4)

    saved = load_file(Path(second.policy_dir) / "model.safetensors")
    assert differences(saved, outcome.weights("script version 4")).max() == 0
    await assert_published(hub, second, saved)
    assert_loads(Path(second.policy_dir), outcome.policy, saved)

    await learner.join(60)
    asked, steps, publications = await buffer.seen.remote()
    # At 0 and 2 a reference first, at 1 and 3 a publish. After the failure at 3 it went on from 3, not from 2.
    assert asked == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    assert_publications(publications, outcome, saved)
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(set(line) == METRICS for line in steps)
    assert [line["examples"] for line in steps] == [*SCRIPT_SIZES, *SCRIPT_SIZES]
    # At an iteration's first update the policy is the reference.
    assert abs(steps[2]["delta_w"]) < 1e-4
    assert {"learner-0.log", "learner-1.log"} <= {path.name for path in (tmp_path / "logs").iterdir()}
    assert list((tmp_path / "checkpoints" / "learner").iterdir()) == []  # an iteration's end takes their place
    assert (
        f"path={second.policy_dir})" in (tmp_path / "logs" / "learner.log").read_text()
    )  # Ray Train's last checkpoint
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "iter_1",
        "iter_2",
        "logs",
    }  # and nothing of its own


def assert_publications(publications: list[Publication], outcome: Outcome, saved: Weights) -> None:
    """Every version's weights are those of the run without Ray, and the last one's probe is of the weights saved."""
    assert [(p.version, p.step, p.iteration) for p in publications] == [(1, 1, 1), (2, 2, 1), (3, 3, 2), (4, 4, 2)]
    assert [p.ends_iteration for p in publications] == [False, True, False, True]
    for publication in publications:
        checksum = Checksum()
        for name, tensor in outcome.weights(f"script version {publication.version}").items():
            checksum.add(name, tensor)
        assert publication.checksum == checksum.hexdigest()
    lm = AutoModelForCausalLM.from_pretrained(outcome.policy, dtype=torch.float32)
    lm.load_state_dict(saved, strict=False)
    assert_token_logprobs(publications[-1].probe, lm)


async def assert_published(hub: Any, trained: TrainedIteration, saved: Weights) -> None:
    published = await hub.current.remote()
    assert (published.version, published.checksum) == (trained.version, trained.checksum)
    checksum, served = Checksum(), {}
    for ref in published.chunk_refs:
        chunk = await ref
        checksum.update(chunk)
        served |= {name: tensor.clone() for name, tensor in unpack(chunk)}
    assert checksum.hexdigest() == trained.checksum
    assert len(published.chunk_refs) > 1
    assert differences(served, saved).max() == 0


def assert_loads(folder: Path, start: Path, saved: Weights) -> None:
    """transformers opens it; weights, tokenizer and chat template are there, and nothing is left of the writing."""
    lm = AutoModelForCausalLM.from_pretrained(folder)
    loaded = dict(lm.named_parameters())
    assert lm.dtype == torch.float32
    assert lm.config.use_cache
    assert differences({name: p.detach() for name, p in loaded.items()}, saved).max() == 0
    tokenizer, before = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(start)
    assert tokenizer.chat_template == before.chat_template is not None
    assert tokenizer.get_vocab() == before.get_vocab()
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]


async def test_a_loss_that_is_not_finite_ends_the_run_at_once(
    ray_local: None, outcome: Outcome, tmp_path: Path
) -> None:
    """It would come again: Ray Train's restarts are for what is lost, not for what is wrong."""
    config = config_for(tmp_path, outcome.policy, num_workers=2, max_restarts=2)
    buffer = scripted_buffer(outcome.policy, poison="-inf")
    learner = start(config, buffer, ray.remote(WeightsHub).options(num_cpus=0).remote(config))
    with pytest.raises(LearnerError, match=r"^learner-0: .*the-bad-one"):
        await learner.train(1)
    asked, _, _ = await buffer.seen.remote()
    assert asked == [0, 0]  # the reference, then the poisoned batch, and no second attempt


async def test_the_driver_is_told_what_went_wrong_first(ray_local: None, outcome: Outcome, tmp_path: Path) -> None:
    """Name, error and traceback of the first failure, not only of the one after the last restart."""
    config = config_for(tmp_path, outcome.policy, num_workers=2, max_restarts=1)
    learner = start(config, scripted_buffer(outcome.policy, fail_at=0, failures=2), None)
    with pytest.raises(WorkerFailed, match=r"^learner-0") as caught:
        await learner.train(1)
    first, last = str(caught.value).split("(started again, it ended with: ")
    assert "the script says: failure 1" in first
    assert "in next_task" in first  # the traceback to the line that raised
    assert "the script says: failure 2" in last


def start(config: Config, buffer: Any, hub: Any) -> LearnerProcess:
    actor = ray.remote(LearnerActor).options(num_cpus=0).remote(config, LAYOUT, buffer, hub)
    return LearnerProcess(actor, buffer, config.learner.timeout_s)
