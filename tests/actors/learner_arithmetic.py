"""The learner's tests' own arithmetic: the loss by its formula, and how far weights are apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sppo_ray.types import TrainingExample

Weights = dict[str, torch.Tensor]


def differences(a: Weights, b: Weights) -> torch.Tensor:
    assert set(a) == set(b)
    return torch.cat([(a[name].float() - b[name].float()).abs().flatten() for name in a])


def plain_loss(lm: torch.nn.Module, batch: Sequence[TrainingExample]) -> tuple[torch.Tensor, float]:
    """SPPO's loss at eta 10 by the formula, one sequence at a time, without any of our batching; and the mean log-ratio of
    the winners."""
    total, delta_w = torch.zeros(()), 0.0
    for example in batch:
        prompt, responses = example.prompt_ids, example.response_ids
        if len(prompt) + max(map(len, responses)) > 40:
            prompt = prompt[-16:]
        if len(prompt) + max(map(len, responses)) > 40:
            responses = tuple(ids[:24] for ids in responses)
        for m, ids in enumerate(responses):
            tokens = torch.tensor([[*prompt.tolist(), *ids.tolist()]])
            logps = lm(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[len(prompt) - 1 :].sum()
            delta = logps - example.reference_logps[m]
            total = total + 0.5 * (delta - 10.0 * (example.p_hat[m] - 0.5)) ** 2 / len(batch)
            delta_w += delta.item() / len(batch) if m == 0 else 0.0
    return total, delta_w
