"""Fidelity presets: the values of the paper and of the authors' scripts where the two differ (REFERENCE of both below).

A preset only fills in what the config file and the command line leave unset; the manifest records every override.
`paper`: arXiv 2405.00675. `reference_code`: github uclaml/SPPO at 5e61c4e (scripts/generate.py, compute_prob.py, run_sppo_*.sh).
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "rollout.temperature": 1.0,
        "rollout.top_p": 1.0,
        "rollout.seeds": "derived",
        "judge.win_rates": "paper",
        "judge.source": "raw",
        "learner.schedule_epochs": 18,  # the paper's 18-epoch linear schedule, stopped after epoch 1: it all lies in warm-up
    },
    "reference_code": {
        "rollout.temperature": 0.7,
        "rollout.top_p": 0.9,
        "rollout.seeds": "reference",
        "judge.win_rates": "reference_code",
        "judge.source": "templated",
        "learner.schedule_epochs": None,
    },
}

# The same in both, so that a change of a default elsewhere cannot change what a preset means.
SHARED: dict[str, Any] = {
    "rollout.responses_per_prompt": 5,
    "rollout.max_new_tokens": 2048,
    "selection.rule": "best_worst",
    "objective.loss": "sppo",
    "objective.eta": 1000.0,
    "learner.learning_rate": 5e-7,
    "learner.optimizer": "rmsprop",
    "learner.lr_schedule": "linear",
    "learner.warmup_ratio": 0.1,
    "learner.epochs": 1,
    "learner.batch_size": 64,
    "learner.max_length": 1024,
    "learner.max_prompt_length": 512,
    "learner.max_grad_norm": None,
}


def preset(fidelity: str) -> dict[str, Any]:
    """Dotted keys and values of a preset; raises KeyError for an unknown name."""
    return SHARED | PRESETS[fidelity]
