"""Small judged groups for tests, made from names so that equal names give equal groups."""

from __future__ import annotations

import numpy as np

from sppo_ray.async_buffer import AsyncBuffer
from sppo_ray.config import Config
from sppo_ray.config_io import build_config
from sppo_ray.seeds import derive
from sppo_ray.types import JudgedGroup, LearnerTask, Prompt, Response, ResponseGroup


def config(run_dir, **overrides) -> Config:
    """A valid small config; overrides are dotted keys with __ for the dot."""
    given = {"run": {"dir": str(run_dir), "seed": 7}, "data": {"prompts": "none"}, "policy": {"model": "base"}}
    given |= {"learner": {"batch_size": 4, "schedule_epochs": None}, "policy": {"model": "base", "dtype": "float32"}}
    for key, value in overrides.items():
        section, name = key.split("__")
        given.setdefault(section, {})[name] = value
    return build_config(given)


def prompt(name: str) -> Prompt:
    return Prompt(name, f"text of {name}", f"<s>{name}", np.array([1, derive(name) % 50], dtype=np.int32))


def response(rng: np.random.Generator, i: int, text: str) -> Response:
    tokens = rng.integers(0, 99, rng.integers(1, 9)).astype(np.int32)
    logprobs = -rng.random(len(tokens)).astype(np.float32)
    return Response(tokens, text, "length" if i == 1 else "stop", float(logprobs.sum()), logprobs, seed=i)


def judged(name: str, iteration: int = 1, k: int = 5, version: int = 0, epoch: int = 0) -> JudgedGroup:
    rng = np.random.default_rng(derive(name, iteration, epoch) if epoch else derive(name, iteration))
    responses = tuple(response(rng, i, f"answer {i} to {name} in {iteration}") for i in range(k))
    logits = rng.normal(size=(k, k)).astype(np.float32) * (1 - np.eye(k, dtype=np.float32))
    return JudgedGroup(
        ResponseGroup(prompt(name), iteration, responses, version, version, "rollout-0", epoch), logits, "judge-0"
    )


class HandingOut(AsyncBuffer):
    """As BufferService uses it: a task is handed out when its batch is on disk."""

    def next_task(self, step: int) -> LearnerTask | None:
        task = super().next_task(step)
        self.ledger.settle_batches()
        return task
