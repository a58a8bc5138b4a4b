"""Configs on pretended GPUs for the tests of layout, memory and plan."""

from __future__ import annotations

from typing import Any

from sppo_ray.config import Config

MISTRAL = "mistralai/Mistral-7B-Instruct-v0.2"


def gpu_config(
    gpus: int, workers: tuple[int, int, int] | None = None, sections: dict[str, Any] | None = None, **cluster: Any
) -> Config:
    """Mistral 7B on `gpus` GPUs. workers: (rollout, learner, judge), one of each per GPU unless given; sections: values
    by section on top."""
    rollouts, learners, judges = workers or (gpus, gpus, gpus)
    data: dict[str, Any] = {
        "run": {"dir": "runs/test"},
        "data": {"prompts": "someone/some-prompts"},
        "policy": {"model": MISTRAL},
        "rollout": {"num_workers": rollouts},
        "learner": {"num_workers": learners},
        "judge": {"num_workers": judges},
        "cluster": {"gpus": gpus, **cluster},
    }
    for section, values in (sections or {}).items():
        data[section] = data.get(section, {}) | values
    return Config.model_validate(data)
