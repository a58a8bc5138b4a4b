"""A tiny random policy, examples and tasks for the learner's tests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from actors.process import environment
from sppo_ray.config import Config
from sppo_ray.errors import LearnerError
from sppo_ray.layout import Assignment
from sppo_ray.tiny.models import build_policy_tokenizer
from sppo_ray.types import (
    LearnerTask,
    Look,
    Probe,
    Publication,
    PublishTask,
    ReferenceTask,
    ResumePoint,
    SaveTask,
    StopTask,
    TrainedIteration,
    TrainingExample,
    TrainTask,
)

VOCAB = 1024


def write_tiny_policy(folder: Path) -> None:
    """A random Llama whose embedding and MLP exceed the 100,000 elements below which ZeRO-3 does not partition."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    build_policy_tokenizer(["one two three", "four five six"]).save_pretrained(folder)


def run_ranks(script: str, policy: Path, out: Path, world: int) -> None:
    """Run `script` (beside this file) on `world` processes on the CPU; their logs and what they leave are in `out`."""
    here = Path(__file__).parent
    out.mkdir()
    env = os.environ | environment(gpus=False, threads=1) | {"PYTHONPATH": f"{here.parent.parent}:{here}"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(here / script), str(policy), str(out), str(rank), str(world)],
            env=env | {"LOCAL_RANK": str(rank)},
            stdout=(out / f"rank-{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]
    codes = [rank.wait(timeout=600) for rank in ranks]
    assert codes == [0] * world, (out / "rank-0.log").read_text()[-3000:]


def config_for(
    run_dir: Path,
    policy: Path,
    dtype: str = "float32",
    saved: str = "float32",
    mode: str = "sync",
    objective: Mapping[str, object] | None = None,
    **learner: object,
) -> Config:
    """Batch 7 in micro-batches of 2: never divisible, by no number of ranks."""
    settings = {"batch_size": 7, "micro_batch_size": 2, "learning_rate": 1e-4, "warmup_ratio": 0.0, "logprob_chunk": 16}
    return Config.model_validate({
        "run": {"dir": str(run_dir), "storage_patience_s": 1.0},
        "data": {"prompts": "unused.jsonl"},
        "policy": {"model": str(policy), "dtype": saved},
        "schedule": {"mode": mode},
        "objective": {"eta": 10.0} | dict(objective or {}),
        "learner": settings | {"dtype": dtype, "lr_schedule": "constant", "max_length": 40, "max_prompt_length": 16} | learner,
        "weights": {"chunk_mb": 1},
    })  # fmt: skip


def examples(n: int, seed: int = 0) -> tuple[TrainingExample, ...]:
    """Pairs of random tokens of very different lengths; the last ones are truncated."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(5, VOCAB, rng.integers(low, high)).astype(np.int32)

    return tuple(
        TrainingExample(
            prompt_id=f"prompt-{i}",
            prompt_ids=tokens(3, 30),
            response_ids=(tokens(1, 30), tokens(1, 30)),
            p_hat=(0.5 + rng.uniform(0, 0.4), 0.5 - rng.uniform(0, 0.4)),
            p_pair=0.8,
            policy_version=0,
            reference_logps=(float(rng.uniform(-60, -40)), float(rng.uniform(-60, -40))),
        )
        for i in range(n)
    )


def tasks(iteration: int = 1, first_step: int = 0, sizes: tuple[int, ...] = (7, 7, 3)) -> list[TrainTask]:
    """An epoch of updates; its last batch is smaller, so that some ranks get padding only."""
    return [
        TrainTask(first_step + i, iteration, i, len(sizes), examples(size, seed=100 * iteration + i))
        for i, size in enumerate(sizes)
    ]


SCRIPT_SIZES = (7, 3)
SCRIPT_ITERATIONS = 2

Logps = Sequence[tuple[float, ...]]


def scripted_task(step: int, saved: int, references: Mapping[int, Logps], published: int) -> LearnerTask:
    """What a buffer would answer in a run of two iterations of two updates each, with a publish after each; as there, a
    pure function.

    saved: iterations finished; references: what was recorded, by iteration; published: the newest version.
    """
    iteration, steps = saved + 1, len(SCRIPT_SIZES)
    if iteration > SCRIPT_ITERATIONS:
        return StopTask()
    epoch = tasks(iteration, first_step=steps * saved, sizes=SCRIPT_SIZES)
    rows = [example for task in epoch for example in task.examples]
    if iteration not in references:
        return ReferenceTask(iteration, tuple(rows))
    if step == steps * iteration:
        return SaveTask(step, iteration, version=step, probe=examples(3, seed=9))
    if step > published:
        return PublishTask(step, iteration, version=step, probe=examples(3, seed=9))
    first = sum(SCRIPT_SIZES[: step - steps * saved])
    task = epoch[step - steps * saved]
    known = references[iteration][first : first + len(task.examples)]
    return replace(
        task,
        examples=tuple(replace(e, reference_logps=v) for e, v in zip(task.examples, known, strict=True)),
    )


class ScriptedBuffer:
    """Stands for the buffer actor: answers from the script, keeps what it is told, fails when asked to."""

    def __init__(
        self,
        policy: str,
        fail_at: int | None = None,
        failures: int = 1,
        hold_at: Sequence[int] = (),
        checkpoints: str = "",
        poison: str = "",
    ) -> None:
        """fail_at, hold_at: steps at which the next task is an error, the first `failures` times it is asked for, or is kept back
        the first time, until `release`; both once their checkpoint is in the folder `checkpoints`, if that is given."""
        self.policy, self.fail_at, self.failures, self.poison = policy, fail_at, failures, poison
        self.failed = 0
        self.hold_at, self.checkpoints = list(hold_at), checkpoints
        self.held, self.released = False, asyncio.Event()
        self.asked: list[int] = []
        self.gave_up = ""
        self.references: dict[int, Any] = {}
        self.steps: list[dict[str, Any]] = []
        self.done: list[TrainedIteration] = []
        self.publications: list[Publication] = []

    async def learner_ready(self, ranks: list[Assignment]) -> None:
        assert [rank.name for rank in ranks] == [f"learner-{n}" for n in range(len(ranks))]

    async def resume_point(self) -> ResumePoint:
        if self.done:
            return ResumePoint(self.done[-1].step, self.done[-1].policy_dir)
        return ResumePoint(0, self.policy)

    async def next_task(self, step: int) -> LearnerTask:
        self.asked.append(step)
        if step == self.fail_at and self.failed < self.failures:
            self.failed += 1
            await self._checkpoint(step)
            raise RuntimeError(f"the script says: failure {self.failed}")
        if step in self.hold_at:
            self.hold_at.remove(step)
            await self._checkpoint(step)
            self.held = True
            await self.released.wait()
            self.released.clear()
        task = scripted_task(step, len(self.done), self.references, len(self.publications))
        if self.poison and self.references:
            bad = replace(task.examples[0], prompt_id="the-bad-one", reference_logps=(float(self.poison), 0.0))
            return replace(task, examples=(bad, *task.examples[1:]))
        return task

    async def _checkpoint(self, step: int) -> None:
        while self.checkpoints and not (Path(self.checkpoints) / f"step-{step}").exists():
            await asyncio.sleep(0.05)

    async def holds(self) -> None:
        """Returns when a task is kept back."""
        while not self.held:
            await asyncio.sleep(0.05)
        self.held = False

    async def release(self) -> None:
        self.released.set()

    async def look(self) -> Look:
        return Look(self.steps[-1] if self.steps else {}, "", 0, 0)

    async def record_reference(self, iteration: int, logps: list[tuple[float, ...]]) -> None:
        self.references[iteration] = logps

    async def record_step(self, metrics: dict[str, Any]) -> None:
        self.steps.append(metrics)

    async def published(self, publication: Publication) -> None:
        self.publications.append(publication)

    async def saved(self, trained: TrainedIteration, publication: Publication) -> None:
        self.done.append(trained)
        self.publications.append(publication)

    async def train(self, iteration: int) -> TrainedIteration:
        while len(self.done) < iteration:
            if self.gave_up:
                raise LearnerError(self.gave_up)
            await asyncio.sleep(0.05)
        return self.done[iteration - 1]

    async def give_up(self, reason: str) -> None:
        self.gave_up = reason

    async def seen(self) -> tuple[list[int], list[dict[str, Any]], list[Publication]]:
        return self.asked, self.steps, self.publications


def assert_token_logprobs(probe: Probe, lm: PreTrainedModel) -> None:
    """The probe's log-probabilities are those of `lm`, one sequence at a time, by transformers."""
    assert len(probe.logprobs) == len(probe.prompt_ids) == len(probe.response_ids) > 0
    for prompt, response, logprobs in zip(probe.prompt_ids, probe.response_ids, probe.logprobs, strict=True):
        tokens = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        with torch.no_grad():
            full = lm(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, full[len(prompt) - 1 :].numpy(), atol=1e-4)
