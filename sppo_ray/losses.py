"""Preference losses: pure functions in one table. A new one is a function and an entry in `LOSSES`.

Shapes: B examples (prompts), M selected responses each, winner first. Log-probabilities and targets are in nats.

On stale samples (async) these losses need no importance weights. They are regressions: for each response the loss is
least where log pi_theta(y|x) - log pi_ref(y|x) equals its target, whichever policy sampled y; that policy decides only how
often a response is looked at. What must belong together is the target and the reference: P_hat is the win rate against the
policy mu that sampled the group, so the step asked for is one from mu, and log mu(y|x) is its reference (`behavior`).
delta then also counts how far the weights have already gone since mu: a stale example asks for what is still missing, not
for the whole step again. What staleness does change is the opponent: P_hat is against mu, not against the newest policy;
the two win rates differ by at most the total variation between the policies, the targets by eta times that. Where eta is
so large that |delta| stays far below |target| (the paper's), the gradient is nearly -2 target for any reference, and an old
example pushes with full strength. `target_clip` bounds how hard one example may push, `lag_weight` lets old ones push less;
both are off by default and then change no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (delta [B, M], p_hat [B, M], p_pair [B], eta, target_clip) -> (loss [B], metrics: name -> [B]). Nothing is reduced over B
# here, so that the caller can weigh examples and take exact means over a batch spread over ranks and micro-batches.
LossFn = Callable[[Tensor, Tensor, Tensor, float, float | None], tuple[Tensor, dict[str, Tensor]]]


def sppo(
    delta: Tensor, p_hat: Tensor, p_pair: Tensor, eta: float, target_clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's loss (eq. 4.4 of arXiv 2405.00675), averaged over the M selected responses:

        mean_m (delta_m - eta (P_hat_m - 1/2))^2;  for a pair  1/2 [(delta_w - ...)^2 + (delta_l - ...)^2]

    delta: log pi_theta(y|x) - log pi_ref(y|x), summed over the response. p_pair is not used.
    target_clip: largest |target| in nats; None: none.
    """
    target = _clipped(eta * (p_hat - 0.5), target_clip)
    return (delta - target).square().mean(dim=1), _metrics(delta, target, p_hat)


def sppo_single(
    delta: Tensor, p_hat: Tensor, p_pair: Tensor, eta: float, target_clip: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The authors' pair variant (`sppo_single` in their trainer), with p = P(winner beats loser):

        1/2 [(delta_w - eta (p - 1/2))^2 + (delta_l + eta (p - 1/2))^2]

    target_clip: as in `sppo`. Raises ValueError when M is not 2.
    """
    if delta.shape[1] != 2:
        raise ValueError(f"sppo_single compares a winner with a loser, but {delta.shape[1]} responses were selected.")
    push = _clipped(eta * (p_pair - 0.5), target_clip)
    target = torch.stack([push, -push], dim=1)
    return (delta - target).square().mean(dim=1), _metrics(delta, target, p_hat)


LOSSES: dict[str, LossFn] = {"sppo": sppo, "sppo_single": sppo_single}


def lag_weight(staleness: Tensor, discount: float) -> Tensor:
    """float32 [B]: discount ** staleness, by which the losses are multiplied. staleness: int64 [B], versions.

    The batch's mean stays over the number of its examples, not over the sum of these weights, so old examples make the
    gradient smaller instead of making the fresh ones count for more. (RMSprop and AdamW divide by the gradient's running
    size: there a weight that all batches share cancels, and what is left is the weight of old beside fresh.)
    """
    return discount ** staleness.float()


def winner_and_loser(p_hat: Sequence[float]) -> tuple[int, int]:
    """Positions of the two responses that metrics speak of: a pair is winner first (selected by score, whose order may
    differ from P_hat's); of more than two, the best and the worst P_hat."""
    if len(p_hat) == 2:
        return 0, 1
    return p_hat.index(max(p_hat)), p_hat.index(min(p_hat))


def _clipped(target: Tensor, limit: float | None) -> Tensor:
    return target if limit is None else target.clamp(-limit, limit)


def _metrics(delta: Tensor, target: Tensor, p_hat: Tensor) -> dict[str, Tensor]:
    """Per example [B]: what happens to the winner and the loser, and whether the policy now tells them apart."""
    ends = torch.tensor([winner_and_loser(row) for row in p_hat.tolist()], device=delta.device)
    delta_w, delta_l = delta.detach().gather(1, ends).unbind(1)
    target_w, target_l = target.gather(1, ends).unbind(1)
    margin = delta_w - delta_l
    return {
        "delta_w": delta_w,
        "delta_l": delta_l,
        "target_w": target_w,
        "target_l": target_l,
        "margin": margin,
        "margin_accuracy": (margin > 0).to(margin.dtype),
    }
